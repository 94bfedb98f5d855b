"""What a kernel is told beside the data."""

from typing import NamedTuple

import torch

from rhtcomm.quantizers import Quantizer
from rhtcomm.randomness import Key
from rhtcomm.rotation import Blocks, RandomizedHadamard

__all__ = ["Section", "Task"]


class Section(NamedTuple):
    """The blocks of one size of a tensor, and where a payload has them (bytes from its beginning).

    R parts of a tensor, which have a payload each, lie one behind the other and have one size of
    blocks: their section says where the first one's are.
    """

    blocks: Blocks
    """B of them; `start` counts from the beginning of the tensor."""
    scales: int
    codes: int
    stop: int

    def views(self, payloads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """payloads (..., nbytes) uint8 -> scales (..., B) float32 and codes (..., B, row bytes).

        A row is the d b / 8 bytes of a block's packed codes and, of a QuicFL, its `exact_bytes(d)`.
        """
        codes = payloads[..., self.codes : self.stop]
        return (
            payloads[..., self.scales : self.codes].view(torch.float32),
            codes.view(*payloads.shape[:-1], self.blocks.count, -1),
        )

    def coordinates(self, x: torch.Tensor, parts: int) -> torch.Tensor:
        """Those of x (numel,) that are in the blocks of so many parts, at most R B d."""
        start = self.blocks.start
        return x[start : start + parts * self.blocks.count * self.blocks.size]


class Task(NamedTuple):
    rotation: RandomizedHadamard
    quantizer: Quantizer
    key: Key
    section: Section
    first: int
    """Place of the tensor's first coordinate in its bucket."""
    rank: int
    """Encoding: whose tensor it is. Decoding: who encoded the first payload."""
    world_size: int

    def blocks(self, parts: int) -> Blocks:
        """The R B blocks of so many parts, by their place in the bucket."""
        blocks = self.section.blocks
        return Blocks(self.first + blocks.start, parts * blocks.count, blocks.size)
