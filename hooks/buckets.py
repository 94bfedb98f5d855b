"""Gradient buckets, as DDP passes them and as engines process them."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..codec import DTYPES
from ..randomness import Key
from ..reduce import Treatment
from ..segments import rows_of
from .models import numel_of
from .stats import BucketReport

__all__ = ["Bucket", "floats_in", "plain_mean", "say_if_exact"]

_log = logging.getLogger("rhtcomm")


@dataclass(slots=True)
class Bucket:
    """A gradient bucket of one step; with FSDP2, the gradients that a unit reduces at once."""

    buffer: torch.Tensor
    """(numel,) floating point, contiguous."""
    key: Key
    parameters: list[torch.Tensor]
    ends: bool
    """Whether it is the last of its step, after which others may use the connections, or the rank
    may leave."""
    treatment: Treatment | None = None
    """How it is sent, if not all of it by the state's codec."""
    state: object = None
    """Kept until the bucket is finished: connections close when the state is freed."""
    output: torch.Tensor | None = None
    """If the mean is scattered: (m,), for this rank's shard of it. Then `buffer` is (n m,), one
    shard per rank, and the fields below describe a shard."""
    segments: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Lengths and rows, see `rhtcomm.segments`; None: those of the parameters."""
    parts: "list[Bucket]" = field(default_factory=list)
    """Buckets that together have all of its parameters and are sent instead, one after the other.
    Until its turn, each has this bucket's buffer."""
    gradients: torch.Tensor | None = None
    """Memory that the parameters' gradients may be views of, if it is not `buffer`."""
    reports: list[BucketReport] | None = None
    """Of it, or of its parts, once they are finished; None: nobody observes."""

    def lengths_and_rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths and rows of the segments in the buffer."""
        if self.segments is not None:
            return self.segments
        lengths = tuple(map(torch.Tensor.numel, self.parameters))
        if sum(lengths) != self.buffer.numel():
            lengths = tuple(map(numel_of, self.parameters))
        shapes = (parameter.shape for parameter in self.parameters)
        return lengths, tuple(map(rows_of, shapes, lengths))

    def by_parts_(self, mean_: "Callable[[Bucket], None]") -> None:
        """Average this bucket part by part, with `mean_`."""
        lengths, _ = self.lengths_and_rows()
        pieces = self.buffer.split(lengths)
        piece_of = dict(zip(map(id, self.parameters), pieces, strict=True))
        while self.parts:
            part = self.parts.pop(0)
            own = [piece_of[id(parameter)] for parameter in part.parameters]
            part.buffer, part.gradients = torch.cat(own), self.buffer
            part.reports = self.reports
            self.key = part.key  # named in errors
            mean_(part)
            for piece, mean in zip(own, part.buffer.split([*map(len, own)]), strict=True):
                piece.copy_(mean)


def floats_in(buffer: torch.Tensor, index: int) -> torch.Tensor:
    """The numbers of a bucket as a flat floating-point tensor.

    Raises:
        TypeError: they cannot be averaged.
    """
    if buffer.layout != torch.strided:
        raise TypeError(
            f"rht_hook: bucket {index} is a sparse gradient ({buffer.layout}), which cannot be "
            "compressed; make the layer dense (sparse=False for nn.Embedding)"
        )
    if buffer.is_complex():  # torch 2.13 already passes pairs of floats
        return torch.view_as_real(buffer).view(-1)
    if not buffer.is_floating_point():
        raise TypeError(
            f"rht_hook: bucket {index} is {buffer.dtype}, but only floating-point gradients can be "
            "averaged; reduce it with torch.distributed"
        )
    return buffer


def say_if_exact(dtype: torch.dtype, said: set[torch.dtype]) -> None:
    """Log once that buckets of a dtype are not compressed."""
    if dtype not in DTYPES and dtype not in said:
        said.add(dtype)
        _log.warning(
            "rht_hook: gradients of %s are sent uncompressed, since only float32, bfloat16 and "
            "float16 can be compressed",
            dtype,
        )


def plain_mean(
    bucket: dist.GradBucket,  # type: ignore[name-defined]
    ddp: DistributedDataParallel | None,
) -> torch.futures.Future[torch.Tensor]:
    """The mean exactly as DDP computes it without a hook: multiply by the reciprocal."""
    group = None if ddp is None else ddp.process_group
    buffer = bucket.buffer().mul_(1.0 / dist.get_world_size(group))
    work = dist.all_reduce(buffer, group=group, async_op=True)
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(
        lambda finished: finished.value()[0]
    )
    return future
