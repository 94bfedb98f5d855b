"""The inner loops: tensors in, packed codes and scales out, and back.

`reference` defines in plain torch what every kernel computes, and runs on any device. `cpu`
computes the same bits in C, `gpu` in Triton. This module chooses one:

    RHTCOMM_KERNELS=reference | cpu | gpu    forces one; asking for what is missing raises
    RHTCOMM_CPU=avx512vbmi | avx512 | avx2 | baseline    forces an instruction set of the C kernels

Both are read once per type of device and quantizer, when the first tensor is compressed.

By default the C kernels run on CPU tensors if they were built, with the widest instruction set that
the processor has, and the Triton kernels on CUDA (or ROCm) tensors if Triton is installed. With
TRITON_INTERPRET=1, RHTCOMM_KERNELS=gpu runs them on CPU tensors, for tests.
"""

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import torch

from rhtcomm.kernels import cpu, lattice, lattice_cpu, reference
from rhtcomm.kernels.feedback import Feedback, Residual
from rhtcomm.kernels.lattice import LatticeKernel, LatticeTask
from rhtcomm.kernels.task import Task
from rhtcomm.once import once
from rhtcomm.quantizers import ECDQ, Quantizer, QuicFL
from rhtcomm.randomness import Key

__all__ = [
    "DTYPES",
    "Feedback",
    "Kernel",
    "LatticeKernel",
    "LatticeTask",
    "Residual",
    "Task",
    "build_command",
    "choose",
    "kernel_for",
    "lattice_kernel_for",
    "use",
]

DTYPES = cpu.DTYPES


class Kernel(Protocol):
    """Encodes and decodes tensors of a task, R shards of B blocks each."""

    def encode(
        self,
        task: Task,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        x: torch.Tensor,
        payloads: torch.Tensor,
        moments: torch.Tensor | None = None,
        residual: Residual | None = None,
    ) -> None:
        """Write the payloads of x from `rank`, except their headers.

        Args:
            offset: of x in its bucket, a multiple of the block.
            x: (R numel,), contiguous.
            payloads: (R, at least nbytes) uint8. Rows are contiguous and begin at addresses that 4
                divides.
            moments: (R B, 10) float32, output for `rhtcomm.moments.block_moments`: section after
                section, and shard after shard within a section. Kernels may sum in any order.
            residual: error feedback: added to x, see `rhtcomm.kernels.feedback`.
        """

    def decode(
        self,
        task: Task,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        payloads: torch.Tensor,
        out: torch.Tensor,
        feedback: Feedback | None = None,
    ) -> None:
        """Write the mean of the tensors that K adjacent ranks, starting with `rank`, encoded.

        Args:
            offset: as for `encode`.
            payloads: (K, R, at least nbytes) uint8, rows as for `encode`.
            out: (R numel,), contiguous.
            feedback: updates a residual, see `rhtcomm.kernels.feedback`. Then `out` holds x, and
                the task is that of the payloads that this rank sent, too.
        """


def kernel_for(device: torch.device, quantizer: Quantizer) -> Kernel:
    """The kernel for tensors on this device.

    Raises:
        ValueError: RHTCOMM_KERNELS or RHTCOMM_CPU has an unknown value.
        RuntimeError: the requested kernels are missing.
    """
    return _forced or _chosen(device.type, type(quantizer))


def lattice_kernel_for(device: torch.device) -> LatticeKernel:
    """The lattice's kernel for tensors on this device: of the kind that codecs use there.

    Raises:
        ValueError, RuntimeError: as `kernel_for` does.
    """
    kernel = _forced or _chosen(device.type, QuicFL)
    if isinstance(kernel, cpu.Library):
        return lattice_cpu.of(kernel)
    if kernel is sys.modules.get("rhtcomm.kernels.gpu"):
        from rhtcomm.kernels import lattice_gpu

        return lattice_gpu
    return lattice


@contextmanager
def use(kernel: Kernel) -> Iterator[None]:
    """A context in which all codecs use this kernel, on all threads; for tests and benchmarks."""
    global _forced
    before, _forced = _forced, kernel
    try:
        yield
    finally:
        _forced = before


_forced: Kernel | None = None


def choose(device: str, quantizer: type[Quantizer]) -> Kernel:
    """What `kernel_for` would choose for a type of device with the current environment.

    Raises:
        ValueError, RuntimeError: as `kernel_for` does.
    """
    wanted = os.environ.get("RHTCOMM_KERNELS") or None
    if wanted not in (None, "reference", "cpu", "gpu"):
        raise ValueError(f"RHTCOMM_KERNELS={wanted!r} must be 'reference', 'cpu' or 'gpu'")
    if wanted == "reference":
        return reference
    if quantizer in cpu.QUANTIZERS and device == "cpu" and wanted != "gpu":
        return _for_cpu(wanted, os.environ.get("RHTCOMM_CPU") or None)
    if quantizer in cpu.QUANTIZERS and device in ("cpu", "cuda") and wanted != "cpu":
        return _for_gpu(device, wanted, quantizer is ECDQ)
    if wanted is not None:
        raise RuntimeError(
            f"RHTCOMM_KERNELS={wanted}, but there are no such kernels for {quantizer.__name__} on "
            f"{device}; unset it"
        )
    return reference


_chosen = once(choose)


@once
def _for_cpu(wanted: str | None, variant: str | None) -> Kernel:
    path = cpu.library_path()
    fact, cause = "were not built: there was no C compiler, or it failed", None
    if path is not None:
        try:
            return cpu.Library(path, variant)
        except OSError as failure:
            fact, cause = f"could not be loaded ({failure})", failure
    remedy = (
        "To build them, or to see why that fails, install a C compiler (gcc or clang) and run\n\n"
        f"    {build_command()}\n"
    )
    if wanted or variant:
        raise RuntimeError(f"the C kernels were requested, but they {fact}. {remedy}") from cause
    logging.getLogger("rhtcomm").warning(
        "the C kernels %s; the torch reference is used instead, which is about 40 times slower. %s",
        fact,
        remedy,
    )
    return reference


def build_command() -> str:
    """The command that reinstalls the package from source, with C kernels or an error.

    pip caches the wheels that it built, including those without kernels, and would reuse one.
    Environments made by uv have no pip.
    """
    python = shlex.quote(sys.executable)
    pip = f"{python} -m pip"
    before = "" if find_spec("pip") else f"{python} -m ensurepip; "
    return (
        f"{before}{pip} cache remove rhtcomm; RHTCOMM_REQUIRE_KERNELS=1 "
        f"{pip} install --no-cache-dir --force-reinstall --no-deps -v {_source()}"
    )


def _source() -> str:
    """The source to install, from pip's record of the last installation."""
    try:
        distribution = metadata.distribution("rhtcomm")
    except (
        metadata.PackageNotFoundError
    ):  # a checkout on the path, with this file in rhtcomm/kernels
        return shlex.quote(str(Path(__file__).parents[2]))
    facts = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not facts or urlsplit(facts["url"]).path.endswith(".whl"):  # nothing is built from it
        return f"--no-binary rhtcomm rhtcomm=={distribution.version}"
    url = facts["url"]
    if "vcs_info" in facts:
        url = f"{facts['vcs_info']['vcs']}+{url}@{facts['vcs_info']['commit_id']}"
    editable = facts.get("dir_info", {}).get("editable", False)
    return f"{'--editable ' if editable else ''}{shlex.quote(url)}"


@once
def _for_gpu(device: str, wanted: str | None, in_units: bool) -> Kernel:
    try:
        from triton import __version__

        if tuple(map(int, __version__.split(".")[:2])) < (3, 6):
            raise ImportError(f"it is version {__version__}, but the kernels need 3.6 or newer")
        from rhtcomm.kernels import gpu, gpu_units
    except ImportError as missing:
        remedy = "pip install 'rhtcomm[gpu]', with torch 2.10 or newer"
        if wanted:
            raise RuntimeError(
                f"RHTCOMM_KERNELS={wanted}, but Triton cannot be used ({missing}): {remedy}"
            ) from missing
        logging.getLogger("rhtcomm").warning(
            "Triton cannot be used (%s), so CUDA tensors use the much slower torch reference: %s",
            missing,
            remedy,
        )
        return reference
    if (device == "cpu") != gpu.interpreted():
        raise RuntimeError(
            f"the Triton kernels run on {'CPU' if gpu.interpreted() else 'CUDA'} tensors in this "
            f"process, not on {device}, because TRITON_INTERPRET "
            f"{'is' if gpu.interpreted() else 'is not'} set; change that, or RHTCOMM_KERNELS"
        )
    return gpu_units if in_units else gpu
