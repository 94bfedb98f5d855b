"""What one exchange is told in addition to its route."""

from dataclasses import dataclass

import torch

from rhtcomm.randomness import Key
from rhtcomm.reduce.clock import Clock

__all__ = ["Job"]


@dataclass(slots=True)
class Job:
    flat: torch.Tensor
    """(numel,) contiguous: this rank's values; afterwards the mean, unless it is scattered."""
    key: Key
    clock: Clock
    rotations: int | None = None
    """How many transforms to take; None: the codec's own number."""
    left: torch.Tensor | None = None
    """(numel,) float32, for error feedback: becomes what the others did not get of this rank's."""
    output: torch.Tensor | None = None
    """(numel / world_size,) where the mean is scattered: what becomes the mean of this rank's
    shard."""

    @property
    def result(self) -> torch.Tensor:
        """Where the mean goes."""
        return self.flat if self.output is None else self.output
