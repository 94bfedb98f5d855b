"""QUIC-FL (Ben Basat et al., "Accelerating federated learning with quick distributed mean
estimation", ICML 2024) as companded, dithered quantization.

With l bits of shared randomness per coordinate let H = 2^l, h uniform on {0 .. H-1}, and r_0 < ...
< r_(N-1), N = H 2^b, odd-symmetric levels. A receiver decodes code x to r[x H + h]. With A_i the
mean of the H levels starting at r_i, the sender of z in [A_i, A_(i+1)) picks w = i + 1 with
probability (z - A_i) / (A_(i+1) - A_i), else w = i, and sends the x with w <= x H + h < w + H.
Averaged over h the receiver gets A_w; averaged over w too, exactly z.

Equivalently, with s(z) = (i + fraction) / H and one uniform v that sender and receivers share, x =
floor(s(z) + v) and h = H - 1 - floor(H v). Encoding first rounds z at random to one of evenly
spaced nodes, so that s is one lookup. That adds (node distance)^2 / 6 to the squared error, here
about 0.15% of the quantizer's own, and no bias.

Rank i of n uses v + i/n modulo one: each rank's dither stays uniform, and errors of ranks with
similar gradients cancel.

The exact mode is that of the paper: the levels end at T = 3.09727, and the 1/512 of N(0, 1) beyond
T is sent after the codes, as (index, value) entries. Each block of d coordinates has room for C(d)
entries. With |y|_(i) the i-th largest magnitude, the scale is

    max(root mean square of y, |y|_(C+1) / T),

so at most C coordinates exceed T scales, for every y. The wide mode is the case C = 0, T = 5.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from rhtcomm import codebooks
from rhtcomm.floating_point import default_mode
from rhtcomm.once import once
from rhtcomm.quantizers.base import (
    Packed,
    check_bits,
    fingerprint_of,
    root_mean_square,
    tensor_of,
)
from rhtcomm.randomness import Key, dither, stratum
from rhtcomm.rotation import Blocks

__all__ = ["QuicFL"]


EXACT_FRACTION = 1 / 512


@dataclass(frozen=True)
class QuicFL(Packed):
    """Unbiased for every input and every number of rotations.

    A coordinate y of a rotated block with the scale s is sent as the code x and decoded to y',

        x = floor(p(y / s) + v),    y' = s r[x H + H - 1 - floor(H v)],    E[y'] = y,

    with the dither v, uniform on [0, 1), that sender and receivers share, and two tables: p is
    increasing, and r has H 2^b levels, H = 2^l. See docs/science.md.

    By default the codes cover [-5, 5] root mean squares of a block. With exact_fraction=1/512 they
    cover [-3.09727, 3.09727] more finely, and coordinates beyond that are sent exactly (as float16,
    rounded at random without bias) in a section of `exact_bytes(d)`. In blocks of 4096 the error is
    11 to 20% lower, for 0.078 bits per coordinate. A block that overflows either is scaled down
    until it fits.

    Args:
        bits: b, bits per coordinate, 1 to 8.
        exact_fraction: of the coordinates of a Gaussian, 0 or 1/512.

    Raises:
        ValueError: an argument is out of its range.
    """

    bits: int = 4
    exact_fraction: float = 0.0

    rotation: ClassVar[Literal["shared", "per_rank"]] = "shared"
    rotations: ClassVar[int] = 2
    group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_bits("QuicFL", self.bits)
        if self.exact_fraction not in (0, EXACT_FRACTION):
            raise ValueError(
                f"QuicFL: exact_fraction={self.exact_fraction!r} must be 0 or 1/512 = "
                f"{EXACT_FRACTION}, the values that have tables"
            )
        # Convert any number to a plain float: fingerprints hash its text.
        object.__setattr__(self, "exact_fraction", float(self.exact_fraction))

    def exact_capacity(self, size: int) -> int:
        """C, the number of entries that a block of `size` coordinates has room for.

        It is the expected d / 512 plus 0.7 standard deviations. 17% of blocks of 4096 need more
        than their 10 entries. Rescaling those adds 0.6% error; 2 more entries would take 0.016 bits
        per coordinate, which are worth 2% in error.
        """
        if not self.exact_fraction:
            return 0
        return max(1, size // 512 + 2 * math.isqrt(size // 4096))

    def exact_bytes(self, size: int) -> int:
        """Length of the section of exact coordinates of a block, a multiple of 4.

        C indices in ascending order, int16 (int32 in blocks of more than 2^15), then C values in
        units of the scale, float16. Unused entries have index -1 and value 0.
        """
        return self.exact_capacity(size) * (_index_dtype(size).itemsize + 2)

    def nbytes(self, count: int, size: int) -> int:
        return super().nbytes(count, size) + count * self.exact_bytes(size)

    def compress(
        self, y: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        octets, scale = super().compress(y, key, offset, rank, world_size)
        if self.exact_fraction:
            exact = self.encode_exact(y, scale, key, offset, rank, world_size)
            octets = torch.cat([octets.view(len(y), -1), exact], dim=1).flatten()
        return octets, scale

    def expand(
        self, octets: torch.Tensor, blocks: Blocks, key: Key, rank: int, world_size: int
    ) -> torch.Tensor:
        if not self.exact_fraction:
            return super().expand(octets, blocks, key, rank, world_size)
        rows, edge = octets.view(blocks.count, -1), super().nbytes(1, blocks.size)
        values = super().expand(rows[:, :edge].flatten(), blocks, key, rank, world_size)
        self.decode_exact(values, rows[:, edge:])
        return values

    def encode(
        self, y: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.table
        # The least sufficient scales, computed by a product for whose rounding the last node leaves
        # room.
        needed = y.abs() * table.inverse_bound
        if self.exact_fraction:
            coded = needed.topk(self.exact_capacity(y.shape[1]) + 1, dim=1).values[:, -1]
        else:
            coded = needed.amax(dim=1)
        scale = torch.maximum(root_mean_square(y), coded)
        if self.exact_fraction:
            y = torch.where(needed > scale[:, None], 0.0, y)
        unit = torch.where(scale > 0, scale.reciprocal() * table.nodes_per_sigma, 0.0)
        u, v = dither(key, offset, y.numel(), stratum(rank, world_size), y.device)
        node = ((y * unit[:, None]).int().flatten() + (u + table.middle)) >> 16
        codes = (table.position_of(node) + v) >> 16
        return codes.to(torch.uint8).view(y.shape), scale

    def encode_exact(
        self,
        y: torch.Tensor,
        scale: torch.Tensor,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
    ) -> torch.Tensor:
        """The section of exact coordinates of y (B, d) with scale (B,).

        float16 has 13 bits less than float32. Adding 13 random bits and then dropping 13 rounds to
        one of the two neighbours, without bias.

        Returns:
            (B, exact_bytes(d)) uint8.
        """
        size = y.shape[1]
        capacity, dtype = self.exact_capacity(size), _index_dtype(size)
        beyond = y.abs() * self.table.inverse_bound > scale[:, None]
        # Coordinates beyond the range come first, in ascending order of their indices.
        order = beyond.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :capacity]
        used = beyond.gather(1, order)
        u, _ = dither(key, offset, y.numel(), stratum(rank, world_size), y.device)
        z = y.gather(1, order) / scale[:, None]
        bits = z.view(torch.int32) + (u.view(y.shape).gather(1, order) >> 3)
        values = (bits & ~0x1FFF).view(torch.float32)
        indices = torch.where(used, order, -1).to(dtype)
        return torch.cat(
            [
                indices.view(torch.uint8),
                torch.where(used, values, 0.0).half().view(torch.uint8),
            ],
            dim=1,
        )

    def decode(
        self, codes: torch.Tensor, key: Key, offset: int, rank: int, world_size: int
    ) -> torch.Tensor:
        table = self.table
        _, v = dither(key, offset, codes.numel(), stratum(rank, world_size), codes.device)
        level = (codes.flatten().int() << table.shared_bits) | (v >> (16 - table.shared_bits))
        return table.level_of(level).view(codes.shape)

    def decode_exact(self, values: torch.Tensor, section: torch.Tensor) -> None:
        """Replace the coordinates that were sent exactly.

        An entry is used if its index lies in the block and is larger than all indices before it, so
        any bytes have exactly one meaning.

        Args:
            values: (B, d) float32 as returned by `decode`, changed in place.
            section: (B, exact_bytes(d)) uint8.
        """
        size = values.shape[1]
        dtype = _index_dtype(size)
        edge = self.exact_capacity(size) * dtype.itemsize
        indices = section[:, :edge].contiguous().view(dtype).long()
        exact = section[:, edge:].contiguous().view(torch.float16).float()
        before = torch.nn.functional.pad(indices, (1, 0), value=-1).cummax(dim=1).values[:, :-1]
        rows, entries = torch.where((indices > before) & (indices < size))
        values[rows, indices[rows, entries]] = exact[rows, entries]

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.table.levels)

    @property
    def table(self) -> "Table":
        return _table(self.bits, "quic_fl_exact" if self.exact_fraction else "quic_fl")


@dataclass(frozen=True)
class Table:
    """The two lookup tables of one width, and their constants.

    Args:
        levels: (2^(b+l),) float32; row x, column g holds r[x H + H - 1 - g], g = floor(H v).
        positions: (nodes + 1,) int32, round(2^16 s(z)) at the evenly spaced nodes z of [-T, T].
        shared_bits: l.
        bound: T.
    """

    levels: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int32]
    shared_bits: int
    bound: float

    @property
    def nodes(self) -> int:
        return self.positions.size - 1

    @property
    def middle(self) -> int:
        """The node of z = 0, times 2^16."""
        return self.nodes << 15

    @property
    def nodes_per_sigma(self) -> float:
        """Nodes per unit of z, times 2^16."""
        return self.nodes * 65536 / (2 * self.bound)

    @property
    def inverse_bound(self) -> float:
        # Slightly above 1 / T, so that rounding cannot move a coordinate past the last node.
        return (1 + 2**-20) / self.bound

    def level_of(self, index: torch.Tensor) -> torch.Tensor:
        return tensor_of(self.levels, index.device)[index]

    def position_of(self, node: torch.Tensor) -> torch.Tensor:
        return tensor_of(self.positions, node.device)[node]


def _index_dtype(size: int) -> torch.dtype:
    return torch.int16 if size <= 1 << 15 else torch.int32


@once
@default_mode()
def _table(bits: int, name: str) -> Table:
    levels = codebooks.load(name)[f"b{bits}"].astype(np.float32)
    share = levels.size >> bits  # H
    # Built from the float32 levels that receivers use, so that rounding them adds no bias.
    running = np.concatenate([[0.0], np.cumsum(levels, dtype=np.float64)])
    averages = (running[share:] - running[:-share]) / share  # A_i
    bound = float(averages[-1])
    nodes = np.linspace(-bound, bound, max(1024, 64 << bits) + 1)
    position = np.interp(nodes, averages, np.arange(averages.size)) / share
    return Table(
        levels=levels.reshape(-1, share)[:, ::-1].flatten(),
        positions=np.rint(65536 * position).astype(np.int32),
        shared_bits=share.bit_length() - 1,
        bound=bound,
    )
