"""What kernels need for error feedback, see `rhtcomm.reduce.feedback`.

A kernel that encodes x with a residual r encodes x + r, in float32. When the mean of what the ranks
sent takes the place of x, the residual becomes what is left unsent:

    r <- ((x + r) - sent) + weight (mean - decoded) + (decoded - out)

`sent` is what this rank's own payload decodes to, `decoded` the result in float32, and `out` the
same rounded to the dtype of x. `mean` is what this rank, as the owner of a shard, encoded for the
second hop. Each operation is rounded, and no error is -0.0. `decode_with_feedback` defines the
bits.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rhtcomm.floating_point import assign_
from rhtcomm.kernels.task import Task
from rhtcomm.memory import address_of
from rhtcomm.randomness import Key

__all__ = ["Feedback", "Residual", "decode_with_feedback", "raise_bound_", "with_residual"]


class Residual(NamedTuple):
    """A residual in adjacent pieces (any length,) float32, from coordinate `offset` of them on."""

    pieces: tuple[torch.Tensor, ...]
    starts: npt.NDArray[np.int64]
    """Where each piece begins, and where the last one ends."""
    addresses: npt.NDArray[np.uint64]
    offset: int = 0
    bound: torch.Tensor | None = None
    """(1,) float32 on the CPU, at least the largest magnitude, which all writers keep up; NaN if
    there is one. None: it is not known."""

    @classmethod
    def of(cls, pieces: Sequence[torch.Tensor], bound: torch.Tensor | None = None) -> "Residual":
        starts = [0, *accumulate(map(len, pieces))]
        addresses = [address_of(piece) for piece in pieces]
        arrays = np.array(starts, np.int64), np.array(addresses, np.uint64)
        return cls(tuple(pieces), *arrays, bound=bound)

    def at(self, offset: int) -> "Residual":
        """The same from this coordinate on."""
        return self._replace(offset=self.offset + offset)

    def views(self, numel: int) -> list[torch.Tensor]:
        """The first `numel` coordinates, as views of the pieces that they lie in."""
        first, stop = self.offset, self.offset + numel
        return [
            piece[max(0, first - start) : stop - start]
            for piece, start, end in zip(self.pieces, self.starts, self.starts[1:], strict=False)
            if start < stop and end > first
        ]

    def read(self, numel: int) -> torch.Tensor:
        """The first `numel` coordinates; a view if they lie in one piece."""
        views = self.views(numel) or [self.pieces[0][:0]]
        return views[0] if len(views) == 1 else torch.cat(views)

    def write(self, values: torch.Tensor) -> None:
        """Replace as many coordinates as there are values."""
        views = self.views(len(values))
        if not views:
            return
        for view, part in zip(views, values.split([*map(len, views)]), strict=True):
            view.copy_(part)
        if self.bound is not None:
            raise_bound_(self.bound, values)


def raise_bound_(bound: torch.Tensor, values: torch.Tensor) -> None:
    """bound (1,) <- the larger of it and the values' largest magnitude; NaN if one of them is."""
    if values.numel():
        torch.maximum(bound, values.abs().max().view(1).cpu(), out=bound)


class Feedback(NamedTuple):
    """What decoding a tensor needs in order to update its residual."""

    residual: Residual
    key: Key
    """Of what this rank sent."""
    rank: int
    world_size: int
    payloads: torch.Tensor
    """(shards, at least nbytes) uint8: what this rank sent."""
    mean: torch.Tensor | None = None
    """(m,) float32: what this rank encoded for the second hop; None: nothing."""
    first: int = 0
    """Where `mean` begins in the tensor."""
    weight: int = 1


class _Decode(Protocol):
    def __call__(
        self,
        task: Task,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        payloads: torch.Tensor,
        out: torch.Tensor,
    ) -> None: ...


def with_residual(x: torch.Tensor, residual: Residual | None) -> torch.Tensor:
    """x + r in float32; x without a residual."""
    return x if residual is None else x.float() + residual.read(len(x))


def decode_with_feedback(
    decode: _Decode,
    task: Task,
    key: Key,
    offset: int,
    rank: int,
    world_size: int,
    payloads: torch.Tensor,
    out: torch.Tensor,
    feedback: Feedback,
) -> None:
    """Decode to `out`, which holds x, and update the residual, by the `decode` of a kernel."""
    total = with_residual(out, feedback.residual)
    sent = torch.empty_like(total)
    own = (feedback.key, offset, feedback.rank, feedback.world_size)
    decode(task, *own, feedback.payloads.unsqueeze(0), sent)
    left = torch.sub(total, sent, out=sent).add_(0.0)
    decoded = out if out.dtype == torch.float32 else total
    decode(task, key, offset, rank, world_size, payloads, decoded)
    if feedback.mean is not None:
        mine = slice(feedback.first, feedback.first + len(feedback.mean))
        left[mine] += feedback.weight * (feedback.mean - decoded[mine])
    if decoded is not out:
        assign_(out, decoded)
        left += decoded - out.float()
    feedback.residual.write(left)
