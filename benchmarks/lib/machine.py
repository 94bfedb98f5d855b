"""The facts of a machine that a figure must state."""

import platform
from pathlib import Path

import torch

import rhtcomm
from rhtcomm.kernels import kernel_for


def machine() -> str:
    """Processor, threads, versions, and the kernels in use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    kernel = kernel_for(torch.device("cpu"), rhtcomm.QuicFL(4))
    return (
        f"{name}, {torch.get_num_threads()} threads by default; torch {torch.__version__}, Python "
        f"{platform.python_version()}; kernels: {getattr(kernel, 'variant', 'reference')}"
    )
