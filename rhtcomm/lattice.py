"""Codes that can be summed: one native integer all-reduce of compressed tensors.

All ranks quantize the rotated coordinates y of a block on one uniform grid, with subtractive
dither. With M the largest |y| of any rank, b bits, and D = 2 M / (2^b - 1), rank i of n sends

    x_i = floor((y_i + M) / D + v_i),    0 <= x_i <= 2^b - 1,

where v_i = frac(v + i / n) and v is uniform on [0, 1) and shared. As frac(a + v_i) is uniform and
independent of a, x_i - v_i + 1/2 is (y_i + M) / D with an error uniform on (-1/2, 1/2), whatever y
is: unbiased, with the error D^2 / 12 per rank. Since sum_i v_i = frac(n v) + (n - 1) / 2, the sum
of the codes and one stream of dither are all that is needed:

    mean_i y_i ~ (sum_i x_i - frac(n v) + 1/2) D / n - M.

The sum fits in w = b + ceil(log2 n) bits. floor(32 / w) such lanes make an int32 word, no lane can
carry into the next, and whatever adds integers (a switch, NVLink, any MPI) can do the reduction.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from rhtcomm.floating_point import default_mode
from rhtcomm.quantizers.base import check_bits
from rhtcomm.randomness import Key, dither
from rhtcomm.rotation import Blocks, RandomizedHadamard, split_into_blocks
from rhtcomm.versions import VERSIONS

__all__ = ["Lattice"]


@dataclass(frozen=True)
class Lattice:
    """Takes the place of a `Codec` in `all_reduce` only: one rank's codes have no meaning alone.

    With M the largest magnitude of any rank in a rotated block, D = 2 M / (2^b - 1), and dithers
    v_i, uniform on [0, 1), that all ranks know, rank i of n sends

        x_i = floor((y_i + M) / D + v_i),    and    sum_i (x_i - v_i + 1/2) D / n - M

    is the mean of the y_i, unbiased, with the error D^2 / 12 / n per coordinate. One integer
    all-reduce of b + ceil(log2 n) bits per coordinate adds the codes up.

    Args:
        bits: b, 1 to 8.
        rotations: randomized Hadamard transforms, 1 to 3. They even out the coordinates, so that
            M, and with it the error, is small.
        block: coordinates per block, a power of two from 32 to 2^24.

    Raises:
        ValueError: an argument is out of its range.
    """

    bits: int = 4
    rotations: int = 2
    block: int = 4096

    def __post_init__(self) -> None:
        check_bits("Lattice", self.bits)
        self.rotation  # noqa: B018  # checks the arguments

    @cached_property
    def rotation(self) -> RandomizedHadamard:
        return RandomizedHadamard(self.rotations, self.block)

    @property
    def default_rotations(self) -> int:
        return self.rotations

    @property
    def configuration(self) -> dict[str, object]:
        """What all ranks must have in common, by name."""
        return {
            **VERSIONS,
            "quantizer": "Lattice",
            "bits": self.bits,
            "rotations": self.rotations,
            "block": self.block,
        }

    def lane_bits(self, world_size: int) -> int:
        """w = b + ceil(log2 n), bits of a sum of codes.

        Args:
            world_size: n, the number of ranks.

        Raises:
            ValueError: with so many ranks not even one lane fits in a word.
        """
        width = self.bits + (world_size - 1).bit_length()
        if width > 32:
            raise ValueError(
                f"Lattice: the sum of {world_size} codes of {self.bits} bits takes {width} bits, "
                "but a word has 32; use fewer bits or ranks"
            )
        return width

    def blocks(self, numel: int) -> tuple[Blocks, ...]:
        return split_into_blocks(numel, self.block)

    @default_mode(pool=True)
    def rotate(self, x: torch.Tensor, key: Key, blocks: Blocks) -> torch.Tensor:
        """Rotated coordinates of blocks: x (at most B d,) -> (B, d) float64; inf if not finite."""
        rows = blocks.rows(x.float())
        peak = rows.abs().amax(dim=1, keepdim=True)
        finite = peak.isfinite()
        # Powers of two keep the rotated coordinates in the range of float32.
        _, exponent = torch.frexp(torch.where(finite, peak, 1.0))
        half = exponent // 2
        small = torch.ldexp(torch.ldexp(rows, -half), half - exponent)
        y = self.rotation.rotate(torch.where(finite, small, 0.0), key, blocks.offset).double()
        y = torch.ldexp(y, exponent.double()) * blocks.size ** (-self.rotations / 2)
        return torch.where(finite, y, torch.inf)

    @default_mode(pool=True)
    def codes(
        self,
        y: torch.Tensor,
        bound: torch.Tensor,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
    ) -> torch.Tensor:
        """x_i: y (B, d) float64, bound (B,) = M of all ranks -> (B, d) int64."""
        v = torch.frac(self._dither(y.shape, key, offset, y.device) + rank / world_size)
        step = self._step(bound)
        position = (y + bound[:, None]) / step[:, None]
        usable = (bound > 0) & bound.isfinite()
        position = torch.where(usable[:, None], position, 0.0)
        return (position + v).floor().long().clamp(0, 2**self.bits - 1)

    @default_mode(pool=True)
    def mean(
        self, total: torch.Tensor, bound: torch.Tensor, key: Key, blocks: Blocks, world_size: int
    ) -> torch.Tensor:
        """Mean over ranks: total (B, d) int64, the sum of all codes -> (B, d) float32."""
        v = self._dither(total.shape, key, blocks.offset, total.device)
        centred = total - torch.frac(world_size * v) + 0.5
        # In units of M, so that the inverse rotation stays in the range of float32 too.
        unit = 2 / (2**self.bits - 1) / world_size
        y = self.rotation.unrotate((centred * unit - 1).float(), key, blocks.offset).double()
        mean = y * (bound[:, None] * blocks.size ** (-self.rotations / 2))
        mean = torch.where((bound > 0)[:, None], mean, 0.0)
        return torch.where(bound.isfinite()[:, None], mean, torch.nan).float()

    def pack(self, codes: torch.Tensor, world_size: int) -> torch.Tensor:
        """codes (m,) int64 -> words int32, floor(32 / w) lanes each, the first one lowest."""
        width = self.lane_bits(world_size)
        lanes = 32 // width
        padded = torch.nn.functional.pad(codes, (0, -codes.numel() % lanes)).view(-1, lanes)
        words = (padded << (width * torch.arange(lanes, device=codes.device))).sum(dim=1)
        return words.to(torch.int32)

    def unpack(self, words: torch.Tensor, numel: int, world_size: int) -> torch.Tensor:
        """Summed words int32 -> sums of codes (numel,) int64."""
        width = self.lane_bits(world_size)
        shifts = width * torch.arange(32 // width, device=words.device)
        lanes: torch.Tensor = ((words.long() & 0xFFFFFFFF)[:, None] >> shifts) & ((1 << width) - 1)
        return lanes.flatten()[:numel]

    def _step(self, bound: torch.Tensor) -> torch.Tensor:
        return torch.mul(bound, 2 / (2**self.bits - 1))

    @staticmethod
    def _dither(shape: torch.Size, key: Key, offset: int, device: torch.device) -> torch.Tensor:
        _, v = dither(key, offset, shape.numel(), 0, device)
        return torch.div(v.double() + 0.5, 65536).view(shape)
