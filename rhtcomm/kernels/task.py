"""What all kernel calls on tensors of one length share."""

from dataclasses import dataclass

from rhtcomm.quantizers import Quantizer
from rhtcomm.rotation import RandomizedHadamard
from rhtcomm.wire import Section

__all__ = ["Task"]


@dataclass(frozen=True, eq=False)
class Task:
    """Tensors of one length, how they are split into shards and blocks, and how these are coded.

    Made once per length, and equal only to itself, so that kernels can cache what they prepared for
    it.

    Args:
        sections: of a shard's payload.
        numel: of a shard.
        shards: of the tensor, adjacent; each has a payload.
    """

    rotation: RandomizedHadamard
    quantizer: Quantizer
    sections: tuple[Section, ...]
    numel: int
    shards: int

    @property
    def blocks(self) -> int:
        """Coordinates of all shards."""
        return self.shards * sum(section.blocks.count for section in self.sections)
