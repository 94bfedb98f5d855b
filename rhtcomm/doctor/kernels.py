"""Which kernels run here, and why not better ones."""

import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from rhtcomm.doctor.finding import Finding

__all__ = ["INSTRUCTIONS", "gpu", "kernels", "loaded", "missing_instructions"]

# What the C kernels of an instruction set need, by the names in /proc/cpuinfo.
INSTRUCTIONS = {
    "avx512vbmi": ("avx512vbmi", "avx512_vbmi2"),
    "avx512": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "bmi1", "bmi2", "fma", "popcnt"),
}
VARIANTS = (*INSTRUCTIONS, "baseline")
LIMIT = 60  # seconds to load the library in
REBUILD = "install gcc or clang, then: {}"

# Loads the library in a process of its own, as a damaged one may end it.
PROBE = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
print(json.dumps({name: [hasattr(library, "rhtcomm_encode_" + name),
    bool(library.rhtcomm_supports(name.encode()))] for name in sys.argv[2:]}))
"""


def kernels() -> list[Finding]:
    """The kernels on CPU tensors."""
    from rhtcomm.kernels import build_command, choose, cpu
    from rhtcomm.quantizers import QuicFL

    forced = [f"{name}={os.environ[name]}" for name in _forcing()]
    unset = f"unset {' and '.join(name for name in _forcing())}"
    path = cpu.library_path()
    if path is None:
        fact = "the C kernels are not installed: plain torch takes their place, 40 times slower"
        return [Finding("problem", "kernels", fact, REBUILD.format(build_command()))]
    variants, failure = loaded(path)
    if failure:
        fact = f"the C kernels in {path} cannot be loaded ({failure})"
        return [Finding("problem", "kernels", fact, REBUILD.format(build_command()))]
    try:
        chosen = choose("cpu", QuicFL)
    except (RuntimeError, ValueError) as error:
        remedy = unset if forced else REBUILD.format(build_command())
        return [Finding("problem", "kernels", " ".join(str(error).split()), remedy)]
    variant = str(getattr(chosen, "variant", "reference"))
    best = next((name for name in VARIANTS if all(variants[name])), "baseline")
    if forced and variant == "reference":
        fact = f"{', '.join(forced)} forces plain torch, 40 times slower than the C kernels"
        return [Finding("problem", "kernels", fact, unset)]
    if forced:
        better = "" if variant == best else f", though this processor has {best}"
        fact = f"C kernels, {variant}: forced by {', '.join(forced)}{better}"
        return [Finding("remark", "kernels", fact, unset)]
    return [_chosen(variant, variants)]


def _chosen(variant: str, variants: dict[str, tuple[bool, bool]]) -> Finding:
    """What runs, and what the next better kernels lack: instructions, or a compiler for them."""
    fact = f"C kernels, {variant}"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return Finding("ok", "kernels", f"{fact}, the best for {platform.machine()}")
    better = VARIANTS[: VARIANTS.index(variant)]
    unbuilt = [name for name in better if variants[name][1] and not variants[name][0]]
    if unbuilt:
        fact += f"; the processor has {unbuilt[0]} too, but the compiler did not know it"
        return Finding("remark", "kernels", fact, "build rhtcomm again with a newer gcc or clang")
    if better:
        lacking = ", ".join(missing_instructions(better[-1])) or "some of its instructions"
        fact += f"; for {better[-1]} the processor lacks {lacking}"
    return Finding("ok", "kernels", fact)


def missing_instructions(variant: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Which instructions of a variant the processor lacks; none where nothing tells."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return [name for name in INSTRUCTIONS[variant] if flags and name not in flags]


def _forcing() -> list[str]:
    return [name for name in ("RHTCOMM_KERNELS", "RHTCOMM_CPU") if os.environ.get(name)]


@cache
def loaded(path: Path) -> tuple[dict[str, tuple[bool, bool]], str]:
    """Whether each instruction set was built, and is the processor's; or why that is unknown."""
    command = [sys.executable, "-c", PROBE, str(path), *VARIANTS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {}, f"loading it did not end within {LIMIT} s"
    if done.returncode < 0:
        return {}, f"loading it ends the process by signal {-done.returncode}"
    if done.returncode:
        return {}, (done.stderr.splitlines() or ["no message"])[-1]
    return {name: tuple(pair) for name, pair in json.loads(done.stdout).items()}, ""


def gpu() -> list[Finding]:
    """CUDA devices, and Triton, which the kernels on them need."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if built and Path("/dev/nvidiactl").exists():
            fact = f"torch was built for CUDA {built}, but cannot use the GPU of this machine"
            return [Finding("problem", "GPU", fact, "install the driver that this CUDA needs")]
        return [Finding("ok", "GPU", "torch finds no CUDA device; Triton is not needed")]
    device = torch.cuda.get_device_name()
    number = torch.cuda.device_count()
    fact = f"{number} CUDA device(s), {device}"
    try:
        from triton import __version__ as found  # its package has other names beside "triton"
    except ImportError:
        found = ""
    if not found or tuple(map(int, found.split(".")[:2])) < (3, 6):
        fact += f", but {f'Triton {found} is too old' if found else 'Triton is not installed'}: "
        fact += "plain torch compresses CUDA tensors, much slower"
        remedy = "pip install 'rhtcomm[gpu]', with torch 2.10 or newer"
        return [Finding("problem", "GPU", fact, remedy)]
    return [Finding("ok", "GPU", f"{fact}, Triton {found}")]
