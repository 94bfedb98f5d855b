"""The facts of a machine that a figure must state."""

import os
import platform
from pathlib import Path

import torch

from rhtcomm.kernels import kernel_for
from rhtcomm.quantizers import QuicFL

__all__ = ["cores", "kernels", "processor"]


def processor() -> str:
    """Its name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def kernels(device: torch.device) -> str:
    """The codec's, for tensors on a device."""
    kernel = kernel_for(device, QuicFL(4))
    name = getattr(kernel, "variant", None) or getattr(kernel, "__name__", type(kernel).__name__)
    return str(name).rpartition(".")[2]
