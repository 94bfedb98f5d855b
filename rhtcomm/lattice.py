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

In numbers: v has 16 bits, y / D is an integer number of 2^-16, and ranks add floor(2^16 i / n) to
v. Then the sum of the v_i is known exactly, and the mean has no bias for any n. The kernels
(rhtcomm/kernels/lattice.py) compute all of it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rhtcomm.quantizers.base import check_bits
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

    def words(self, size: int, world_size: int) -> int:
        """m, int32 words of a block of `size` coordinates: floor(32 / w) lanes in each."""
        return -(-size // (32 // self.lane_bits(world_size)))

    @cached_property
    def per_step(self) -> float:
        """M / D in units of 2^-16, a float32.

        D is larger than above by a factor of 1 + 2^-21, so that no rounding of y / D takes a code
        out of its range.
        """
        return float(np.float32((2**self.bits - 1) * 32768 * (1 - 2**-21)))

    def blocks(self, numel: int) -> tuple[Blocks, ...]:
        return split_into_blocks(numel, self.block)
