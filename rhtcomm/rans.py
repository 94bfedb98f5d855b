"""Range variant of asymmetric numeral systems (rANS; Duda, arXiv 1311.2540), 32 interleaved lanes.

A unit of S steps holds a symbol for each step and lane. A lane has a state x, 2^16 <= x < 2^32. A
symbol of frequency f, of 2^P, whose slots begin at `start`, is encoded by

    if x >= f 2^(32 - P): emit the low 16 bits of x, and drop them
    x <- (x // f) 2^P + x mod f + start

from the last step to the first, beginning with x = 2^16, and decoded by

    slot = x mod 2^P;  x <- f (x // 2^P) + slot - start, of the symbol that has the slot
    if x < 2^16: x <- 2^16 x + the next word

from the first step to the last. The words of all lanes form one sequence in reading order: by step,
then by lane. So neighbouring lanes read neighbouring words, on vectors and on warps.

    bytes
    4 LANES    states after the first symbol was encoded, uint32
    2 words    uint16
    the rest   zeros, which a decoder may read too

Any bytes can be decoded: states stay below 2^32, symbols stay in the table, and words beyond the
end are 0.
"""

from typing import NamedTuple

import torch

__all__ = ["LANES", "Lookup", "decode", "encode"]

LANES = 32
LEAST = 1 << 16


def encode(
    frequency: torch.Tensor, start: torch.Tensor, precision: int, nbytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode units into `nbytes` bytes each.

    Args:
        frequency, start: of the symbols, (S, U, LANES) int64.
        precision: P.
        nbytes: of a unit, at least 4 LANES, even.

    Returns:
        (U, nbytes) uint8, and (U,) bool: whether each unit fits; the bytes of units that do not fit
        are
        meaningless.
    """
    steps, units, _ = frequency.shape
    words = torch.empty(steps, units, LANES, dtype=torch.int64, device=frequency.device)
    emitted = torch.empty(steps, units, LANES, dtype=torch.bool, device=frequency.device)
    limit = frequency << (32 - precision)
    x = torch.full((units, LANES), LEAST, dtype=torch.int64, device=frequency.device)
    for step in range(steps - 1, -1, -1):
        f = frequency[step]
        emits = torch.ge(x, limit[step], out=emitted[step])
        torch.bitwise_and(x, 0xFFFF, out=words[step])
        x = torch.where(emits, x >> 16, x)
        quotient = x // f
        x = (quotient << precision) + (x - quotient * f) + start[step]
    emitted, words = (each.transpose(0, 1).flatten(1) for each in (emitted, words))
    room = nbytes // 2 - 2 * LANES
    place = emitted.cumsum(1)
    fits = place[:, -1] <= room
    # Words that are not emitted, or do not fit, go to an extra last word, which is cut off.
    place = torch.where(emitted & (place <= room), place - 1, room)
    body = torch.zeros(units, room + 1, dtype=torch.int64, device=x.device)
    body = body.scatter_(1, place, words)[:, :room]
    octets = torch.cat([_octets(x, 4), _octets(body, 2)], dim=1)
    return octets, fits


class Lookup(NamedTuple):
    """The symbol of each slot: (C 2^P,) int64, class after class."""

    symbol: torch.Tensor
    frequency: torch.Tensor
    bias: torch.Tensor
    """For each slot, slot - start of its symbol."""


def decode(
    octets: torch.Tensor, base: torch.Tensor, lookup: Lookup, precision: int
) -> torch.Tensor:
    """Decode the symbols of units; any bytes are valid.

    Args:
        octets: (U, at least 4 LANES) uint8.
        base: where in the lookup the slots of a symbol's class begin, (S, U, LANES) int64.
        precision: P.

    Returns:
        (S, U, LANES) int64.
    """
    x = _integers(octets[:, : 4 * LANES], 4)
    words = torch.nn.functional.pad(_integers(octets[:, 4 * LANES :], 2), (0, 1))
    last = words.shape[1] - 1  # the zero
    symbols = torch.empty_like(base)
    read = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=octets.device)
    mask = (1 << precision) - 1
    for step in range(base.shape[0]):
        slot = (x & mask) + base[step]
        symbols[step] = lookup.symbol[slot]
        x = lookup.frequency[slot] * (x >> precision) + lookup.bias[slot]
        needs = x < LEAST
        order = needs.cumsum(1) + read
        word = words.gather(1, (order - 1).clamp(0, last))
        x = torch.where(needs, (x << 16) | word, x)
        read = order[:, -1:]
    return symbols


def _octets(x: torch.Tensor, width: int) -> torch.Tensor:
    """(U, n) int64 -> (U, n width) uint8, little-endian."""
    return x.contiguous().view(torch.uint8).view(*x.shape, 8)[..., :width].flatten(1)


def _integers(octets: torch.Tensor, width: int) -> torch.Tensor:
    """(U, n width) uint8 -> (U, n) int64, the inverse of `_octets`."""
    octets = octets.unflatten(1, (-1, width)).long()
    return (octets << (8 * torch.arange(width, device=octets.device))).sum(2)
