"""What one exchange needs in addition to its route."""

from dataclasses import dataclass

import torch

from rhtcomm.randomness import Key
from rhtcomm.reduce.clock import Clock
from rhtcomm.reduce.residual import Update

__all__ = ["Job"]


@dataclass(slots=True)
class Job:
    flat: torch.Tensor
    """(numel,) contiguous: this rank's values; afterwards the mean, unless it is scattered."""
    key: Key
    clock: Clock
    rotations: int | None = None
    """Number of rotations; None: the codec's own number."""
    update: Update | None = None
    """Of the residual, which is sent too, for error feedback."""
    output: torch.Tensor | None = None
    """(numel / world_size,) if the mean is scattered: becomes the mean of this rank's shard."""

    def know(self, used: torch.Tensor) -> None:
        """Called once `used` says which segments any rank uses, before the first mean."""
        if self.update is not None:
            self.update.begin(self.flat, used)

    @property
    def result(self) -> torch.Tensor:
        """The tensor that receives the mean."""
        return self.flat if self.output is None else self.output
