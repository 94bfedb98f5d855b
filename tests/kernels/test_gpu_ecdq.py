"""ECDQ's Triton kernels against the torch reference: the same bits, always.

They run in Triton's interpreter, step by step of the coder in NumPy, so most units are short.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda import needs_cuda
from interpreter import (
    Interpreted,
    both_ways,
    both_ways_in_short_units,
    decode,
    moments_of,
    needs_triton,
    ranks_in_shards,
    with_units_of,
)
from problems import DTYPES, gaussian, that_overflows

from rhtcomm import ECDQ, Codec, Key
from rhtcomm.kernels import choose, reference, use

pytestmark = [needs_triton, pytest.mark.usefixtures("_on_reference")]
KEY = Key(2**64 - 3, step=2**32 - 1, bucket=2**31 + 5, hop=3)
BITS = (1, 1.25, 1.75, 2, 2.5, 3, 4, 4.75, 5, 6)


@pytest.fixture
def _on_reference() -> Iterator[None]:
    with use(reference):
        yield


def check(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", range(len(BITS)), ids=lambda case: f"{BITS[case]} bits")
def test_same_bits_as_the_reference(interpreted: Interpreted, case: int) -> None:
    size, ranks = (64, 256, 1024)[case % 3], 1 + case % 3
    codec = Codec(ECDQ(BITS[case]), 1 + case // 3 % 3, size)
    xs = [(gaussian(1100, rank) / (1 + rank)).to(DTYPES[case % 3]) for rank in range(ranks)]
    if case % 2:
        xs[0][size : size + 2] = torch.inf
        xs[-1][:size] = 0
    arguments = (codec, xs, KEY, (0, 7, 2**20 + 3)[case % 3] * size, DTYPES[case // 3 % 3])
    check(interpreted(both_ways, *arguments), both_ways(*arguments))


def test_shards_have_units_of_their_own(interpreted: Interpreted) -> None:
    codec, xs = Codec(ECDQ(3), block=128), [gaussian(6 * 128, rank) for rank in range(2)]
    check(interpreted(ranks_in_shards, codec, xs, KEY), ranks_in_shards(codec, xs, KEY))


def test_units_of_several_blocks_and_those_that_do_not_fit(interpreted: Interpreted) -> None:
    """The second unit takes another factor; the third is short, and the last block a tail."""
    codec, numel, unit = Codec(ECDQ(1)), 5 * 4096 + 101, 2 * 4096
    x = gaussian(numel, 1)
    x[unit : 2 * unit] = that_overflows(1, 2 * unit, KEY)[unit:]
    expected = both_ways_in_short_units(codec, x, KEY)
    scales = expected[0][0, 16 : 16 + 4 * 5].view(torch.float32)
    steps = scales / x[: 5 * 4096].view(5, -1).square().mean(dim=1).sqrt()
    assert bool((steps[2:4] > 1.01 * steps[0]).all()), "it was meant not to fit"
    found = interpreted(both_ways_in_short_units, codec, x, KEY)
    check(found, expected)


def test_units_that_never_fit(interpreted: Interpreted) -> None:
    codec, x = Codec(ECDQ(2), block=256), gaussian(3 * 256 + 13)
    x[300] = torch.nan
    expected = with_units_of(132, codec, x, KEY)
    codes = codec.layout(len(x))[0].codes
    assert not expected[codes : codes + 132].any()
    assert torch.equal(interpreted(with_units_of, 132, codec, x, KEY), expected)


@pytest.mark.parametrize("octet", [None, 0, 255])
def test_any_bytes_decode(interpreted: Interpreted, octet: int | None) -> None:
    codec, numel = Codec(ECDQ(2.5), block=128), 1000
    random = torch.Generator().manual_seed(5)
    payloads = torch.stack([codec.encode(gaussian(numel, i), KEY, i, 2) for i in range(2)])
    for section in codec.layout(numel):
        codes = payloads[:, section.codes : section.stop]
        drawn = torch.randint(256, codes.shape, generator=random, dtype=torch.uint8)
        codes.copy_(drawn if octet is None else torch.full_like(drawn, octet))
    arguments = (codec, payloads, KEY, numel, 0, torch.float32)
    assert torch.equal(interpreted(decode, *arguments), decode(*arguments))


def test_moments_are_those_of_the_input(interpreted: Interpreted) -> None:
    codec, x = Codec(ECDQ(2), block=256), gaussian(4 * 256, 2)
    found = interpreted(moments_of, codec, x, KEY)
    assert torch.allclose(found, moments_of(codec, x, KEY), rtol=1e-6)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 4])
def test_same_bits_on_a_gpu(bits: int, dtype: torch.dtype) -> None:
    codec, numel = Codec(ECDQ(bits)), (3 << 16) + 4096 + 100
    xs = [gaussian(numel, rank).to(dtype) for rank in range(2)]
    xs[0][1 << 16 : 2 << 16] = that_overflows(bits, 2 << 16, KEY)[1 << 16 :].to(dtype)
    payloads = torch.stack([codec.encode(x, KEY, rank, 2) for rank, x in enumerate(xs)])
    mean = codec.decode_mean(payloads, KEY, numel, out=torch.empty_like(xs[0]))
    with use(choose("cuda", ECDQ)):
        for rank, x in enumerate(xs):
            assert torch.equal(codec.encode(x.cuda(), KEY, rank, 2).cpu(), payloads[rank])
        out = torch.empty(numel, dtype=dtype, device="cuda")
        codec.decode_mean(payloads.cuda(), KEY, numel, out=out)
    assert torch.equal(out.cpu(), mean)
