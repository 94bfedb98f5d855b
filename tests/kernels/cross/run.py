"""`make cross`: the C kernels on other processors, and by other compilers than the default one.

Each target's driver runs the same cases in every floating-point mode that its processor has, and
compares all bits with what the torch reference made of them here. What is missing is skipped, with
the reason; a target that fails ends the run with 1.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
# As CMakeLists.txt does for the baseline.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fopenmp"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
DEFINITIONS = ["-DVARIANT=baseline", "-DDISPATCH"]


class Target(NamedTuple):
    name: str
    compiler: str
    emulator: tuple[str, ...]
    packages: str
    """Debian's."""


TARGETS = (
    Target("this machine, gcc", "gcc", (), "gcc"),
    Target("this machine, clang", "clang", (), "clang libomp-dev"),
    Target(
        "aarch64",
        "aarch64-linux-gnu-gcc",
        ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
        "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user",
    ),
    Target(
        "riscv64",
        "riscv64-linux-gnu-gcc",
        ("qemu-riscv64", "-L", "/usr/riscv64-linux-gnu"),
        "gcc-riscv64-linux-gnu libc6-dev-riscv64-cross qemu-user",
    ),
)


def check(target: Target, cases: Path, folder: Path) -> bool:
    start, driver = time.monotonic(), folder / target.name.replace(" ", "-")
    sources = [str(FOLDER / "driver.c"), "-o", str(driver), "-lm"]
    for command in (
        [target.compiler, *FLAGS, *WARNINGS, *DEFINITIONS, *sources],
        [*target.emulator, str(driver), str(cases)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{target.name}: FAILED: {' '.join(command)}\n{done.stdout}{done.stderr}")
            return False
    print(f"{target.name}: {done.stdout.strip()} ({time.monotonic() - start:.0f} s)")
    return True


def has_openmp(compiler: str) -> bool:
    """Whether a program links with it; Debian's clang comes without."""
    command = [compiler, "-fopenmp", "-xc", "-", "-o", "/dev/null"]
    program = "int main(void) { return 0; }"
    return subprocess.run(command, input=program, capture_output=True, text=True).returncode == 0


def main() -> int:
    good = True
    with tempfile.TemporaryDirectory() as name:
        cases = Path(name) / "cases"
        subprocess.run([sys.executable, str(FOLDER / "cases.py"), str(cases)], check=True)
        for target in TARGETS:
            tools = (target.compiler, *target.emulator[:1])
            missing = [tool for tool in tools if shutil.which(tool) is None]
            if not missing and not has_openmp(target.compiler):
                missing = [f"{target.compiler}'s library of OpenMP"]
            if missing:
                print(
                    f"{target.name}: skipped, as {' and '.join(missing)} cannot be found "
                    f"(Debian: apt-get install {target.packages})",
                    flush=True,
                )
            else:
                good &= check(target, cases, Path(name))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
