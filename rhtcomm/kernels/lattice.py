"""The lattice's three steps, see rhtcomm/lattice.py, in plain torch, on any device.

The arithmetic is part of the specification, as in rhtcomm/kernels/reference.py, whose powers of two
it uses. A bound M is an int32 that grows with M: the exponent of M in the upper 9 bits, then the 23
bits of its mantissa. The greatest of several ranks' bounds, as integers, is that of the largest M.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch

from rhtcomm.floating_point import assign_, default_mode
from rhtcomm.kernels.reference import powers_of_two
from rhtcomm.lattice import Lattice
from rhtcomm.randomness import Key, dither
from rhtcomm.rotation import Blocks

__all__ = [
    "NOT_FINITE",
    "ZERO",
    "Batch",
    "LatticeKernel",
    "LatticeTask",
    "batches",
    "decode",
    "encode",
    "in_codes",
    "pack",
    "rotate",
    "unpack",
]

ZERO, NOT_FINITE = -(1 << 31), (1 << 31) - 1
"""Bounds of blocks of zeros, and of blocks that hold inf or NaN."""

_BATCH = {"cpu": 1 << 17}  # coordinates, see rhtcomm/kernels/reference.py
_LARGE_BATCH = 1 << 24


@dataclass(frozen=True, eq=False)
class LatticeTask:
    """Tensors of one length, whose means over n ranks are sums of codes.

    Made once per length, and equal only to itself, so that kernels can cache what they prepared for
    it.
    """

    lattice: Lattice
    numel: int
    world_size: int

    @cached_property
    def sections(self) -> tuple[Blocks, ...]:
        return self.lattice.blocks(self.numel)

    @cached_property
    def blocks(self) -> int:
        """B, blocks of all sections."""
        return sum(section.count for section in self.sections)

    @cached_property
    def padded(self) -> int:
        """Coordinates of all blocks."""
        return sum(section.count * section.size for section in self.sections)

    @cached_property
    def words(self) -> int:
        """int32 words of all blocks, one block after the other."""
        lattice, n = self.lattice, self.world_size
        return sum(section.count * lattice.words(section.size, n) for section in self.sections)


class LatticeKernel(Protocol):
    """Takes a rank's tensor to words of codes, and the sum of all ranks' words to their mean.

    `offset` is that of the tensor in its bucket, a multiple of the block.
    """

    def rotate(
        self,
        task: LatticeTask,
        key: Key,
        offset: int,
        x: torch.Tensor,
        y: torch.Tensor,
        exponents: torch.Tensor,
        bounds: torch.Tensor,
    ) -> None:
        """Rotate x.

        Args:
            x: (numel,), contiguous.
            y: (padded,) float32, output: d^(k/2) R x, each block in units of its power of two. May
                be x, if that is float32 and as long.
            exponents: (B,) int32, output: of these powers of two.
            bounds: (B,) int32, output: M of the blocks, see above.
        """

    def encode(
        self,
        task: LatticeTask,
        key: Key,
        offset: int,
        rank: int,
        y: torch.Tensor,
        exponents: torch.Tensor,
        bounds: torch.Tensor,
        words: torch.Tensor,
    ) -> None:
        """Write the codes of `rank`, given what `rotate` wrote and the bounds of all ranks.

        words: (words,) int32, output. Lane i of the j-th of a block's m words has the code of
        coordinate i m + j.
        """

    def decode(
        self,
        task: LatticeTask,
        key: Key,
        offset: int,
        words: torch.Tensor,
        bounds: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write the mean to out (numel,), contiguous, given the sum of all ranks' words."""


@default_mode(pool=True)
def rotate(
    task: LatticeTask,
    key: Key,
    offset: int,
    x: torch.Tensor,
    y: torch.Tensor,
    exponents: torch.Tensor,
    bounds: torch.Tensor,
) -> None:
    for blocks, rows, _ in batches(task, _limit(x)):
        values = blocks.rows(x[blocks.offset : blocks.stop].float())
        down, up, finite = powers_of_two(values)
        values = torch.where(finite[:, None], values * down[:, None], 0.0)
        rotated = task.lattice.rotation.rotate(values, key, offset + blocks.offset)
        y[blocks.offset : blocks.stop] = rotated.flatten()
        peak = rotated.abs().amax(dim=1).view(torch.int32)
        exponents[rows] = (up.view(torch.int32) >> 23) - 127
        bound = torch.where(peak > 0, peak + ((exponents[rows] - 127) << 23), ZERO)
        bounds[rows] = torch.where(finite, bound, NOT_FINITE)


@default_mode(pool=True)
def encode(
    task: LatticeTask,
    key: Key,
    offset: int,
    rank: int,
    y: torch.Tensor,
    exponents: torch.Tensor,
    bounds: torch.Tensor,
    words: torch.Tensor,
) -> None:
    lattice, stratum = task.lattice, 65536 * rank // task.world_size
    middle = (2**lattice.bits - 1) * 32768
    for blocks, rows, where in batches(task, _limit(y)):
        mantissa, exponent, usable = _split(bounds[rows])
        unit = _power_of_two((exponents[rows] - exponent).clamp(-126, 127))
        per_unit = torch.where(usable, torch.div(1.0, mantissa) * lattice.per_step * unit, 0.0)
        values = y[blocks.offset : blocks.stop].view(blocks.count, -1)
        z = (values * per_unit[:, None]).int()
        codes = (z + middle + ((_dither(key, offset, blocks, y.device) + stratum) & 0xFFFF)) >> 16
        words[where] = pack(codes, lattice, task.world_size).flatten()


@default_mode(pool=True)
def decode(
    task: LatticeTask,
    key: Key,
    offset: int,
    words: torch.Tensor,
    bounds: torch.Tensor,
    out: torch.Tensor,
) -> None:
    lattice, n = task.lattice, task.world_size
    half, rest, unit = in_codes(task)
    for blocks, rows, where in batches(task, _limit(out)):
        sums = unpack(words[where].view(blocks.count, -1), blocks.size, lattice, n) - half
        fraction = (n * _dither(key, offset, blocks, out.device).long()) & 0xFFFF
        values = (sums.int().float() * 65536 + (rest - fraction.float())) * unit
        values = lattice.rotation.unrotate(values, key, offset + blocks.offset)
        mantissa, exponent, _ = _split(bounds[rows])
        usual = exponent.clamp(-126, 127)
        factor = mantissa * blocks.size**-lattice.rotations * _power_of_two(exponent - usual)
        mean = values * factor[:, None] * _power_of_two(usual)[:, None]
        mean = torch.where((bounds[rows] == ZERO)[:, None], 0.0, mean)
        mean = torch.where((bounds[rows] == NOT_FINITE)[:, None], torch.nan, mean)
        target = out[blocks.offset : blocks.stop]
        assign_(target, mean.flatten()[: target.numel()])


def in_codes(task: LatticeTask) -> tuple[int, float, float]:
    """half, rest and unit: unit (2^16 (sum of codes - half) + rest - n v mod 2^16) is the mean / M.

    The sum of the ranks' v_i is n v mod 2^16 plus a constant. n v mod 2^16 is one of the multiples
    of gcd(n, 2^16), each with the same probability.
    """
    n, every = task.world_size, 2**task.lattice.bits - 1
    half, odd = divmod(n * every, 2)
    rest = (0 if odd else 32768) - min(n & -n, 65536) / 2
    return half, rest, float(np.float32(1) / (np.float32(n) * np.float32(task.lattice.per_step)))


def pack(codes: torch.Tensor, lattice: Lattice, world_size: int) -> torch.Tensor:
    """codes (B, d), sums of at most n codes -> words (B, m) int32."""
    width, m = lattice.lane_bits(world_size), lattice.words(codes.shape[1], world_size)
    lanes = 32 // width
    planes = torch.nn.functional.pad(codes, (0, lanes * m - codes.shape[1])).view(-1, lanes, m)
    shifts = width * torch.arange(lanes, device=codes.device)
    return (planes.long() << shifts[:, None]).sum(dim=1).to(torch.int32)


def unpack(words: torch.Tensor, size: int, lattice: Lattice, world_size: int) -> torch.Tensor:
    """words (B, m) int32 -> sums of codes (B, size) int64."""
    width = lattice.lane_bits(world_size)
    shifts = width * torch.arange(32 // width, device=words.device)
    planes = ((words.long() & 0xFFFFFFFF)[:, None] >> shifts[:, None]) & ((1 << width) - 1)
    return planes.flatten(1)[:, :size]


class Batch(NamedTuple):
    """Adjacent blocks of one size."""

    blocks: Blocks
    """By their offset in the tensor."""
    rows: slice
    """Their numbers, among all blocks."""
    words: slice
    """Where their words are."""


def batches(task: LatticeTask, limit: int) -> Iterator[Batch]:
    """All blocks, at most about `limit` coordinates at a time."""
    done = begin = 0
    for section in task.sections:
        size, m = section.size, task.lattice.words(section.size, task.world_size)
        step = max(1, limit // size)
        for row in range(0, section.count, step):
            count = min(step, section.count - row)
            blocks = Blocks(section.offset + row * size, count, size)
            yield Batch(blocks, slice(done, done + count), slice(begin, begin + count * m))
            done, begin = done + count, begin + count * m


def _limit(x: torch.Tensor) -> int:
    return _BATCH.get(x.device.type, _LARGE_BATCH)


def _split(bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mantissas in [1, 2) and exponents of bounds (B,), and which of these are those of M > 0."""
    mantissa = ((bounds & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    return mantissa, bounds >> 23, (bounds != ZERO) & (bounds != NOT_FINITE)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent of -126 .. 127, (B,) int32 -> (B,) float32."""
    return ((exponent + 127) << 23).view(torch.float32)


def _dither(key: Key, offset: int, blocks: Blocks, device: torch.device) -> torch.Tensor:
    """v (B, d) int32, in units of 2^-16."""
    count = blocks.count * blocks.size
    return dither(key, offset + blocks.offset, count, 0, device)[1].view(blocks.count, -1)
