"""The inner loops: whole blocks in, packed codes and scales out, and back.

`reference` says in plain torch what every kernel computes, and runs on any device. `cpu` does the
same in C, `gpu` in Triton, bit for bit. Which one runs is chosen here:

    RHTCOMM_KERNELS=reference | cpu | gpu    forces one; asking for what is missing raises
    RHTCOMM_CPU=avx512vbmi | avx512 | avx2 | baseline    forces an instruction set of the C kernels

Both are read once, when the first tensor of a kind of device and quantizer is compressed.

Without them the C kernels run on CPU tensors where they were built, in the widest instruction set
that the processor has, and the Triton kernels on CUDA (or ROCm) tensors where Triton is installed.
With TRITON_INTERPRET=1, RHTCOMM_KERNELS=gpu runs them on CPU tensors, for tests.
"""

import json
import logging
import os
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import torch

from rhtcomm.kernels import cpu, reference
from rhtcomm.kernels.task import Section, Task
from rhtcomm.once import once
from rhtcomm.quantizers import Quantizer

__all__ = ["DTYPES", "Kernel", "Section", "Task", "kernel_for"]

DTYPES = cpu.DTYPES


class Kernel(Protocol):
    """Works on the blocks of one size d, B of them in each of R adjacent parts of a tensor."""

    def encode(
        self,
        task: Task,
        x: torch.Tensor,
        payloads: torch.Tensor,
        moments: torch.Tensor | None = None,
    ) -> None:
        """Contiguous x (numel,) -> scales and codes of `task.section` in payloads (R, nbytes).

        Where it is given, moments (R B, 10) float32 receives the blocks' `rotation.block_moments`,
        summed in an order that is the kernel's own.
        """

    def decode(self, task: Task, payloads: torch.Tensor, out: torch.Tensor) -> None:
        """payloads (K, R, nbytes) of K adjacent ranks -> the mean, in its place in out (numel,)."""


def kernel_for(device: torch.device, quantizer: Quantizer) -> Kernel:
    """The kernel that runs here.

    Raises:
        ValueError: RHTCOMM_KERNELS or RHTCOMM_CPU has an unknown value.
        RuntimeError: the kernels that one of them asks for are missing.
    """
    return _kernel_for(device, type(quantizer))


@once
def _kernel_for(place: torch.device, quantizer: type[Quantizer]) -> Kernel:
    device = place.type
    wanted = os.environ.get("RHTCOMM_KERNELS") or None
    if wanted not in (None, "reference", "cpu", "gpu"):
        raise ValueError(f"RHTCOMM_KERNELS={wanted!r} must be 'reference', 'cpu' or 'gpu'")
    if wanted == "reference":
        return reference
    if quantizer in cpu.QUANTIZERS:  # which all of them have
        if device == "cpu" and wanted != "gpu":
            return _for_cpu(wanted, os.environ.get("RHTCOMM_CPU") or None)
        if device in ("cpu", "cuda") and wanted != "cpu":
            return _for_gpu(device, wanted)
    if wanted is not None:
        raise RuntimeError(
            f"RHTCOMM_KERNELS={wanted}, but it has none for {quantizer.__name__} on "
            f"{device}; unset it"
        )
    return reference


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
        f"    {_build_command()}\n"
    )
    if wanted or variant:
        raise RuntimeError(f"the C kernels were asked for, but they {fact}. {remedy}") from cause
    logging.getLogger("rhtcomm").warning(
        "the C kernels %s; the torch reference takes their place, at a thirtieth of their speed. "
        "%s",
        fact,
        remedy,
    )
    return reference


def _build_command() -> str:
    """Installs the package again from where it came from, with C kernels or an error.

    pip keeps the wheels that it built, those without kernels too, and would take one of them again.
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
    """What to tell pip to install, by what it noted when it did so last."""
    try:
        distribution = metadata.distribution("rhtcomm")
    except (
        metadata.PackageNotFoundError
    ):  # a checkout on the path, with this file in rhtcomm/kernels
        return shlex.quote(str(Path(__file__).parents[2]))
    facts = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not facts or urlsplit(facts["url"]).path.endswith(".whl"):  # which nothing is built from
        return f"--no-binary rhtcomm rhtcomm=={distribution.version}"
    url = facts["url"]
    if "vcs_info" in facts:
        url = f"{facts['vcs_info']['vcs']}+{url}@{facts['vcs_info']['commit_id']}"
    editable = facts.get("dir_info", {}).get("editable", False)
    return f"{'--editable ' if editable else ''}{shlex.quote(url)}"


@once
def _for_gpu(device: str, wanted: str | None) -> Kernel:
    try:
        from rhtcomm.kernels import gpu
    except ImportError as missing:
        remedy = "pip install 'rhtcomm[gpu]'"
        if wanted:
            raise RuntimeError(
                f"RHTCOMM_KERNELS={wanted}, but Triton cannot be imported ({missing}): {remedy}"
            ) from missing
        logging.getLogger("rhtcomm").warning(
            "Triton cannot be imported (%s), so the much slower torch reference is in use on "
            "CUDA tensors: %s",
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
    return gpu
