"""The wheel of aarch64 under qemu-user, in Debian's Python and PyPI's torch of that processor."""

import platform
import shutil
import sys
from pathlib import Path

from build_wheels import Skipped, call

__all__ = ["emulated"]

KNOWN_ANSWERS = Path(__file__).with_name("known_answers.py")
DEBIAN, PYTHON = "bookworm", "3.11"
# The newest torch whose wheel for aarch64 on PyPI needs no CUDA, and what importing it takes.
REQUIREMENTS = ("torch==2.10.0", "numpy==2.3.5", "typing_extensions", "filelock", "fsspec")
REQUIREMENTS += ("tqdm", "jinja2", "markupsafe", "mpmath", "networkx", "sympy")


def emulated(wheel: Path, folder: Path) -> str:
    """The known answers there. What was downloaded (0.3 GB) stays in the folder."""
    if platform.machine() != "x86_64":
        raise Skipped(f"this machine is {platform.machine()}, not x86_64")
    for tool, package in (("qemu-aarch64", "qemu-user"), ("mmdebstrap", "mmdebstrap")):
        if shutil.which(tool) is None:
            raise Skipped(f"{tool} cannot be found (Debian: apt-get install {package})")
    root, site, complete = folder / "root", folder / "site", folder / "complete"
    wanted = " ".join((DEBIAN, PYTHON, *REQUIREMENTS))
    if not complete.exists() or complete.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        packages = f"python{PYTHON},libstdc++6"
        debian = ("--arch=arm64", "--variant=extract", f"--include={packages}", DEBIAN)
        call("mmdebstrap", *debian, root)
        install(site, *REQUIREMENTS)
        complete.write_text(wanted)
    for installed in site.glob("rhtcomm*"):
        shutil.rmtree(installed)
    install(site, str(wheel))
    emulator = ("qemu-aarch64", "-L", root, root / "usr" / "bin" / f"python{PYTHON}")
    return call(*emulator, KNOWN_ANSWERS, "wheel", cwd=folder, PYTHONPATH=str(site))


def install(to: Path, *requirements: str) -> None:
    """By this machine's pip, which would ask for what those with its own processor need."""
    options = ["--python-version", PYTHON, "--only-binary=:all:", "--no-deps"]
    for glibc in ("2_28", "2_27", "2_17"):
        options += ["--platform", f"manylinux_{glibc}_aarch64"]
    call(sys.executable, "-m", "pip", "install", "--target", to, *options, *requirements)
