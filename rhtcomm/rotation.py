"""Randomized Hadamard transforms of independent blocks.

A block x in R^d, d a power of two, becomes R_k x = (H D_k) ... (H D_1) x with the orthonormal
Sylvester-Hadamard matrix H, H[i, j] = d^(-1/2) (-1)^popcount(i & j), and diagonal matrices D_i of
random signs. After k = 2 each coordinate of sqrt(d) R x / |x| is within O(d^(-1/2)) of N(0, 1) for
any x; k = 3 also makes the covariance of any two coordinates vanish (arXiv 2605.06014).

The arithmetic is part of the specification, since all ranks must end with the same bits, whichever
kernel they run: butterflies are float32 additions and subtractions in ascending stride order.
"""

from dataclasses import dataclass

import torch

from rhtcomm.arguments import check_type
from rhtcomm.floating_point import default_mode
from rhtcomm.memory import memory_of
from rhtcomm.randomness import Key, Stream, signs

__all__ = ["Blocks", "RandomizedHadamard", "floating_tensor", "hadamard", "split_into_blocks"]

_BLOCKS = [1 << power for power in range(5, 25)]
MIN_TAIL = 256


@dataclass(frozen=True)
class Blocks:
    """`count` adjacent blocks of `size` coordinates, the first one at coordinate `offset`."""

    offset: int
    count: int
    size: int

    @property
    def stop(self) -> int:
        return self.offset + self.count * self.size

    def shifted(self, by: int) -> "Blocks":
        return Blocks(self.offset + by, self.count, self.size)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The coordinates of these blocks, x (at most B d,) -> (B, d), padded with zeros."""
        x = torch.nn.functional.pad(x, (0, self.count * self.size - x.numel()))
        return x.view(self.count, self.size)


def split_into_blocks(numel: int, block: int) -> tuple[Blocks, ...]:
    """Split `numel` coordinates into full blocks and, if some remain, one tail block.

    The tail block is the smallest power of two that holds the rest, padded with zeros. It is at
    least 256, since rotated coordinates of smaller blocks are too far from Gaussian, or `block` if
    that is smaller. So the padding is shorter than max(block / 2, 256).
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
    # With strides below 64 torch would access memory in tiny steps, so they use a transpose.
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

        Args:
            x: (numel,) floating; zeros pad its last block.
            key: chooses the signs, with `rank`.
            rank: whose signs; 0 for those that all ranks share.

        Raises:
            TypeError: x is not a tensor, has no memory of its own or is not floating point; or the
                key is not a `Key`.
        """
        x = floating_tensor(x, "RandomizedHadamard.forward", "x")
        check_type(key, Key, "RandomizedHadamard.forward", "key", "Key(seed=0, step=1)")
        y = []
        for blocks in split_into_blocks(x.numel(), self.block):
            rows = blocks.rows(x[blocks.offset : blocks.stop].float())
            rotated = self.rotate(rows, key, blocks.offset, rank)
            y.append(rotated * blocks.size ** (-self.rotations / 2))
        return torch.cat([rows.flatten() for rows in y]) if y else x.float()

    @default_mode(pool=True)
    def inverse(self, y: torch.Tensor, key: Key, numel: int, rank: int = 0) -> torch.Tensor:
        """The x of `forward`: (padded numel,) float32 -> (numel,) float32.

        Args:
            y: (padded numel,), what `forward` returned.
            key: as given to `forward`.
            numel: of x.
            rank: as given to `forward`.

        Raises:
            TypeError: as `forward` does.
        """
        y = floating_tensor(y, "RandomizedHadamard.inverse", "y")
        check_type(key, Key, "RandomizedHadamard.inverse", "key", "Key(seed=0, step=1)")
        x = []
        for blocks in split_into_blocks(numel, self.block):
            rows = y[blocks.offset : blocks.stop].view(blocks.count, blocks.size)
            rows = rows * blocks.size ** (-self.rotations / 2)
            x.append(self.unrotate(rows, key, blocks.offset, rank))
        return torch.cat([rows.flatten() for rows in x])[:numel] if x else y.float()

    def rotate(self, x: torch.Tensor, key: Key, offset: int, rank: int = 0) -> torch.Tensor:
        """d^(k/2) R x of whole blocks, not normalized: x (B, d) float32 -> (B, d).

        `offset` is that of x[0, 0] in its bucket, a multiple of 8; it selects the signs.
        """
        for stream in self._streams():
            x = hadamard(x * self._signs(x, stream, key, offset, rank))
        return x

    def unrotate(self, y: torch.Tensor, key: Key, offset: int, rank: int = 0) -> torch.Tensor:
        """d^(k/2) R^T y of whole blocks, so that unrotate(rotate(x)) = d^k x."""
        for stream in reversed(self._streams()):
            y = hadamard(y) * self._signs(y, stream, key, offset, rank)
        return y

    def _streams(self) -> tuple[Stream, ...]:
        return (Stream.SIGNS_1, Stream.SIGNS_2, Stream.SIGNS_3)[: self.rotations]

    @staticmethod
    def _signs(x: torch.Tensor, stream: Stream, key: Key, offset: int, rank: int) -> torch.Tensor:
        return signs(key, stream, offset, x.numel(), rank, x.device).view(x.shape)


def floating_tensor(x: torch.Tensor, owner: str, name: str) -> torch.Tensor:
    """x detached from autograd's graph.

    Raises:
        TypeError: x is not a tensor, has no memory of its own or is not floating point.
    """
    memory_of(x, owner, name)
    if not x.is_floating_point():
        remedy = "torch.view_as_real of it" if x.is_complex() else f"{name}.float()"
        raise TypeError(
            f"{owner}: {name} is {x.dtype}, which is not a floating-point type; pass {remedy}"
        )
    return x.detach()
