"""`make wheels`: builds what is uploaded to PyPI into dist/, and tries all of it.

Each check prints a line, or what went wrong; one that cannot be made here is skipped, with the
reason. The run ends with 1 if any of them failed. docs/release.md says what else a release takes.
"""

import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from email.parser import BytesParser
from pathlib import Path

from aarch64 import emulated
from build_wheels import ARCHITECTURES, ROOT, Failed, Skipped, build, call, missing_compiler, unpack
from installs import Environment

from rhtcomm.versions import PACKAGE

DIST = ROOT / "dist"


class Checks:
    """Of `make wheels`."""

    def __init__(self, work: Path) -> None:
        self.work, self.failed, self.epoch = work, False, os.environ.get("SOURCE_DATE_EPOCH", "")
        self.sdist = DIST / f"rhtcomm-{PACKAGE}.tar.gz"

    def check(self, name: str, function: Callable[[], str]) -> None:
        start = time.monotonic()
        try:
            said = function().strip().splitlines() or ["fine"]
        except Skipped as reason:
            said = [f"skipped: {reason}"]
        except Failed as failure:
            self.failed, said = True, ["FAILED", *str(failure).splitlines()]
        print(f"{name} ({time.monotonic() - start:.0f} s)", *said, sep="\n    ", flush=True)

    def built(self) -> str:
        self.epoch = self.epoch or call("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()
        shutil.rmtree(DIST, ignore_errors=True)
        built = build(ROOT, self.work / "first", DIST, self.epoch)
        sizes = [f"{path.name}: {path.stat().st_size / 1024:.0f} KiB" for path in built]
        missing = [f"{name}: {why}" for name in ARCHITECTURES if (why := missing_compiler(name))]
        return "\n".join([*sizes, *(f"no wheel for {line}" for line in missing)])

    def reproducible(self) -> str:
        """The same bytes from another path and from the sdist as from the checkout."""
        source = unpack(self.sdist, self.work / "another path")
        again = build(source, self.work / "second", self.work / "again", self.epoch)
        for path in again:
            if path.read_bytes() != (DIST / path.name).read_bytes():
                raise Failed(f"{path.name} has other bytes when it is built again")
        return f"{len(again)} files have the same bytes (SOURCE_DATE_EPOCH={self.epoch})"

    def described(self) -> str:
        """What PyPI will show and pip will read."""
        for wheel in DIST.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = archive.namelist()
                information = f"rhtcomm-{PACKAGE}.dist-info"
                metadata = BytesParser().parsebytes(archive.read(f"{information}/METADATA"))
            libraries = [name for name in names if name.endswith(".so")]
            if libraries != ["rhtcomm/kernels/rhtcomm_cpu.so"]:
                raise Failed(f"{wheel.name} holds the libraries {libraries}")
            if sources := [name for name in names if name.endswith((".c", ".h", ".pyc"))]:
                raise Failed(f"{wheel.name} holds {', '.join(sources)}")
            if f"{information}/licenses/LICENSE" not in names:
                raise Failed(f"{wheel.name} has no licence")
            if metadata["Version"] != PACKAGE:
                raise Failed(f"{wheel.name} says that it is version {metadata['Version']}")
        files = sorted(DIST.iterdir())
        call(sys.executable, "-m", "twine", "check", "--strict", *files)
        return f"version {PACKAGE}, licence, README and kernels are there; C sources are not"

    def installed(self) -> None:
        machine = os.uname().machine
        (wheel,) = DIST.glob(f"*_{machine}.whl")
        environment = Environment(self.work, wheel, self.sdist)
        self.check(f"the {machine} wheel, no compiler on PATH", environment.from_wheel)
        self.check("pip install 'a path with blanks'", environment.from_path_with_blanks)
        self.check("pip install of the sdist", environment.from_sdist)
        self.check("pip install with clang", environment.with_clang)
        self.check("pip install without a compiler", environment.without_compiler)

    def emulated(self) -> str:
        if reason := missing_compiler("aarch64"):
            raise Skipped(reason)
        (wheel,) = DIST.glob("*_aarch64.whl")
        return emulated(wheel, ROOT / "build" / "aarch64")


def main() -> int:
    for name in ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS"):  # what is uploaded depends on none
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(Path(folder))
        checks.check("sdist and wheels", checks.built)
        if checks.failed:
            return 1
        checks.check("built again elsewhere", checks.reproducible)
        checks.check("contents and description", checks.described)
        checks.installed()
        checks.check("the aarch64 wheel, under qemu", checks.emulated)
    print("Something FAILED." if checks.failed else f"dist/ holds rhtcomm {PACKAGE}.")
    return int(checks.failed)


if __name__ == "__main__":
    sys.exit(main())
