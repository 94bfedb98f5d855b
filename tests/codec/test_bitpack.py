"""Packing against a literal reading of its layout; every code value in every place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BITS, generator

from rhtcomm.bitpack import pack, unpack

SIZES = [8, 16, 24, 32, 40, 256, 1000, 4096]


def random_codes(rows: int, size: int, bits: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(0, 1 << bits, (rows, size), generator=generator(seed))
    return drawn.to(torch.uint8)


def literal_pack(codes: list[int], bits: int) -> list[int]:
    """One row, as the module's docstring words it."""
    packed, below = [], 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        fields = [(code >> below) % (1 << width) for code in codes]
        below += width
        stride = len(codes) * width // 8
        for i in range(stride):
            octet = 0
            for lane, field in enumerate(fields[i::stride]):
                octet += field << (lane * width)
            packed.append(octet)
    return packed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
def test_layout_round_trip_and_length(bits: int, size: int) -> None:
    codes = random_codes(3, size, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, size * bits // 8)
    assert packed.tolist() == [literal_pack(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits, size), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_value_survives_in_every_place(bits: int) -> None:
    size, values = 32, 1 << bits
    # Row p * values + c: code c at place p, among codes of all ones and among zeros.
    place = torch.arange(size).repeat_interleave(values)
    value = torch.arange(values, dtype=torch.uint8).repeat(size)
    for background in (0, values - 1):
        codes = torch.full((len(place), size), background, dtype=torch.uint8)
        codes[torch.arange(len(place)), place] = value
        assert torch.equal(unpack(pack(codes, bits), bits, size), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_payload_is_a_packing(bits: int) -> None:
    """No waste: all bytes can occur, and each comes back."""
    packed = random_codes(64, 32 * bits // 8, 8)
    assert torch.equal(pack(unpack(packed, bits, 32), bits), packed)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(bits=st.integers(1, 8), octets=st.integers(1, 64), rows=st.integers(0, 4))
def test_slices_of_a_payload_unpack(bits: int, octets: int, rows: int) -> None:
    """Receivers hand in views that are not contiguous."""
    size = 8 * octets
    codes = random_codes(rows, size, bits)
    packed = pack(codes, bits)
    surrounded = torch.full((rows, packed.shape[1] + 7), 255, dtype=torch.uint8)
    surrounded[:, 3:-4] = packed
    assert torch.equal(unpack(surrounded[:, 3:-4], bits, size), codes)
    assert torch.equal(pack(codes.t().contiguous().t(), bits), packed)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_raise(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits={bits} must lie in 1\.\.8"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=rf"bits={bits} must lie in 1\.\.8"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), bits, 8)
