"""Process groups of torch: what carries their messages, and their end."""

import contextlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["backend_of", "backends_of", "destroy", "timeout_of"]


def backend_of(group: dist.ProcessGroup, device: str) -> str:
    """The backend that carries a group's tensors on a kind of device, such as "gloo"."""
    config = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    backends = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)
    return backends.get(device, config)


def backends_of(group: dist.ProcessGroup) -> set[str]:
    """All backends of a group, for any device."""
    config = dist.get_backend_config(group)
    return {pair.rpartition(":")[2] for pair in config.split(",")}


def destroy(group: Any) -> None:
    """Make torch forget a group; its connections close with the last reference to it."""
    if isinstance(group, dist.ProcessGroup) and dist.is_initialized():
        with contextlib.suppress(ValueError):  # it was destroyed with its world
            dist.destroy_process_group(group)


def timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """The group's timeout on Gloo; None if torch does not tell."""
    try:
        found = group._get_backend(torch.device("cpu")).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, timedelta) else None
