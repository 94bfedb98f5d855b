"""What fuzz targets draw: tensors of any bits, codecs, lengths and keys."""

import itertools
import os
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from libraries import QUANTIZERS

from rhtcomm import ECDQ, Codec, Eden, Key, VectorQuantizer
from rhtcomm.quantizers import Quantizer
from rhtcomm.quantizers.ecdq import BITS, UNIT

__all__ = ["FINITE", "ODD", "bits_of", "codecs", "fuzz", "inputs", "keys", "lengths"]

FACTOR = int(os.environ.get("RHTCOMM_FUZZ") or 0)
ALL: tuple[Quantizer, ...] = (
    *QUANTIZERS,
    *(Eden(bits, biased=True) for bits in (1, 4)),
    VectorQuantizer(2, biased=True),
    *(ECDQ(bits) for bits in BITS),
)


def fuzz(examples: int) -> Any:
    """So many examples, always the same ones; with RHTCOMM_FUZZ that many times as many, others."""
    return settings(
        max_examples=examples * max(1, FACTOR),
        derandomize=not FACTOR,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


FINITE = ("gaussian", "spread", "subnormal", "zeros", "minus zeros", "one", "steps")
ODD = ("bits", "huge", "infinite", "NaN", "one infinite", "one NaN")


def segment(kind: str, count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """(count,) of a dtype."""
    width = torch.int32 if dtype == torch.float32 else torch.int16
    limits, info = torch.iinfo(width), torch.finfo(dtype)

    def bits(low: int, high: int) -> torch.Tensor:
        drawn = torch.randint(low, high + 1, (count,), generator=generator)
        return drawn.to(width).view(dtype)

    normal = torch.randn(count, generator=generator)
    few = torch.zeros(count).index_fill_(0, torch.arange(count // 2, min(count, count // 2 + 1)), 1)
    # Exponents such that a block of 2^13 of them can be summed and squared in every dtype.
    spread = torch.randint(-10, 4, (count,), generator=generator)
    match kind:
        case "bits":
            return bits(limits.min, limits.max)
        case "subnormal":
            return bits(0, int(torch.tensor(info.tiny, dtype=dtype).view(width)))
        case "gaussian":
            x = normal
        case "spread":
            x = torch.ldexp(normal, spread * (1 if dtype == torch.float16 else 3))
        case "zeros":
            x = torch.zeros(count)
        case "minus zeros":
            x = -torch.zeros(count)
        case "one":
            x = few * -2.5
        case "steps":
            x = normal.round()
        case "huge":
            x = normal.sign() * info.max
        case "infinite":
            x = normal * torch.inf
        case "NaN":
            x = normal * torch.nan
        case "one infinite":
            x = torch.where(few > 0, torch.inf, normal)
        case _:
            x = torch.where(few > 0, torch.nan, normal)
    return x.to(dtype)


@st.composite
def inputs(draw: Any, numel: int, dtype: torch.dtype, kinds: tuple[str, ...]) -> torch.Tensor:
    """(numel,) of up to four segments of one kind each."""
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    edges = [numel * i // len(chosen) for i in range(len(chosen) + 1)]
    sizes = [stop - start for start, stop in itertools.pairwise(edges)]
    return torch.cat(
        [segment(kind, n, dtype, generator) for kind, n in zip(chosen, sizes, strict=True)]
    )


keys = st.builds(
    Key,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 15),
)


@st.composite
def codecs(draw: Any, quantizers: tuple[Quantizer, ...] = ALL) -> Codec:
    quantizer = draw(st.sampled_from(quantizers))
    return Codec(quantizer, draw(st.integers(1, 3)), 1 << draw(st.integers(5, 13)))


@st.composite
def lengths(draw: Any, codec: Codec, most: int) -> int:
    """1 to `most`; one in ten of ECDQ's about one unit or more, for which its reference is slow."""
    if isinstance(codec.quantizer, ECDQ) and draw(st.integers(0, 9)) == 0:
        return draw(st.integers(UNIT - codec.block, 3 * UNIT))
    return draw(st.integers(1, most))


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """Integers by which 0 differs from -0, while all NaN are one."""
    nan = torch.where(x.isnan(), torch.nan, x.float())
    return nan.view(torch.int32)
