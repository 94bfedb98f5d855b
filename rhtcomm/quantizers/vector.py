"""Vector quantization with EDEN's scale.

Groups of g = 8 / b adjacent rotated coordinates, in units of the block's root mean square, z in
R^g, are replaced by the nearest c(z) of 256 codewords {c_i, -c_i} trained for N(0, I_g) (see
codebooks/vector.py), one byte per group. The scale |y|^2 / <y, c(y)> makes the estimate unbiased
over the rotation, as for EDEN (Vargaftik et al., ICML 2022), if all directions of a group are
equally distributed. For that, the coordinates of a group must be uncorrelated, which takes three
rotations: after two, (x_0, x_1, 0, ..., 0) still becomes pairs of variances (x_0 +- x_1)^2 / 2
along their diagonals (arXiv 2605.06014).
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
    eden_scale,
    fingerprint_of,
    root_mean_square,
    tensor_of,
)
from rhtcomm.randomness import Key

__all__ = ["VectorQuantizer"]


@dataclass(frozen=True)
class VectorQuantizer(Packed):
    """Smaller error than Eden at the same bits; unbiased over random rotations, not for a given
    one.

    A rotated block y is decoded to y' = |y|^2 / <y, c(y)> c(y), as by `Eden`. Here c replaces each
    group of 8 / b adjacent coordinates by the nearest of 256 codewords, one byte per group.

    So each rank rotates with its own signs, and fewer than three rotations leave a bias on inputs
    with few large coordinates.

    Args:
        bits: b, bits per coordinate, 1, 2 or 4.
        biased: use the scale of least squared error, only for error feedback; see `Eden`.

    Raises:
        TypeError: biased is not a bool.
        ValueError: bits is not one of these.
    """

    bits: int = 4
    biased: bool = False

    rotation: ClassVar[Literal["shared", "per_rank"]] = "per_rank"
    rotations: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (1, 2, 4):  # True is an int too
            raise ValueError(
                f"VectorQuantizer: bits={self.bits!r} must be 1, 2 or 4 (an int), so that a byte "
                "holds a whole group of coordinates; Eden supports 1, 2, ..., 8"
            )
        check_bool(self.biased, "VectorQuantizer", "biased")

    @property
    def group(self) -> int:
        return 8 // self.bits

    def encode(
        self, y: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rms = root_mean_square(y)
        z = y * torch.where(rms > 0, rms.reciprocal(), 0.0)[:, None]
        codes = self._nearest(z)
        values = self.decode(codes, key, offset, rank, world_size)
        return codes, eden_scale(rms, z, values, self.biased)

    def decode(
        self, codes: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> torch.Tensor:
        return tensor_of(self.table.codewords, codes.device)[codes.int()].flatten(1)

    def _nearest(self, z: torch.Tensor) -> torch.Tensor:
        """z (B, d) -> codes (B, d / g) uint8, 128 s + i: c(z) = (-1)^s c_i.

        i is the lowest that maximizes |<z, c_i>| - |c_i|^2 / 2, and s = 1 where <z, c_i> < 0; the
        products are added in ascending order of the coordinate.
        """
        coordinates = z.unflatten(1, (-1, self.group)).permute(2, 0, 1).contiguous()
        best = torch.full_like(coordinates[0], -torch.inf)
        codes = torch.zeros_like(best, dtype=torch.uint8)
        entries = zip(self.table.codewords.tolist(), self.table.half_norms.tolist(), strict=False)
        for i, (codeword, half_norm) in enumerate(entries):
            dot = coordinates[0] * codeword[0]
            for coordinate, entry in zip(coordinates[1:], codeword[1:], strict=True):
                dot = dot + coordinate * entry
            score = dot.abs() - half_norm
            codes = torch.where(score > best, torch.where(dot < 0, 128 + i, i).byte(), codes)
            best = torch.maximum(best, score)
        return codes

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.table.codewords)

    @property
    def table(self) -> "Table":
        return _table(self.bits)


@dataclass(frozen=True)
class Table:
    """codewords (256, g) float32, the upper half -1 times the lower; half_norms (128,) float32,
    |c_i|^2 / 2."""

    codewords: npt.NDArray[np.float32]
    half_norms: npt.NDArray[np.float32]


@once
@default_mode()
def _table(bits: int) -> Table:
    half = codebooks.load("vector")[f"b{bits}"]
    return Table(
        codewords=np.concatenate([half, -half]).astype(np.float32),
        half_norms=((half * half).sum(axis=1) / 2).astype(np.float32),
    )
