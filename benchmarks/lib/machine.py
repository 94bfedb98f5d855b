"""The facts of a machine that a figure must state."""

import platform

import torch

from rhtcomm.bench.machine import kernels, processor


def machine() -> str:
    """Processor, threads, versions, and the kernels in use."""
    return (
        f"{processor()}, {torch.get_num_threads()} threads by default; torch {torch.__version__}, "
        f"Python {platform.python_version()}; kernels: {kernels(torch.device('cpu'))}"
    )
