"""What a codec asks of a quantizer."""

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

    A code stands for `group` adjacent coordinates. A unit is a run of blocks that are coded
    together; the last one of a payload may be shorter.

    `rotation` says what unbiasedness of a mean over ranks needs: with "shared" all ranks rotate by
    the same signs, sum their values in the rotated domain and undo one rotation; with "per_rank"
    the errors average out only if every rank rotates by signs of its own. `rotations` is the number
    of transforms that makes the quantizer's promise hold for every input.
    """

    rotation: ClassVar[Literal["shared", "per_rank"]]
    rotations: ClassVar[int]

    @property
    def bits(self) -> float: ...

    @property
    def group(self) -> int: ...

    @property
    def table(self) -> object:
        """The numbers that codes stand for; equal quantizers share one table, which stays."""
        ...

    @property
    def fingerprint(self) -> str:
        """Differs between tables that decode differently."""
        ...

    def unit(self, size: int) -> int:
        """How many blocks of `size` coordinates make a unit."""
        ...

    def nbytes(self, count: int, size: int) -> int:
        """Bytes of `count` adjacent blocks of `size` coordinates, from the beginning of a unit on,
        without their scales; a multiple of 4."""
        ...

    def compress(
        self, y: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y (B, d) float32 -> octets (nbytes(B, d),) uint8 and scale (B,) float32.

        They stand for y ~ scale * expand(octets).
        `offset` is that of y[0, 0] in its bucket, a multiple of 16. All y are finite, and their
        squares can be summed over a block without overflow; a block of zeros has scale 0.
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
    """The bytes of quantizers whose codes have `group` times `bits` bits, block by block."""

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
    """A table as a tensor on a device, a new one in each call.

    Tables are kept as NumPy arrays, since a tensor that was made under FakeTensorMode, under
    inference_mode or with a default device would stay what these made it.
    """
    return torch.from_numpy(table).to(device)


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of each row, x (B, d) -> (B,): the upper half is added to the lower until one is left.

    A sum whose order is fixed, so that every kernel gets the same bits.
    """
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def root_mean_square(y: torch.Tensor) -> torch.Tensor:
    """(sum_j y_j^2 / d)^(1/2) of each row, y (B, d) -> (B,)."""
    mean = tree_sum(y * y) * (1.0 / y.shape[1])
    # torch's float32 square root on CPU can be off by one unit in the last place; by way of float64
    # it is rounded correctly, as it is in every other kernel.
    return mean.double().sqrt().float()


def eden_scale(
    rms: torch.Tensor, z: torch.Tensor, values: torch.Tensor, biased: bool
) -> torch.Tensor:
    """The scale s of blocks y = rms z that are sent as s c; rms (B,), z and c (B, d) -> (B,).

    |y|^2 / <y, c> makes s c unbiased over the rotation; with `biased` it is <y, c> / |c|^2, which
    makes |y - s c|^2 as small as c allows.
    """
    agreement = tree_sum(z * values)
    correction = agreement / tree_sum(values * values) if biased else tree_sum(z * z) / agreement
    return torch.where(rms > 0, rms * correction, 0.0)
