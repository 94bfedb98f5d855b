"""What all calls of a kernel on tensors of one length have in common."""

from dataclasses import dataclass

from rhtcomm.quantizers import Quantizer
from rhtcomm.rotation import RandomizedHadamard
from rhtcomm.wire import Section

__all__ = ["Task"]


@dataclass(frozen=True, eq=False)
class Task:
    """Tensors of one length, how they are cut into shards and blocks, and how these are coded.

    It is made once for a length and equals only itself, so that kernels can look up what they
    prepared for it.

    Args:
        sections: of a shard's payload.
        numel: of a shard.
        shards: of the tensor, one behind the other; each has a payload.
    """

    rotation: RandomizedHadamard
    quantizer: Quantizer
    sections: tuple[Section, ...]
    numel: int
    shards: int

    @property
    def blocks(self) -> int:
        """Of all shards."""
        return self.shards * sum(section.blocks.count for section in self.sections)
