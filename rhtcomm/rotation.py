"""Randomized Hadamard transforms of independent blocks.

A block x in R^d, d a power of two, becomes R_k x = (H D_k) ... (H D_1) x with the orthonormal
Sylvester-Hadamard matrix H, H[i, j] = d^(-1/2) (-1)^popcount(i & j), and diagonal matrices D_i of
random signs. After k = 2 each coordinate of sqrt(d) R x / |x| is within O(d^(-1/2)) of N(0, 1) for
any x; k = 3 also makes the covariance of any two coordinates vanish (arXiv 2605.06014).

The arithmetic is part of the contract, since all ranks must end with the same bits whatever kernel
they run: butterflies are float32 additions and subtractions in ascending stride order.
"""

from dataclasses import dataclass

import numpy as np
import torch

from rhtcomm.floating_point import default_mode
from rhtcomm.memory import memory_of
from rhtcomm.randomness import Key, Stream, check_key, signs

__all__ = ["Blocks", "RandomizedHadamard", "choose_rotations", "split_into_blocks"]

_BLOCKS = [1 << power for power in range(5, 25)]
MIN_TAIL = 256


@dataclass(frozen=True)
class Blocks:
    """`count` adjacent blocks of `size` coordinates, the first beginning at coordinate `start`."""

    start: int
    count: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.size

    def shifted(self, by: int) -> "Blocks":
        return Blocks(self.start + by, self.count, self.size)

    def split(self, count: int) -> list["Blocks"]:
        """Equal runs of them, one behind the other."""
        each = self.count // count
        return [Blocks(self.start + i * each * self.size, each, self.size) for i in range(count)]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The coordinates of these blocks, x (at most B d,) -> (B, d), zeros after them."""
        x = torch.nn.functional.pad(x, (0, self.count * self.size - x.numel()))
        return x.view(self.count, self.size)


def split_into_blocks(numel: int, block: int) -> tuple[Blocks, ...]:
    """Cover `numel` coordinates by full blocks and, where some are left, one block for the tail.

    The tail block is the smallest power of two that holds the rest (at least 256, below which the
    rotated coordinates are too far from Gaussian, or `block` if that is smaller), padded by zeros.
    It pads fewer than max(block / 2, 256) coordinates.
    """
    count, rest = divmod(numel, block)
    full = (Blocks(0, count, block),) if count else ()
    if not rest:
        return full
    size = min(block, max(MIN_TAIL, 1 << (rest - 1).bit_length()))
    return (*full, Blocks(count * block, 1, size))


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Unnormalized Walsh-Hadamard transform of each row: x (B, d) float32 -> (B, d).

    d^(1/2) H x by butterflies (a, b) -> (a + b, a - b) of stride 1, 2, 4, ..., d / 2.
    """
    blocks, size = x.shape
    # Strides below 64 would make torch walk the memory in tiny steps, so they run on a transpose.
    low = min(size, 64)
    columns = x.reshape(-1, low).t().clone(memory_format=torch.contiguous_format)
    columns = _butterflies(columns, 1, low).view(low, -1)
    x = columns.t().clone(memory_format=torch.contiguous_format)
    return _butterflies(x.view(blocks, size // low, low), blocks, size // low).view(blocks, size)


def _butterflies(x: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Butterflies along the middle axis of x, seen as (batch, length, rest); overwrites x."""
    spare = torch.empty_like(x)
    stride = 1
    while stride < length:
        pairs = x.view(batch, length // (2 * stride), 2, -1)
        out = spare.view(pairs.shape)
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])
        x, spare = spare, x
        stride *= 2
    return x


@dataclass(frozen=True)
class RandomizedHadamard:
    """R_k = (H D_k) ... (H D_1) on independent blocks of a flat tensor.

    Args:
        rotations: k, 1 to 3.
        block: d, a power of two from 32 to 2^24.

    Raises:
        ValueError: an argument is out of its range.
    """

    rotations: int = 2
    block: int = 4096

    def __post_init__(self) -> None:
        if type(self.rotations) is not int or not 1 <= self.rotations <= 3:  # True is an int too
            raise ValueError(
                f"RandomizedHadamard: rotations={self.rotations!r} must be 1, 2 or 3 (an int)"
            )
        if type(self.block) is not int or self.block not in _BLOCKS:
            raise ValueError(
                f"RandomizedHadamard: block={self.block!r} must be a power of two from 32 to 2^24 "
                "(an int)"
            )

    @default_mode(pool=True)
    def forward(self, x: torch.Tensor, key: Key, rank: int = 0) -> torch.Tensor:
        """R x: (numel,) floating -> (padded numel,) float32, |R x| = |x|.

        Raises:
            TypeError: x is no tensor, has no memory of its own or is not floating; or the key is
                no `Key`.
        """
        x = _floating(x, "RandomizedHadamard.forward", "x")
        check_key(key, "RandomizedHadamard.forward")
        y = []
        for part in split_into_blocks(x.numel(), self.block):
            rows = part.rows(x[part.start : part.stop].float())
            y.append(self.rotate(rows, key, part.start, rank) * part.size ** (-self.rotations / 2))
        return torch.cat([rows.flatten() for rows in y]) if y else x.float()

    @default_mode(pool=True)
    def inverse(self, y: torch.Tensor, key: Key, numel: int, rank: int = 0) -> torch.Tensor:
        """The x of `forward`: (padded numel,) float32 -> (numel,) float32.

        Raises:
            TypeError: as `forward` does.
        """
        y = _floating(y, "RandomizedHadamard.inverse", "y")
        check_key(key, "RandomizedHadamard.inverse")
        x = []
        for part in split_into_blocks(numel, self.block):
            rows = y[part.start : part.stop].view(part.count, part.size)
            rows = rows * part.size ** (-self.rotations / 2)
            x.append(self.unrotate(rows, key, part.start, rank))
        return torch.cat([rows.flatten() for rows in x])[:numel] if x else y.float()

    def rotate(self, x: torch.Tensor, key: Key, first: int, rank: int = 0) -> torch.Tensor:
        """d^(k/2) R x of whole blocks, no normalization: x (B, d) float32 -> (B, d).

        `first` is the place of x[0, 0] in its bucket, a multiple of 8: it selects the signs.
        """
        for stream in self._streams():
            x = hadamard(x * self._signs(x, stream, key, first, rank))
        return x

    def unrotate(self, y: torch.Tensor, key: Key, first: int, rank: int = 0) -> torch.Tensor:
        """d^(k/2) R^T y of whole blocks, so that unrotate(rotate(x)) = d^k x."""
        for stream in reversed(self._streams()):
            y = hadamard(y) * self._signs(y, stream, key, first, rank)
        return y

    def _streams(self) -> tuple[Stream, ...]:
        return (Stream.SIGNS_1, Stream.SIGNS_2, Stream.SIGNS_3)[: self.rotations]

    @staticmethod
    def _signs(x: torch.Tensor, stream: Stream, key: Key, first: int, rank: int) -> torch.Tensor:
        return signs(key, stream, first, x.numel(), rank, x.device).view(x.shape)


def _floating(x: torch.Tensor, owner: str, name: str) -> torch.Tensor:
    """x without autograd's graph."""
    memory_of(x, owner, name)
    if not x.is_floating_point():
        remedy = "torch.view_as_real of it" if x.is_complex() else f"{name}.float()"
        raise TypeError(f"{owner}: {name} is {x.dtype}, which is not floating; pass {remedy}")
    return x.detach()


# How many transforms -----------------------------------------------------------------------------

BERRY_ESSEEN = 0.5606  # Shevtsova (2010), for independent summands that differ in law
TOLERANCE = 0.05
_PARTS = 8  # the largest group of coordinates that a quantizer codes together
MOMENTS = _PARTS + 2


def choose_rotations(
    x: torch.Tensor,
    *,
    block: int = 4096,
    group: int = 1,
    safe: int = 2,
    tolerance: float = TOLERANCE,
) -> int:
    """1 where one transform does for x, else `safe`; linear in x, and independent of the signs.

    After one transform a coordinate is d^(-1/2) sum_i +-x_i, so its Kolmogorov distance to a
    Gaussian is at most

        0.5606 sum_i |x_i|^3 / (sum_i x_i^2)^(3/2)        (Berry and Esseen; Shevtsova 2010),

    and the covariances of g adjacent coordinates, over |x|^2 / d, are the g-point Walsh-Hadamard
    transform of q_r = sum of x_i^2 over i = r mod g, over |x|^2. One transform does where the
    bound, averaged over blocks with weights |x_block|^2 as errors are, is at most the tolerance,
    and the largest of the covariances (which change the error in second order only) 4 times that;
    no block with more than 1e-4 of |x|^2 may exceed 4 times either limit.

    Args:
        x: (numel,) floating.
        block: coordinates rotated together, a power of two.
        group: g, coordinates that a quantizer codes together: 1, 2, 4 or 8.
        safe: the number that does for every x.
        tolerance: of the Kolmogorov distance, in (0, 1).

    Raises:
        TypeError: x is no tensor, has no memory of its own or is not floating.
        ValueError: an argument is out of its range.
    """
    x = _floating(x, "choose_rotations", "x")
    if group not in (1, 2, 4, 8) or not 0 < tolerance < 1:
        raise ValueError(
            f"choose_rotations: group={group} must be 1, 2, 4 or 8, "
            f"and tolerance={tolerance} between 0 and 1"
        )
    RandomizedHadamard(safe, block)  # checks them
    rows = []
    for part in split_into_blocks(x.numel(), block):
        values = part.rows(x.flatten()[part.start : part.stop].double())
        peak = values.abs().amax(dim=1)
        unit = torch.where((peak > 0) & peak.isfinite(), peak, 1.0)
        rows.append(block_moments(values / unit[:, None], unit))
    return rotations_for(torch.cat(rows), group, safe, tolerance) if rows else 1


def block_moments(z: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """What the choice depends on: blocks z (B, d), in units of `unit` (B,) -> (B, 10).

    q_0 .. q_7, sum |z|^3, unit. Blocks that are not finite count as zeros.
    """
    squares = z.square()
    cubes = (squares * z.abs()).sum(dim=1)
    sums = torch.cat(
        [squares.view(len(z), -1, _PARTS).sum(dim=1), cubes[:, None], unit[:, None]], dim=1
    )
    return torch.where(sums.isfinite().all(dim=1, keepdim=True), sums, 0.0)


def rotations_for(
    moments: torch.Tensor, group: int, safe: int, tolerance: float = TOLERANCE
) -> int:
    """The choice of `choose_rotations`, from the `block_moments` of all."""
    # NumPy, since torch takes several times as long for so few numbers, in every step's buckets.
    rows = moments.double().cpu().numpy()
    q, cubes, unit = rows[:, :_PARTS], rows[:, _PARTS], rows[:, _PARTS + 1]
    squares = q.sum(axis=1)
    weight = squares * (unit / max(unit.max(), 1e-300)) ** 2
    weight = weight / max(weight.sum(), 1e-300)
    inverse = 1 / np.where(squares > 0, squares, np.inf)
    measures = [(BERRY_ESSEEN * cubes * inverse**1.5, tolerance)]
    if group > 1:
        spectrum = hadamard(torch.from_numpy(q.reshape(len(q), -1, group).sum(axis=1)))
        measures.append((spectrum[:, 1:].abs().amax(dim=1).numpy() * inverse, 4 * tolerance))
    for measure, limit in measures:
        if weight @ measure > limit or (measure[weight > 1e-4] > 4 * limit).any():
            return safe
    return 1
