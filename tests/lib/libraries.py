"""The C kernels that were built, one library per instruction set."""

import os
import subprocess
from pathlib import Path

import forks
import pytest
import torch
from harness import limit

from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL, VectorQuantizer
from rhtcomm.kernels import Kernel, cpu, use
from rhtcomm.quantizers import Quantizer

__all__ = [
    "ECDQS",
    "FRACTION",
    "PATH",
    "QUANTIZERS",
    "both_ways",
    "choose",
    "needs_library",
    "variants",
]

# `make sanitize` runs test_kernels.py on an instrumented build.
PATH = os.environ.get("RHTCOMM_TEST_LIBRARY") or cpu.library_path()
REQUIRED = bool(os.environ.get("RHTCOMM_REQUIRE_KERNELS"))
needs_library = pytest.mark.skipif(
    PATH is None and not REQUIRED, reason="the C kernels were not built"
)
FRACTION = 1 / 512
QUANTIZERS: tuple[Quantizer, ...] = (
    *(QuicFL(bits) for bits in range(1, 9)),
    *(QuicFL(bits, exact_fraction=FRACTION) for bits in range(1, 9)),
    *(Eden(bits) for bits in range(1, 9)),
    *(VectorQuantizer(bits) for bits in (1, 2, 4)),
)
ECDQS: tuple[Quantizer, ...] = tuple(ECDQ(bits) for bits in (1, 1.75, 2, 2.5, 3, 4, 5, 6))


def variants() -> dict[str, cpu.Library]:
    assert PATH is not None, "RHTCOMM_REQUIRE_KERNELS is set, but the C kernels were not built"
    found = {}
    for name in ("avx512vbmi", "avx512", "avx2", "baseline"):
        try:
            found[name] = cpu.Library(Path(PATH), name)
        except RuntimeError:
            continue
    return found


def both_ways(
    kernel: Kernel, codec: Codec, xs: list[torch.Tensor], key: Key, offset: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """All payloads, and the decoded mean as bits (so that NaN equals NaN)."""
    with use(kernel):
        payloads = torch.stack(
            [codec.encode(x, key, rank, len(xs), offset=offset) for rank, x in enumerate(xs)]
        )
        out = torch.empty(xs[0].numel(), dtype=dtype)
        mean = codec.decode_mean(payloads, key, out.numel(), offset=offset, out=out)
    return payloads, torch.where(mean.isnan(), 12345.0, mean.float())


def choose(environment: dict[str, str], before: str = "") -> subprocess.CompletedProcess[str]:
    """Which kernel a fresh process with this environment picks, and what it says of it."""
    program = f"""
import torch
from rhtcomm import QuicFL
from rhtcomm.kernels import cpu, kernel_for
{before}
for _ in range(2):
    kernel = kernel_for(torch.device("cpu"), QuicFL(4))
print(getattr(kernel, "variant", "reference"))
"""
    kept = {k: v for k, v in os.environ.items() if k not in ("RHTCOMM_KERNELS", "RHTCOMM_CPU")}
    return forks.start(program, {**kept, **environment}, strict=False).wait(limit(120))
