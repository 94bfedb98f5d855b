"""The MPI of mpiexec against mpi4py's, and what launch/mpirun.sh gives to each mpiexec."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import ROOT, limit

from rhtcomm.doctor.launcher import Launch
from rhtcomm.doctor.mpi import mpi, vendor_of

VERSIONS = {
    "MPICH": "HYDRA build details:\n    Version:                                 5.0.2",
    "Open MPI": "mpiexec (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/",
    "Open MPI 4": "mpiexec (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/",
    "Intel MPI": "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626",
}
MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
try:
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    REASON, VENDOR = None, MPI.get_vendor()[0]
except (ImportError, RuntimeError) as missing:
    REASON, VENDOR = f"mpi4py cannot be used here: {missing}", ""
needs_mpi = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_mpich = pytest.mark.skipif(
    VENDOR not in ("MPICH", "Intel MPI"), reason="mpi4py has no MPI of Hydra's kind here"
)


def test_vendors_by_what_mpiexec_prints() -> None:
    for vendor, version in VERSIONS.items():
        assert vendor_of(version) == vendor.removesuffix(" 4")
    assert vendor_of("mpiexec of somebody 1.0") is None
    if MPIEXEC.exists():
        said = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True).stdout
        assert vendor_of(said) == VENDOR


# Worlds of one rank ------------------------------------------------------------------------------


@needs_mpi
def test_ranks_that_mpi_takes_for_worlds_of_their_own() -> None:
    """This process was started by no mpiexec at all, whatever the launch says."""
    (found,), facts = mpi(Launch("Open MPI", world_size=2, local_size=2, has_mpi=True), limit(60))
    assert (found.grade, found.topic) == ("problem", "MPI")
    assert "mpiexec of Open MPI started 2 ranks, but the world of mpi4py" in found.fact
    assert "has 1: each rank is alone" in found.fact
    assert f"start with the mpiexec of {VENDOR}" in found.remedy
    assert facts == {}


@needs_mpi
def test_an_mpiexec_of_another_mpi_is_found(
    monkeypatch: pytest.MonkeyPatch, fake: Callable[[str], Path]
) -> None:
    other = "Open MPI" if VENDOR != "Open MPI" else "MPICH"
    folder = fake(other).parent
    monkeypatch.setattr(sys, "prefix", str(folder.parent))
    (found,), _ = mpi(Launch(), 60)
    assert found.grade == "remark"
    assert f"{folder}/mpiexec is of {other}: each rank would be alone" in found.fact
    fake(VENDOR)
    (found,), _ = mpi(Launch(), 60)
    assert (found.grade, "fits it" in found.fact) == ("ok", True)


@needs_mpich
@pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec lies beside the interpreter")
def test_doctor_under_the_real_mpiexec() -> None:
    done = subprocess.run(
        [str(ROOT / "launch" / "mpirun.sh"), "2", "-m", "rhtcomm", "doctor", "--json"],
        env=environment(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    report = json.loads(done.stdout)
    assert (report["launcher"], report["world_size"]) == (VENDOR, 2)
    found = {one["topic"]: one for one in report["findings"] if one["ranks"] == [0, 1]}
    for topic in ("MPI", "exchange", "cores"):
        assert found[topic]["grade"] == "ok", found[topic]
    assert found["MPI"]["fact"].endswith(", 2 ranks, a sum is right")
    assert done.returncode == (report["counts"]["problem"] > 0)


# launch/mpirun.sh --------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], Path]:
    """Writes an mpiexec that says it is of an MPI, and prints its arguments."""

    def write(name: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "version").write_text(VERSIONS[name])
        script = folder / "mpiexec"
        show = 'printf "%s\\n" "$@" "OMP_NUM_THREADS=$OMP_NUM_THREADS" "I_MPI_PIN=${I_MPI_PIN:-}"'
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then cat "{folder}/version"; exit; fi\n{show}\n'
        )
        script.chmod(0o755)
        return script

    return write


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], Path]:
    """Writes an interpreter whose mpi4py uses some MPI, on a machine with two cores."""

    def write(vendor: str) -> Path:
        script = tmp_path / "python"
        script.write_text(
            '#!/bin/sh\ncase "$2" in\n'
            f'  *mpi4py*) echo "{vendor}" ;;\n  *cpu_count*) echo 2 ;;\n  *) exit 1 ;;\nesac\n'
        )
        script.chmod(0o755)
        return script

    return write


def environment(**variables: str) -> dict[str, str]:
    prefixes = ("OMPI_", "PMI", "I_MPI_", "SLURM_", "MPIEXEC", "OMP_", "RHTCOMM_", "GLOO_")
    return {k: v for k, v in os.environ.items() if not k.startswith(prefixes)} | variables


def mpirun(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(ROOT / "launch" / "mpirun.sh"), *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=limit(60),
    )


ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
OVERSUBSCRIBE = {"Open MPI": "--map-by\n:OVERSUBSCRIBE", "Open MPI 4": "--oversubscribe"}


@pytest.mark.parametrize("name", VERSIONS)
def test_what_mpirun_adds(
    name: str, fake: Callable[[str], Path], python: Callable[[str], Path]
) -> None:
    vendor = name.removesuffix(" 4")
    variables = {"MPIEXEC": str(fake(name)), "PYTHON": str(python(vendor)), **ROOT_MAY}
    variables["RHTCOMM_CPU"] = "baseline"
    trainer = f"{variables['PYTHON']}\n-m\nmpi4py\n{ROOT}/launch/train_ddp.py\n--communicator\nmpi"
    done = mpirun("2", "--bits", "4", **variables)
    assert done.returncode == 0, done.stderr
    assert f"{trainer}\n--bits\n4\nOMP_NUM_THREADS=1\n" in done.stdout
    assert done.stdout.startswith("-n\n2\n")
    assert ("--bind-to\nnone\n" in done.stdout) == (vendor == "Open MPI")
    assert ("-x\nRHTCOMM_CPU\n" in done.stdout) == (vendor == "Open MPI")
    assert ("-x\nOMP_NUM_THREADS\n" in done.stdout) == (vendor == "Open MPI")
    assert ("I_MPI_PIN=0" in done.stdout) == (vendor == "Intel MPI")
    assert "OVERSUBSCRIBE" not in done.stdout.upper()
    done = mpirun("3", "-m", "rhtcomm", "doctor", **variables, OMP_NUM_THREADS="2")
    assert f"{variables['PYTHON']}\n-m\nrhtcomm\ndoctor\nOMP_NUM_THREADS=2\n" in done.stdout
    assert (OVERSUBSCRIBE.get(name, "nothing") in done.stdout) == (vendor == "Open MPI")
    # What the user says comes first.
    options = "--bind-to core --host a:3"
    done = mpirun("3", **variables, MPIEXEC_OPTIONS=options, I_MPI_PIN="1")
    assert done.stdout.startswith("-n\n3\n--bind-to\ncore\n--host\na:3\n")
    assert "none" not in done.stdout
    assert "OVERSUBSCRIBE" not in done.stdout.upper()
    assert done.stdout.endswith("I_MPI_PIN=1\n")


def test_what_mpirun_refuses(fake: Callable[[str], Path], python: Callable[[str], Path]) -> None:
    def refused(name: str, vendor: str, fact: str, **variables: str) -> None:
        variables |= {"MPIEXEC": str(fake(name)), "PYTHON": str(python(vendor))}
        done = mpirun("2", **variables)
        assert done.returncode == 2
        assert fact in done.stderr
        assert done.stdout == ""

    refused("MPICH", "Open MPI", "is of MPICH, but mpi4py uses Open MPI: set MPIEXEC")
    refused("Open MPI", "Intel MPI", "is of Open MPI, but mpi4py uses Intel MPI", **ROOT_MAY)
    refused("MPICH", "", "mpi4py does not work in")
    if os.geteuid() == 0:
        remedy = "set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        refused("Open MPI", "Open MPI", remedy)
        refused("Open MPI", "Open MPI", remedy, OMPI_ALLOW_RUN_AS_ROOT="1")
    done = mpirun("2", MPIEXEC=str(fake("MPICH")), PYTHON=str(python("Intel MPI")))
    assert done.returncode == 0, "MPICH and Intel MPI start each other's ranks"
