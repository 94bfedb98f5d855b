"""The core tests on the oldest supported, the pinned and the newest versions: `make matrix`.

The oldest Triton that is supported is newer than the oldest torch, so it has a pair of its own.

Each pair of Python and torch has an environment of its own in build/matrix, into which the wheel is
installed. It prints a Markdown table, and fails if a test did or none was run. A pair whose
Python or torch cannot be had is skipped, with the reason. A torch from PyPI is a CUDA build on
Linux, which takes 5 to 6 GB. The environment may say:

    MATRIX="3.10:2.9.1 3.13:2.15.0"    pairs to run instead
    MATRIX_PYTHONS="/opt/python3.10 python3.13"    interpreters, in place of those found
    MATRIX_TESTS="tests/hooks/test_features.py -x"    arguments for pytest, not the core tests
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "matrix"
OLDEST_TRITON = ("3.12", "2.11.0")  # has Triton 3.6, the floor of the extra gpu
NEWEST = ("3.13", "2.15.0")  # that the tests have been run on; raise them together
CORE = (
    "codec communicators hooks kernels lib packaging/test_names.py plan quantizers reduce rotation"
)
# Of these, what takes minutes, or needs more than the package and pytest.
LEFT_OUT = (
    "communicators/test_mpi.py hooks/test_faults.py kernels/test_compilers.py "
    "quantizers/test_statistics.py"
)
COLUMNS = ("python", "torch", "triton", "numpy", "passed", "failed", "skipped", "remark")
VERSIONS = ("torch", "triton", "numpy")
VERSION = """
from importlib.metadata import distributions
import sys
print(*(found.version for found in distributions(name=sys.argv[1])))
"""


class Skipped(Exception):
    """Why a pair cannot be run here."""


@dataclass(frozen=True)
class Pair:
    python: str
    torch: str
    numpy: str = ""  # what pip is to install

    def run(self, interpreters: dict[str, str]) -> dict[str, str]:
        """The row of the table."""
        if self.python not in interpreters:
            raise Skipped(f"no Python {self.python} here; name one in MATRIX_PYTHONS")
        environment = FOLDER / f"python{self.python}-torch{self.torch}"
        python = str(environment / "bin" / "python")
        if not (environment / "installed").exists():
            call(interpreters[self.python], "-m", "venv", "--clear", str(environment))
            requirements = (f"torch=={self.torch}", f"numpy{self.numpy}", "pytest", "hypothesis")
            pip = subprocess.run(
                [python, "-m", "pip", "install", "--quiet", *requirements],
                stderr=subprocess.PIPE,
                text=True,
            )
            if pip.returncode:
                errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
                raise Skipped(f"pip says {' '.join(errors[:1])!r}")
            (environment / "installed").touch()
        call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(ROOT))
        report = environment / "report.xml"
        report.unlink(missing_ok=True)
        core = [f"tests/{path}" for path in CORE.split()]
        core += [f"--ignore=tests/{file}" for file in LEFT_OUT.split()]
        tests = os.environ.get("MATRIX_TESTS") or " ".join(core)
        # Not `python -m pytest`, which would import the checkout in place of the wheel.
        command = [str(environment / "bin" / "pytest"), *tests.split(), f"--junit-xml={report}"]
        subprocess.run([*command, "--quiet", "-p", "no:cacheprovider"], cwd=ROOT)
        if not report.exists():
            raise RuntimeError("pytest did not end")
        (suite,) = ElementTree.parse(report).iter("testsuite")
        numbers = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "skipped")}
        failed = numbers["failures"] + int(suite.get("errors", 0))
        return {
            **{name: call(python, "-c", VERSION, name).strip() for name in VERSIONS},
            "failed": str(failed),
            "passed": str(numbers["tests"] - failed - numbers["skipped"]),
            "skipped": str(numbers["skipped"]),
        }


def call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "nothing was printed").splitlines()[-1]
        raise RuntimeError(f"{' '.join(command[:4])} ...: {last}")
    return done.stdout


def pairs() -> list[Pair]:
    """The floors of pyproject.toml, the oldest Triton, the pins of constraints.txt, the newest."""
    if wanted := os.environ.get("MATRIX"):
        return [Pair(*pair.split(":")) for pair in wanted.split()]
    project, pins = (ROOT / name for name in ("pyproject.toml", "constraints.txt"))

    def found(pattern: str, file: Path) -> str:
        (version,) = re.findall(pattern, file.read_text(), re.MULTILINE)
        return str(version)

    floor = found(r'^requires-python = ">=([\d.]+)"', project)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    lowest = found(r'"numpy>=([\d.]+)"', project)
    return [
        Pair(floor, found(r'"torch>=([\d.]+)"', project), f"=={lowest}.*"),
        Pair(*OLDEST_TRITON),
        Pair(here, found(r"^torch==([\d.]+)", pins)),
        Pair(*NEWEST),
    ]


def find_interpreters() -> dict[str, str]:
    """By version, as in "3.11"; a command that does not run is left out."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    given = os.environ.get("MATRIX_PYTHONS", "").split()
    names = given or [
        sys.executable,
        *(f"python3.{minor}" for minor in range(10, 20)),
        *map(str, sorted(pyenv.glob("versions/*/bin/python"))),
    ]
    found: dict[str, str] = {}
    for name in names:
        if command := shutil.which(name):
            version = "import sys; print('%d.%d' % sys.version_info[:2])"
            done = subprocess.run([command, "-c", version], capture_output=True, text=True)
            if done.returncode == 0:
                found.setdefault(done.stdout.strip(), command)
    return found


def main() -> int:
    os.environ["RHTCOMM_REQUIRE_KERNELS"] = "1"
    interpreters, rows, failed, ran = find_interpreters(), [], False, False
    for pair in pairs():
        print(f"== Python {pair.python}, torch {pair.torch}", flush=True)
        row = {"python": pair.python, "torch": pair.torch}
        try:
            row |= pair.run(interpreters)
            failed |= row["failed"] != "0"
            ran = True
        except Skipped as reason:
            row["remark"] = f"skipped: {reason}"
        except RuntimeError as error:
            row["remark"] = f"failed: {error}"
            failed = True
        rows.append(row)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows:
        print(f"| {' | '.join(row.get(column, '') for column in COLUMNS)} |")
    return int(failed or not ran)


if __name__ == "__main__":
    sys.exit(main())
