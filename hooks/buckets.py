"""DDP's gradient buckets, before they reach an engine."""

import logging

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..codec import DTYPES

__all__ = ["floats_in", "plain_mean", "say_if_exact"]

_log = logging.getLogger("rhtcomm")


def floats_in(buffer: torch.Tensor, index: int) -> torch.Tensor:
    """The numbers of a bucket as a flat floating tensor.

    Raises:
        TypeError: they cannot be averaged.
    """
    if buffer.layout != torch.strided:
        raise TypeError(
            f"rht_hook: bucket {index} is a sparse gradient ({buffer.layout}), which cannot be "
            "rotated; make the layer dense (sparse=False for nn.Embedding)"
        )
    if buffer.is_complex():  # torch 2.13 gives pairs of floats itself
        return torch.view_as_real(buffer).view(-1)
    if not buffer.is_floating_point():
        raise TypeError(
            f"rht_hook: bucket {index} is {buffer.dtype}, and a mean of integers is no integer; "
            "reduce it with torch.distributed"
        )
    return buffer


def say_if_exact(dtype: torch.dtype, said: set[torch.dtype]) -> None:
    """Log that buckets of a dtype are not compressed, unless it was said."""
    if dtype not in DTYPES and dtype not in said:
        said.add(dtype)
        _log.warning(
            "rht_hook: gradients of %s travel as they are, since only float32, bfloat16 and "
            "float16 are compressed",
            dtype,
        )


def plain_mean(
    bucket: dist.GradBucket,  # type: ignore[name-defined]
    ddp: DistributedDataParallel | None,
) -> torch.futures.Future[torch.Tensor]:
    """What DDP does without a hook, to the last bit: it multiplies by the reciprocal."""
    group = None if ddp is None else ddp.process_group
    buffer = bucket.buffer().mul_(1.0 / dist.get_world_size(group))
    work = dist.all_reduce(buffer, group=group, async_op=True)
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(
        lambda finished: finished.value()[0]
    )
    return future
