"""EDEN (Vargaftik et al., ICML 2022); with one bit it is DRIVE (Vargaftik et al., NeurIPS 2021).

Rotated coordinates in units of their root mean square, z, go to the nearest centroid c(z) of the
b-bit Lloyd-Max codebook of N(0, 1). The scale |y|^2 / <y, c(z)> makes the estimate unbiased over
the rotation: its projection on y is y itself, and the rest has no preferred direction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from rhtcomm import codebooks
from rhtcomm.arguments import check_bool
from rhtcomm.floating_point import default_mode
from rhtcomm.once import once
from rhtcomm.quantizers.base import (
    Packed,
    check_bits,
    eden_scale,
    fingerprint_of,
    root_mean_square,
    tensor_of,
)
from rhtcomm.randomness import Key

__all__ = ["Eden"]


@dataclass(frozen=True)
class Eden(Packed):
    """Smaller error than QuicFL for one sender; unbiased over random rotations, not for a given
    one.

    A rotated block y is decoded to

        y' = |y|^2 / <y, c(y)> c(y),

    where c replaces each coordinate, in units of the block's root mean square, by the nearest of
    the 2^b levels of least squared error for N(0, 1) (Lloyd-Max).

    So each rank rotates with its own signs, and fewer than two rotations leave a bias on inputs
    with few large coordinates.

    Args:
        bits: b, bits per coordinate, 1 to 8.
        biased: use the scale <y, c> / |c|^2 of least squared error, which shrinks the estimate. Its
            vNMSE is e / (1 + e), where e is that of the unbiased scale (0.3634 against 0.5708 at
            one bit), but the bias does not average out over ranks or steps. So use it only with
            error feedback, which sends the missing part later.

    Raises:
        TypeError: biased is not a bool.
        ValueError: bits is out of its range.
    """

    bits: int = 4
    biased: bool = False

    rotation: ClassVar[Literal["shared", "per_rank"]] = "per_rank"
    rotations: ClassVar[int] = 2
    group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_bits("Eden", self.bits)
        check_bool(self.biased, "Eden", "biased")

    def encode(
        self, y: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rms = root_mean_square(y)
        z = y * torch.where(rms > 0, rms.reciprocal(), 0.0)[:, None]
        codes = torch.bucketize(z, tensor_of(self.table.boundaries, y.device), right=True)
        values = tensor_of(self.table.centroids, y.device)[codes]
        return codes.to(torch.uint8), eden_scale(rms, z, values, self.biased)

    def decode(
        self, codes: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> torch.Tensor:
        return tensor_of(self.table.centroids, codes.device)[codes.int()]

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.table.centroids)

    @property
    def table(self) -> "Table":
        return _table(self.bits)


@dataclass(frozen=True)
class Table:
    """centroids (2^b,) float32; boundaries (2^b - 1,) float32, code = #{boundaries <= z}."""

    centroids: npt.NDArray[np.float32]
    boundaries: npt.NDArray[np.float32]


@once
@default_mode()
def _table(bits: int) -> Table:
    centroids = codebooks.load("lloyd_max")[f"b{bits}"]
    boundaries = (centroids[1:] + centroids[:-1]) / 2
    return Table(centroids.astype(np.float32), boundaries.astype(np.float32))
