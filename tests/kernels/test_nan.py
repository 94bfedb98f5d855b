"""Every kernel writes the canonical NaN of a dtype."""

import pytest
import torch
from harness import in_fresh_process
from interpreter import needs_triton
from libraries import needs_library, variants
from problems import CANONICAL_NAN, DTYPES

from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL, VectorQuantizer
from rhtcomm.floating_point import assign_
from rhtcomm.kernels import reference, use
from rhtcomm.quantizers import Quantizer

QUANTIZERS: list[Quantizer] = [
    *(QuicFL(4), QuicFL(3, 1 / 512), Eden(3), VectorQuantizer(2), ECDQ(1.5), ECDQ(4)),
]


INTEGERS = {4: torch.int32, 2: torch.int16}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assigning_makes_every_nan_the_canonical_one(dtype: torch.dtype) -> None:
    octets = [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -1, -0x7FFFFF]
    x = torch.tensor(octets * 20, dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([1.0, -2.0, torch.inf, -torch.inf, -0.0])])
    out = assign_(torch.empty(len(x), dtype=dtype), x)
    bits = out.view(INTEGERS[dtype.itemsize])[: 20 * len(octets)]
    assert bits.unique().tolist() == [CANONICAL_NAN[dtype]]
    assert torch.equal(out[-5:].float(), x[-5:])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_every_kernel_writes_the_canonical_nan(quantizer: Quantizer, dtype: torch.dtype) -> None:
    codec, key, numel = Codec(quantizer, 2, 256), Key(4), 3 * 256 + 40
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[5], x[-1] = torch.nan, -torch.inf
    for name, kernel in {**variants(), "reference": reference}.items():
        with use(kernel):
            payload = codec.encode(x, key)
            out = codec.decode_mean(payload[None], key, numel, out=torch.empty_like(x))
        assert payload[16:20].view(torch.int32).item() == CANONICAL_NAN[torch.float32], name
        bits = out.view(INTEGERS[dtype.itemsize])
        assert bits[out.isnan()].unique().tolist() == [CANONICAL_NAN[dtype]], name
        assert out.isnan().sum() == 256 + 40, name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nans_that_a_payload_brings_are_canonical(dtype: torch.dtype) -> None:
    """Exact coordinates of any bytes: their infinities make NaNs of the processor's own kind."""
    quantizer = QuicFL(2, 1 / 512)
    codec, key, block = Codec(quantizer, 2, 512), Key(5), 512
    payload = codec.encode(torch.ones(2 * block), key)
    rows = payload[16 + 8 :].view(2, -1)
    at = block * quantizer.bits // 8
    for row, halves in zip(rows, (0x7C00, 0xFC01), strict=True):  # infinity, a negative NaN
        row[at : at + 2] = torch.tensor([3, 0], dtype=torch.uint8)
        row[at + 2 * quantizer.exact_capacity(block) :][:2] = torch.tensor(
            [halves & 0xFF, halves >> 8], dtype=torch.uint8
        )
    for name, kernel in {**variants(), "reference": reference}.items():
        with use(kernel):
            out = codec.decode_mean(
                payload[None], key, 2 * block, out=torch.empty(2 * block, dtype=dtype)
            )
        bits = out.view(INTEGERS[dtype.itemsize])
        assert out.isnan().any(), name
        assert bits[out.isnan()].unique().tolist() == [CANONICAL_NAN[dtype]], name


INTERPRETED = """
import warnings
import torch
from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL
torch.set_num_threads(1)
warnings.simplefilter("ignore")  # the interpreter's, where zeros are divided by zero
for quantizer in (QuicFL(2, 1 / 512), Eden(2)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codec, key = Codec(quantizer, 1, 64), Key(0)
        x = torch.ones(100)
        x[3] = torch.nan
        payload = codec.encode(x, key)
        if isinstance(quantizer, QuicFL):  # an exact coordinate of the tail that is a negative NaN
            payload[-2:] = torch.tensor([1, 0xFC], dtype=torch.uint8)
            payload[-4:-2] = 0
        out = codec.decode_mean(payload[None], key, 100, out=torch.empty(100, dtype=dtype))
        bits = out.view({4: torch.int32, 2: torch.int16}[dtype.itemsize])
        print(hex(payload[16:20].view(torch.int32).item()), *bits[out.isnan()].unique().tolist())
"""


@needs_triton
def test_triton_writes_the_canonical_nan() -> None:
    lines = in_fresh_process(INTERPRETED, TRITON_INTERPRET="1", RHTCOMM_KERNELS="gpu")
    assert lines == [f"0x7fc00000 {nan}" for nan in CANONICAL_NAN.values()] * 2
