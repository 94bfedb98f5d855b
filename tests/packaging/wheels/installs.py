"""Installs into an environment that holds nothing but torch, and the known answers there."""

import os
import shutil
import sys
from pathlib import Path

from build_wheels import ROOT, Failed, Skipped, call, unpack

__all__ = ["Environment"]

KNOWN_ANSWERS = Path(__file__).with_name("known_answers.py")


class Environment:
    """A virtual environment, in which one way to install follows the other."""

    def __init__(self, work: Path, wheel: Path, sdist: Path) -> None:
        self.work, self.wheel, self.sdist = work, wheel, sdist
        self.bin = work / "environment" / "bin"
        self.python, self.log = self.bin / "python", ""

    def from_wheel(self) -> str:
        """With its dependencies, and no program on PATH but those of the environment."""
        call(sys.executable, "-m", "venv", self.bin.parent)
        pins = ("--constraint", ROOT / "constraints.txt")
        self._pip("install", *pins, self.wheel, PATH=str(self.bin))
        self._pip("check", PATH=str(self.bin))
        return self._answers("wheel", PATH=str(self.bin))

    def from_path_with_blanks(self) -> str:
        source = unpack(self.sdist, self.work / "a path with blanks")
        return self._reinstalled(source, "kernels")

    def from_sdist(self) -> str:
        return self._reinstalled(self.sdist, "kernels")

    def with_clang(self) -> str:
        """As the machine's only compiler: `cc`, the one that CMake asks for first, is clang."""
        clang = shutil.which("clang")
        if clang is None:
            raise Skipped("clang cannot be found (Debian: apt-get install clang libomp-dev)")
        only = self.work / "only clang"
        only.mkdir()
        (only / "cc").symlink_to(clang)
        path = f"{only}{os.pathsep}{os.environ['PATH']}"
        said = self._reinstalled(self.sdist, "kernels", PATH=path)
        if "C compiler identification is Clang" not in self.log:
            raise Failed(f"another compiler than {clang} built the kernels:\n{self.log}")
        return said

    def without_compiler(self) -> str:
        """CMake finds the one that CC names, or none."""
        nothing = {"CC": "no-such-compiler"}
        try:
            self._reinstalled(self.sdist, "kernels", **nothing, RHTCOMM_REQUIRE_KERNELS="1")
        except Failed as failure:
            if "no-such-compiler" not in str(failure):
                raise
        else:
            raise Failed("RHTCOMM_REQUIRE_KERNELS=1 installed without a compiler")
        return self._reinstalled(self.sdist, "reference", **nothing)

    def _reinstalled(self, source: Path, kernels: str, **environment: str) -> str:
        environment = {"RHTCOMM_REQUIRE_KERNELS": "", **environment}
        self._pip("uninstall", "--yes", "rhtcomm")
        options = ("-v", "--no-deps", "--no-cache-dir")
        self.log = self._pip("install", *options, source, **environment)
        return self._answers(kernels)

    def _pip(self, *arguments: str | Path, **environment: str) -> str:
        return call(self.python, "-m", "pip", *arguments, cwd=self.work, **environment)

    def _answers(self, kernels: str, **environment: str) -> str:
        return call(self.python, KNOWN_ANSWERS, kernels, cwd=self.work, **environment)
