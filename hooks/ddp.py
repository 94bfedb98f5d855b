"""The communication hook for DistributedDataParallel."""

from typing import Any

import torch
import torch.distributed as dist

from .state import RHTState

__all__ = ["rht_hook"]

_OF_BUCKETS = ("buffer", "index", "is_last", "parameters")  # the methods that the hook calls


def rht_hook(
    state: RHTState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
    *others: Any,
) -> torch.futures.Future[torch.Tensor]:
    """Mean of a gradient bucket over ranks through compressed payloads.

    Register with ``model.register_comm_hook(RHTState(bits=4), rht_hook)``, or more simply with
    ``rhtcomm.hooks.register(model, bits=4)``. ``backward()`` raises errors on this rank or in the
    exchange, as a RuntimeError with the original text. (If another rank fails after it has sent the
    last data of a step, the next ``backward()`` raises.) After an error the state refuses further
    buckets. On CUDA, payloads of another step or configuration are detected one or more buckets
    later, since the check does not wait.

    A profile has the ranges rhtcomm::encode, ::exchange and ::decode if it sees the worker thread:
    ``profile(experimental_config=_ExperimentalConfig(profile_all_threads=True))``.

    Args:
        state: the configuration and progress of this model's hook.
        bucket: passed by DDP; the mean replaces the gradients in its buffer.
        others: must be empty; calls by other wrappers are refused.

    Returns:
        A future of the bucket's mean over ranks, flat, in the dtype of its gradients.

    Raises:
        TypeError: the state is not an RHTState, or the caller is not DistributedDataParallel.
    """
    if not isinstance(state, RHTState):
        raise TypeError(
            f"rht_hook: its state is {state!r}, not an RHTState; register it with "
            "model.register_comm_hook(RHTState(bits=4), rht_hook)"
        )
    if others or not all(hasattr(bucket, name) for name in _OF_BUCKETS):
        kind = type(bucket).__name__
        raise TypeError(
            f"rht_hook: it was called with a {kind} instead of a GradBucket. It works only with "
            "DistributedDataParallel, not with FullyShardedDataParallel or with DDP under "
            "compiled autograd's Python reducer: wrap the model in DistributedDataParallel, and "
            'leave torch._dynamo.config.optimize_ddp at its default (not "python_reducer")'
        )
    return state.submit(bucket)
