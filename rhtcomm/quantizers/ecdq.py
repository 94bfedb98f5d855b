"""ECDQ: entropy-coded dithered quantization (Ziv, 1985; Zamir and Feder, 1992) at a fixed length.

With the step D of a grid and the dither v, uniform on [0, 1), that sender and receivers share, a
rotated coordinate z, in units of its block's root mean square, is sent as

    k = floor(z / D + v),    z' = D (k - v + 1/2).

z' - z is uniform on [-D/2, D/2) and independent of z, so z' is unbiased with error D^2 / 12 for
every z, whatever the rotation did. The rotation only makes z Gaussian, so that static tables code k
in few bits (`rhtcomm/codebooks/ecdq.py`); one rotation suffices for that.

A unit is a run of blocks of 2^16 coordinates, coded together by `rhtcomm.rans`. |z|^2 = d, and the
length of a coordinate's code is nearly a constant plus a multiple of z^2, so the length of a unit
hardly varies: each has a fixed number of bytes, and D is as fine as these allow. Two rules make all
inputs fit. The scale of a block is at least its largest |y| over K D, so that k is one of -K .. K;
that depends only on y and leaves no bias. And a unit that still does not fit is coded again with
its scales multiplied by the next of `FACTORS`. The choice of the factor depends on the dither and
leaves a bias, which docs/ecdq.md bounds.

Rank i of n uses v + i/n modulo one: each rank's dither stays uniform, and errors of ranks with
similar gradients cancel.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from rhtcomm import codebooks, rans
from rhtcomm.floating_point import default_mode
from rhtcomm.once import once
from rhtcomm.quantizers.base import fingerprint_of, root_mean_square, tensor_of
from rhtcomm.randomness import Key, dither, stratum
from rhtcomm.rotation import Blocks

__all__ = ["BITS", "ECDQ", "FACTORS", "UNIT"]

BITS = tuple(quarters / 4 for quarters in range(4, 25))
UNIT = 1 << 16
"""Least number of coordinates in a unit; a longer block is a unit of its own."""
FACTORS = (1.0, 65 / 64, 17 / 16, 5 / 4, 2.0, 16.0)


@dataclass(frozen=True)
class ECDQ:
    """Unbiased for every input with one rotation, and half of QUIC-FL's error at 4 bits.

    A coordinate z, in units of its block's root mean square, is sent as the integer k,

        k = floor(z / D + v),    z' = D (k - v + 1/2),    E[z'] = z,    E[(z' - z)^2] = D^2 / 12,

    with the dither v, uniform on [0, 1), that sender and receivers share. An entropy coder packs
    the k of 2^16 coordinates into a fixed number of bytes; the step D is as fine as these allow.
    See docs/ecdq.md.

    Args:
        bits: of the payload per coordinate, 1, 1.25, 1.5, ..., 6. For blocks of 4096 and units of
            2^16 coordinates this counts all bytes except the header.

    Raises:
        ValueError: bits is not one of these.
    """

    bits: float = 4

    rotation: ClassVar[Literal["shared", "per_rank"]] = "shared"
    rotations: ClassVar[int] = 1
    group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        number = isinstance(self.bits, (int, float)) and not isinstance(self.bits, bool)
        if not number or self.bits not in BITS:
            raise ValueError(
                f"ECDQ: bits={self.bits!r} must be one of 1, 1.25, 1.5, ..., 6 (an int or a float)"
            )
        # 4 and 4.0 become the same, since fingerprints hash the text.
        whole = self.bits % 1 == 0
        object.__setattr__(self, "bits", int(self.bits) if whole else float(self.bits))

    def unit(self, size: int) -> int:
        return max(1, UNIT // size)

    def nbytes(self, count: int, size: int) -> int:
        whole, rest = divmod(count, self.unit(size))
        return whole * self.unit_bytes(self.unit(size) * size) + self.unit_bytes(rest * size)

    def unit_bytes(self, numel: int) -> int:
        """Length of the codes of a unit of `numel` coordinates, a multiple of 4.

        The lanes' states, plus the mean length of `numel` codes and two standard deviations of
        their sum.
        """
        if not numel:
            return 0
        table = self.table
        codes = ((table.rate * numel) >> 16) + ((table.spread * math.isqrt(numel)) >> 8)
        return 4 * rans.LANES + 4 * -(-codes // 32)

    def compress(
        self, y: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        table, size = self.table, y.shape[1]
        scale = torch.maximum(root_mean_square(y), y.abs().amax(dim=1) * table.inverse_bound)
        _, v = dither(key, offset, y.numel(), stratum(rank, world_size), y.device)
        octets = []
        for rows, each in self.units(y.shape[0], size):
            units = (y[rows].view(-1, each, size), v.view(y.shape)[rows].view(-1, each * size))
            found, scale[rows] = self._encode_units(*units, scale[rows].view(-1, each))
            octets.append(found.flatten())
        return torch.cat(octets), scale * table.quarter_step

    def expand(
        self, octets: torch.Tensor, blocks: Blocks, key: Key, rank: int, world_size: int
    ) -> torch.Tensor:
        table, count, size = self.table, blocks.count, blocks.size
        _, v = dither(key, blocks.offset, count * size, stratum(rank, world_size), octets.device)
        values, begin = [], 0
        for rows, each in self.units(count, size):
            octet_rows = self.unit_bytes(each * size)
            end = begin + (rows.stop - rows.start) // each * octet_rows
            shared = _steps(v.view(count, size)[rows].view(-1, each * size).long())
            symbols = rans.decode(
                octets[begin:end].view(-1, octet_rows),
                table.class_of(shared) << table.precision,
                table.lookup(octets.device),
                table.precision,
            )
            grid = 512 * (symbols - table.largest) - 2 * (shared >> 8) + 255
            values.append(grid.transpose(0, 1).reshape(-1, size))
            begin = end
        return torch.cat(values).float() * 2.0**-7

    def units(self, count: int, size: int) -> Iterator[tuple[slice, int]]:
        """The runs of `count` blocks with units of equal length, and the blocks per unit."""
        each = self.unit(size)
        whole = count // each * each
        if whole:
            yield slice(0, whole), each
        if whole < count:
            yield slice(whole, count), count - whole

    def _encode_units(
        self, y: torch.Tensor, v: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y (U, m, d), v (U, m d), scale (U, m) -> octets (U, n), scale (U m,)."""
        units, nbytes = y.shape[0], self.unit_bytes(v.shape[1])
        octets = torch.zeros(units, nbytes, dtype=torch.uint8, device=y.device)
        taken = torch.zeros_like(scale)  # stays zero if no factor suffices
        left = torch.arange(units, device=y.device)
        for factor in FACTORS:
            coarser = scale[left] * factor
            found, fits = self._attempt(y[left], v[left], coarser, nbytes)
            octets[left[fits]], taken[left[fits]] = found[fits], coarser[fits]
            left = left[~fits]
            if not len(left):
                break
        return octets, taken.flatten()

    def _attempt(
        self, y: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, nbytes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.table
        grid = torch.where(scale > 0, scale.reciprocal() * table.per_step, 0.0)
        k = ((y * grid[:, :, None]).int().flatten(1) + v) >> 16
        symbols, shared = _steps(k.long() + table.largest), _steps(v.long())
        column = table.class_of(shared) * (2 * table.largest + 1) + symbols
        frequency = tensor_of(table.frequencies, y.device).flatten()[column]
        start = tensor_of(table.starts, y.device).flatten()[column]
        return rans.encode(frequency, start, table.precision, nbytes)

    @property
    def vnmse(self) -> float:
        """D^2 / 12, the expected |x' - x|^2 / |x|^2 for every input."""
        return (self.table.step / 2**16) ** 2 / 12

    @property
    def fingerprint(self) -> str:
        table = self.table
        numbers = [table.step, table.rate, table.spread, *table.frequencies.flatten()]
        return fingerprint_of(np.array(numbers, np.float32))

    @property
    def table(self) -> "Table":
        return _table(self.bits)


def _steps(x: torch.Tensor) -> torch.Tensor:
    """(U, n) -> (steps, U, lanes): coordinate j of a unit belongs to step j // 32, lane j % 32."""
    return x.view(len(x), -1, rans.LANES).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Table:
    """The integers of `rhtcomm.codebooks.ecdq.Table`, and tables derived from them.

    Args:
        frequencies: (C, 2 K + 1) int64, row c for v in [c / C, (c + 1) / C), column k + K for k.
        starts: (C, 2 K + 1) int64, the first slot of each.
        slots: (C 2^P,) uint32, for each slot 2^24 times its symbol's column, plus 2^12 times the
            frequency, plus the slot's index among those of the symbol.
        entries: (C (2 K + 1), 2) uint32, for each symbol the frequency f, plus 2^13 times the first
            slot, plus 2^26 s, 2^s >= f; and m = ceil(2^(31 + s) / f). They are for the C kernels,
            where x // f = (x m) >> (31 + s) for all x < 2^(32 - P) f.
        registers: the contents of `Registers` of kernels/native/rans_registers.h, (640,) uint16;
            None if there are too many symbols.
        step: 2^16 D.
        rate: bits of 2^16 coordinates without the spread.
        spread: bits in addition, for 2^16 coordinates.
    """

    frequencies: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    slots: npt.NDArray[np.uint32]
    entries: npt.NDArray[np.uint32]
    registers: npt.NDArray[np.uint16] | None
    step: int
    rate: int
    spread: int

    @property
    def classes(self) -> int:
        return len(self.frequencies)

    @property
    def class_bits(self) -> int:
        """log2 C."""
        return self.classes.bit_length() - 1

    @property
    def precision(self) -> int:
        """P."""
        return int(self.frequencies[0].sum()).bit_length() - 1

    @property
    def largest(self) -> int:
        """K."""
        return int(self.frequencies.shape[1]) // 2

    @property
    def per_step(self) -> float:
        """2^16 / D."""
        return 2.0**32 / self.step

    @property
    def quarter_step(self) -> float:
        """D / 4; D itself may exceed one, and the scale of the largest blocks would overflow."""
        return self.step * 2.0**-18

    @property
    def inverse_bound(self) -> float:
        # Slightly above 1 / (K D), so that rounding cannot move a coordinate past K.
        return (1 + 2**-20) * 2**16 / (self.largest * self.step)

    def class_of(self, v: torch.Tensor) -> torch.Tensor:
        """Of a dither, 16-bit integers."""
        return (v * self.classes) >> 16

    def lookup(self, device: torch.device) -> rans.Lookup:
        slots = tensor_of(self.slots.astype(np.int64), device)
        return rans.Lookup(slots >> 24, (slots >> 12) & 0xFFF, slots & 0xFFF)


@once
@default_mode()
def _table(bits: float) -> Table:
    arrays = codebooks.load("ecdq")
    frequencies = arrays[f"b{bits:g}"].astype(np.int64)
    starts = frequencies.cumsum(axis=1) - frequencies
    columns = np.broadcast_to(np.arange(frequencies.shape[1]), frequencies.shape).flatten()
    f, start = frequencies.flatten(), starts.flatten()
    place = np.concatenate([np.arange(count) for count in f])
    shift = np.array([(int(count) - 1).bit_length() for count in f])
    inverse = -(-(1 << (31 + shift)) // f)
    step, rate, spread = (int(number) for number in arrays[f"b{bits:g}/unit"])
    return Table(
        frequencies=frequencies,
        starts=starts,
        slots=(np.repeat((columns << 24) + (f << 12), f) + place).astype(np.uint32),
        entries=np.stack([f + (start << 13) + (shift << 26), inverse], 1).astype(np.uint32),
        registers=_registers(frequencies),
        step=step,
        rate=rate,
        spread=spread,
    )


def _registers(frequencies: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16] | None:
    """(640,) uint16, or None if C 2^depth > 128, for the least depth with 2^depth >= 2 K + 1.

    Tables of a bisection: the j-th of 2^i parts of class c's symbols has index 2^i c + j.
    """
    classes, columns = frequencies.shape
    depth = (columns - 1).bit_length()
    if classes << depth > 128:
        return None
    # For each class: 2^depth symbols, those at the end without slots, and the end of the last one.
    starts = np.full((classes, (1 << depth) + 1), frequencies[0].sum())
    starts[:, :columns] = frequencies.cumsum(axis=1) - frequencies
    thresholds = np.zeros((6, 32), np.uint16)
    for i in range(depth - 1):
        part = 1 << (depth - i)
        thresholds[i, : classes << i] = (starts[:, part // 2 : -1 : part] - 1).flatten()
    pairs = np.zeros((3, 64), np.uint16)  # two symbols remain
    for row, of in enumerate((starts[:, :-1:2], starts[:, 1::2], starts[:, 2::2])):
        pairs[row, : of.size] = of.flatten()
    encoded = np.zeros((2, 128), np.uint16)
    encoded[:, : frequencies.size] = frequencies.flatten(), starts[:, :columns].flatten()
    return np.concatenate([thresholds.flatten(), pairs.flatten(), encoded.flatten()])
