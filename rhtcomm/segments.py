"""Parameters of a bucket, and their rows, whose gradients are zero on all ranks.

The gradient of a layer that no rank used is zero, and so is its mean. The same holds for rows of an
embedding whose symbols occurred on no rank. But a block holds coordinates of several rows and
parameters, so decoding would add noise to these zeros. Adam makes full steps of noise, however
small, and would destroy what was learned of rare symbols. So ranks send one bit per segment (a
parameter or a row): whether it has a nonzero coordinate. Segments that are zero on all ranks are
set to zero after decoding.

A value is zero if all its bits except the sign are zero: -0.0 is zero; NaN and subnormal numbers
are not.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rhtcomm.memory import bytes_of

__all__ = ["Segments", "merge_", "pack", "rows_of", "unpack"]

_ROW = 64  # least coordinates of a row that is a segment


class _Part(NamedTuple):
    """`rows` adjacent segments of one length."""

    offset: int
    """Offset of the first segment in the tensor."""
    rows: int
    length: int
    """Length of each segment."""
    first: int
    """Index of the first segment."""

    def of(self, x: Any) -> Any:
        """Its coordinates of x (numel,), as a view (rows, length)."""
        run = x[self.offset : self.offset + self.rows * self.length]
        return run.reshape(self.rows, self.length)

    def flags(self, used: Any) -> Any:
        """Its entries of `used`, an array with an entry per segment, as a view (rows,)."""
        return used[self.first : self.first + self.rows]


class Segments:
    """Consecutive runs that make up a flat tensor; empty ones are left out.

    Args:
        lengths: of the tensors that were flattened; None: a single tensor.
        numel: of the flat tensor.
        rows: number of segments, of equal length, in each of those tensors; None: one.

    Raises:
        TypeError: a length is not an integer.
        ValueError: a length is negative, or their sum is not numel.
    """

    def __init__(
        self, lengths: Sequence[int] | None, numel: int, rows: Sequence[int] | None = None
    ) -> None:
        try:
            runs = [numel] if lengths is None else list(map(operator.index, lengths))
        except TypeError:
            raise TypeError(
                f"rhtcomm.all_reduce: segments={lengths!r:.80} must hold the length of each "
                "segment of the tensor, as integers"
            ) from None
        if sum(runs) != numel or min(runs, default=0) < 0:
            raise ValueError(
                f"rhtcomm.all_reduce: segments has {len(runs)} lengths with minimum "
                f"{min(runs, default=0)} and sum {sum(runs)}, but the tensor has {numel} "
                "coordinates; pass the length of each segment, in order"
            )
        self.given = tuple(runs)
        self._parts: list[_Part] = []
        offset = first = 0
        for length, count in zip(runs, rows or [1] * len(runs), strict=True):
            if length:
                self._parts.append(_Part(offset, count, length // count, first))
                offset, first = offset + length, first + count
        self._count = first
        offsets = [part.offset + part.length * np.arange(part.rows) for part in self._parts]
        self._offsets = np.concatenate([np.empty(0, np.int64), *offsets])

    def __len__(self) -> int:
        return self._count

    @property
    def lengths(self) -> list[int]:
        """Number of all segments."""
        return [part.length for part in self._parts for _ in range(part.rows)]

    def used(self, x: torch.Tensor) -> torch.Tensor:
        """Which segments of contiguous x (numel,) have a nonzero coordinate.

        Returns:
            (4 ceil(n / 32),) uint8 on the device of x, bit i % 8 of byte i // 8 for segment i.
        """
        if x.device.type == "cpu":
            return self._used_on_cpu(x)
        return self._used_on_device(x)

    def all_used(self, used: torch.Tensor) -> bool:
        """Whether all segments are used; on the CPU."""
        return bool(self._flags(used).all())

    def unused(self, used: torch.Tensor, offset: int, length: int) -> torch.Tensor:
        """Which of the coordinates from `offset` on lie in unused segments, (length,) bool; on the
        CPU."""
        flags, mask = self._flags(used), np.zeros(length, np.bool_)
        for part in self._parts:
            # What the part has of the range, counted in coordinates from the part's beginning.
            start = max(0, offset - part.offset)
            stop = min(part.rows * part.length, offset + length - part.offset)
            if start >= stop:
                continue
            first, last = start // part.length, (stop - 1) // part.length
            counts = np.full(last - first + 1, part.length)
            counts[0] -= start - first * part.length
            counts[-1] -= (last + 1) * part.length - stop
            begin = part.offset + start - offset
            unused = part.flags(flags)[first : last + 1] == 0
            mask[begin : begin + stop - start] = np.repeat(unused, counts)
        return torch.from_numpy(mask)

    def restore_(
        self, x: torch.Tensor, used: torch.Tensor, value: torch.Tensor | None = None
    ) -> None:
        """Set the unused segments of contiguous x (numel,) to zero, or to those of `value`."""
        if x.device.type == "cpu":
            self._restore_on_cpu_(x, used, value)
        else:
            self._restore_on_device_(x, used, value)

    def clear_zeros_(self, x: torch.Tensor) -> None:
        """If x is a single segment of zeros, set it to 0.0: codecs may decode zeros to -0.0."""
        if x.device.type != "cpu" or not x[0].item():
            self.restore_(x, self.used(x))

    def _flags(self, used: torch.Tensor) -> npt.NDArray[np.uint8]:
        return np.unpackbits(used.numpy(), count=len(self), bitorder="little")

    def _used_on_cpu(self, x: torch.Tensor) -> torch.Tensor:
        bits = _integers(x)
        magnitude = np.iinfo(bits.dtype).max  # all bits except the sign
        # The first coordinate of a nonzero gradient is rarely zero.
        used = bits[self._offsets] & magnitude != 0
        for part in self._parts if not used.all() else ():
            flags = part.flags(used)
            unclear = np.flatnonzero(~flags)
            if len(unclear):
                flags[unclear] = _any(part.of(bits), unclear, magnitude)
        octets = np.zeros(_nbytes(len(used)), np.uint8)
        octets[: -(-len(used) // 8)] = np.packbits(used, bitorder="little")
        return torch.from_numpy(octets)

    def _restore_on_cpu_(
        self, x: torch.Tensor, used: torch.Tensor, value: torch.Tensor | None
    ) -> None:
        flags = self._flags(used)
        if flags.all():
            return
        bits = _integers(x)
        values = None if value is None else _integers(value)
        for part in self._parts:
            unused = np.flatnonzero(part.flags(flags) == 0)
            if len(unused):
                part.of(bits)[unused] = 0 if values is None else part.of(values)[unused]

    # On a device all numbers are read, since looking at one would block the host.

    def _used_on_device(self, x: torch.Tensor) -> torch.Tensor:
        whole = [part.of(x).view(-1) for part in self._parts if part.rows == 1]
        norms = iter(torch._foreach_norm(whole, math.inf) if whole else ())
        largest = [
            next(norms).view(1)
            if part.rows == 1
            else torch.linalg.vector_norm(part.of(x), math.inf, dim=1)
            for part in self._parts
        ]
        used = torch.cat(largest) != 0  # NaN is not
        return pack(torch.nn.functional.pad(used, (0, 8 * _nbytes(len(self)) - len(self))))

    def _restore_on_device_(
        self, x: torch.Tensor, used: torch.Tensor, value: torch.Tensor | None
    ) -> None:
        mask = unpack(used)[: len(self)] == 0
        if len(self) > 1:
            starts = torch.from_numpy(self._offsets)
            if x.device.type == "cuda":  # a copy from pageable memory blocks the host
                starts = starts.pin_memory()
            # The cumulative sum is 1 at coordinates of unused segments, otherwise 0.
            steps = torch.diff(
                mask.to(torch.int8), prepend=torch.zeros_like(mask[:1], dtype=torch.int8)
            )
            mask = torch.zeros(x.numel(), dtype=torch.int8, device=x.device)
            mask.scatter_(0, starts.to(x.device, non_blocking=True), steps)
            mask = mask.cumsum_(0).view(torch.bool)  # no second one
        if value is None:
            x.masked_fill_(mask, 0)
        else:
            torch.where(mask, value, x, out=x)


def rows_of(shape: Sequence[int], length: int) -> int:
    """The number of segments of a tensor of `length` coordinates: its rows, unless these are short.

    With `_ROW` coordinates per row, the bits take 0.8% of a payload with 2 bits per coordinate, and
    computing them takes about 2% of the codec's time.
    """
    rows = shape[0] if len(shape) > 1 else 1
    return rows if length >= _ROW * rows > 0 else 1


def merge_(used: torch.Tensor, rows: torch.Tensor) -> None:
    """used (m,) <- bitwise or of the rows (n, m), uint8."""
    if used.is_cpu:  # torch would need a call for each row
        np.bitwise_or.reduce(rows.numpy(), axis=0, out=used.numpy())
    elif used.numel():
        used.copy_(rows[0])
        for row in rows[1:]:
            used |= row


def pack(flags: torch.Tensor) -> torch.Tensor:
    """(8 m,) bool -> (m,) uint8, the first one lowest."""
    lanes = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags.view(-1, 8).to(torch.uint8) << lanes).sum(dim=1, dtype=torch.uint8)


def unpack(octets: torch.Tensor) -> torch.Tensor:
    """(m,) uint8 -> (8 m,) uint8 of 0 and 1, the inverse of `pack`."""
    lanes = torch.arange(8, dtype=torch.uint8, device=octets.device)
    return ((octets[:, None] >> lanes) & 1).view(-1)


def _nbytes(count: int) -> int:
    return 4 * -(-count // 32)  # keeps rows of payloads aligned


def _integers(x: torch.Tensor) -> npt.NDArray[np.signedinteger]:
    """The bits of contiguous x: NumPy lacks bfloat16, and comparisons of floats may flush
    subnormals."""
    return bytes_of(x).view(np.int32 if x.element_size() == 4 else np.int16)


def _any(
    bits: npt.NDArray[np.signedinteger], rows: npt.NDArray[np.int64], mask: int
) -> npt.NDArray[np.bool_]:
    """Whether any number in these rows of (count, length) has a bit of the mask.

    Each pass looks further into the rows.
    """
    found = np.zeros(len(bits), np.bool_)
    left, start, size = rows, 0, 64
    while len(left) and start < bits.shape[1]:
        ahead = bits[:, start : start + size]
        if 4 * len(left) > len(bits):  # checking all is faster than copying the remaining rows
            hit = np.bitwise_or.reduce(ahead, axis=1)[left] & mask != 0
        else:
            hit = np.bitwise_or.reduce(ahead[left], axis=1) & mask != 0
        found[left[hit]] = True
        left, start, size = left[~hit], start + size, 16 * size
    return found[rows]
