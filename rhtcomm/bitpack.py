"""b-bit codes <-> bytes, with no waste at any width from 1 to 8.

A code is cut into fields of 8, 4, 2 or 1 bits, from its low end up, according to the binary digits
of b (7 = 4 + 2 + 1; 5 = 4 + 1). In a row of d codes the fields of one width f fill d f / 8 bytes:
byte i holds the fields of codes i, i + d f / 8, i + 2 d f / 8, ..., the first in its lowest bits.
So packing only shifts and ors long contiguous ranges, without shuffles, on any hardware.
"""

import torch

__all__ = ["pack", "unpack"]


def _fields(bits: int) -> list[tuple[int, int]]:
    """(width, shift of the field inside the code), widest first."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bitpack: bits={bits} must lie in 1..8")
    fields, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            fields.append((width, shift))
            shift += width
    return fields


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes (B, d) uint8, each below 2^bits, d a multiple of 8 -> (B, d bits / 8) uint8."""
    rows, size = codes.shape
    packed = []
    for width, shift in _fields(bits):
        lanes = 8 // width
        field = ((codes >> shift) & ((1 << width) - 1)).view(rows, lanes, size // lanes)
        octets = field[:, 0].clone()
        for lane in range(1, lanes):
            octets |= field[:, lane] << (lane * width)
        packed.append(octets)
    return torch.cat(packed, dim=1)


def unpack(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """packed (B, size bits / 8) uint8 -> codes (B, size) uint8, the inverse of `pack`."""
    rows = packed.shape[0]
    codes = torch.zeros(rows, size, dtype=torch.uint8, device=packed.device)
    offset = 0
    for width, shift in _fields(bits):
        lanes = 8 // width
        octets = packed[:, offset : offset + size // lanes]
        for lane, field in enumerate(codes.view(rows, lanes, size // lanes).unbind(1)):
            field |= ((octets >> (lane * width)) & ((1 << width) - 1)) << shift
        offset += size // lanes
    return codes
