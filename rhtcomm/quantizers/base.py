"""The interface between a codec and its quantizer."""

from collections.abc import Hashable
from hashlib import blake2b
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rhtcomm.bitpack import pack, unpack
from rhtcomm.randomness import Key
from rhtcomm.rotation import Blocks

__all__ = [
    "Packed",
    "Quantizer",
    "check_bits",
    "eden_scale",
    "fingerprint_of",
    "root_mean_square",
    "tensor_of",
    "tree_sum",
]


class Quantizer(Hashable, Protocol):
    """Maps rotated blocks to bytes and one scale per block, and bytes back to values; hashable.

    A code represents `group` adjacent coordinates. A unit is a run of blocks that are coded
    together; the last unit of a payload may be shorter.

    `rotation` says how ranks must rotate for an unbiased mean. With "shared" all ranks use the same
    signs, values are summed in the rotated domain, and one rotation is undone. With "per_rank" each
    rank uses its own signs; otherwise errors would not average out. `rotations` is the number of
    rotations for which the expected error holds for every input.
    """

    rotation: ClassVar[Literal["shared", "per_rank"]]
    rotations: ClassVar[int]

    @property
    def bits(self) -> float: ...

    @property
    def group(self) -> int: ...

    @property
    def table(self) -> object:
        """The values of the codes; equal quantizers share one table, which is kept."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash that differs between tables that decode differently."""
        ...

    def unit(self, size: int) -> int:
        """Number of blocks of `size` coordinates in a unit."""
        ...

    def nbytes(self, count: int, size: int) -> int:
        """Bytes of `count` adjacent blocks of `size` coordinates, starting at a unit, without their
        scales; a multiple of 4."""
        ...

    def compress(
        self, y: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y (B, d) float32 -> octets (nbytes(B, d),) uint8 and scale (B,) float32.

        y is approximately scale * expand(octets). `offset` is that of y[0, 0] in its bucket, a
        multiple of 16. All y are finite, and their squares can be summed over a block without
        overflow; a block of zeros has scale 0.
        """
        ...

    def expand(
        self, octets: torch.Tensor, blocks: Blocks, key: Key, rank: int, world_size: int
    ) -> torch.Tensor:
        """octets (nbytes(B, d),) uint8 -> values (B, d) float32, without the scale.

        `blocks` are B of size d, by their offset in the bucket.
        """
        ...


class Packed(Protocol):
    """Base of quantizers whose codes have `group` times `bits` bits, packed block by block."""

    @property
    def bits(self) -> int: ...

    @property
    def group(self) -> int: ...

    def encode(
        self, y: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y (B, d) float32 -> codes (B, d / group) uint8 and scale (B,) float32."""
        ...

    def decode(
        self, codes: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> torch.Tensor:
        """codes (B, d / group) uint8 -> values (B, d) float32, without the scale."""
        ...

    def unit(self, size: int) -> int:
        return 1

    def nbytes(self, count: int, size: int) -> int:
        return count * (size * self.bits // 8)

    def compress(
        self, y: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = self.encode(y, key, offset, rank, world_size)
        return pack(codes, self.bits * self.group).flatten(), scale

    def expand(
        self, octets: torch.Tensor, blocks: Blocks, key: Key, rank: int, world_size: int
    ) -> torch.Tensor:
        packed = octets.view(blocks.count, -1)
        codes = unpack(packed, self.bits * self.group, blocks.size // self.group)
        return self.decode(codes, key, blocks.offset, rank, world_size)


def check_bits(owner: str, bits: int) -> None:
    """Raise ValueError unless bits is one of the integers 1 to 8."""
    if type(bits) is not int or not 1 <= bits <= 8:  # True is an int too
        raise ValueError(f"{owner}: bits={bits!r} must be 1, 2, ..., 8 (an int)")


def fingerprint_of(table: npt.NDArray[np.float32]) -> str:
    """A hash of the values that codes decode to."""
    return blake2b(table.tobytes(), digest_size=8).hexdigest()


def tensor_of(table: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A table as a new tensor on a device.

    Tables are cached as NumPy arrays, since tensors created under FakeTensorMode, inference_mode or
    a default device would stay affected by these.
    """
    return torch.from_numpy(table).to(device)


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of each row, x (B, d) -> (B,): the upper half is added to the lower until one value is
    left.

    The order is fixed, so that every kernel gets the same bits.
    """
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def root_mean_square(y: torch.Tensor) -> torch.Tensor:
    """(sum_j y_j^2 / d)^(1/2) of each row, y (B, d) -> (B,)."""
    mean = tree_sum(y * y) * (1.0 / y.shape[1])
    # torch's float32 square root on CPU can be off by one unit in the last place; through float64
    # it is rounded correctly, as in every other kernel.
    return mean.double().sqrt().float()


def eden_scale(
    rms: torch.Tensor, z: torch.Tensor, values: torch.Tensor, biased: bool
) -> torch.Tensor:
    """The scale s of blocks y = rms z that are decoded to s c; rms (B,), z and c (B, d) -> (B,).

    |y|^2 / <y, c> makes s c unbiased over the rotation; with `biased` it is <y, c> / |c|^2, which
    makes |y - s c|^2 as small as c allows.
    """
    agreement = tree_sum(z * values)
    correction = agreement / tree_sum(values * values) if biased else tree_sum(z * z) / agreement
    return torch.where(rms > 0, rms * correction, 0.0)
