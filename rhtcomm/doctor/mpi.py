"""Whether MPI works, and whether mpi4py's MPI is that of mpiexec."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rhtcomm.doctor.finding import Finding, Grade
from rhtcomm.doctor.launcher import Launch

__all__ = ["mpi", "probe", "vendor_of"]

LIMIT = 30  # seconds for MPI to say what it is
MATCH = "start with the mpiexec of {}, or install mpi4py and that MPI together (docs/doctor.md)"
SLURM = "srun --mpi=pmi2 for MPICH and Intel MPI, --mpi=pmix for Open MPI"


def vendor_of(version: str) -> str | None:
    """The MPI that an mpiexec belongs to, by what `mpiexec --version` prints."""
    for pattern, vendor in (
        (r"Open MPI|OpenRTE|PRRTE", "Open MPI"),
        (r"Intel\(R\) MPI", "Intel MPI"),
        (r"HYDRA|MPICH", "MPICH"),
    ):
        if re.search(pattern, version):
            return vendor
    return None


def probe(start: bool, seconds: float) -> tuple[dict[str, Any], str]:
    """What `mpi_probe` says, or nothing and why.

    Args:
        start: initialize MPI in it, as this rank.
    """
    source = Path(__file__).with_name("mpi_probe.py").read_text()
    command = [sys.executable, "-c", source, *(["start"] if start else [])]
    # MPICH's and Slurm's processes talk with what started them through a file that is open already.
    kept = [int(os.environ[name]) for name in ("PMI_FD",) if os.environ.get(name, "").isdecimal()]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            pass_fds=kept,
        )
    except subprocess.TimeoutExpired:
        return {}, f"it did not answer within {seconds:g} s"
    except OSError as error:  # the file was closed by what is between mpiexec and this process
        return {}, str(error)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            facts: dict[str, Any] = json.loads(line)
            return facts, ""
    if "cannot load MPI library" in done.stderr:
        return {}, "mpi4py finds no MPI library"
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip(" -")]
    telling = [line for line in said if re.search(r"error|abort|cannot|PMI", line, re.IGNORECASE)]
    return {}, (telling or said or [f"exit status {done.returncode}"])[-1]


def mpi(launch: Launch, seconds: float) -> tuple[list[Finding], Mapping[str, Any]]:
    """Findings, and what MPI says where it knows all ranks."""
    if find_spec("mpi4py") is None:
        if launch.has_mpi and launch.name != "srun":
            fact = f"{_starter(launch)} started the ranks, but mpi4py is not installed"
            return [Finding("problem", "MPI", fact, "pip install 'rhtcomm[mpi]'")], {}
        fact = "mpi4py is not installed; only MPICommunicator needs it"
        return [Finding("ok", "MPI", fact)], {}
    facts, failure = probe(launch.has_mpi, seconds if launch.has_mpi else LIMIT)
    if not facts:
        return [_failed(launch, failure)], {}
    name = f"mpi4py {facts['mpi4py']} with {facts['vendor']} {facts['version']}"
    if not launch.has_mpi:
        return [_alone(launch, facts["vendor"], name)], {}
    if facts["size"] != launch.world_size:
        fact = f"{_starter(launch)} started {launch.world_size} ranks, but the world of {name} has "
        fact += f"{facts['size']}: each rank is alone"
        remedy = SLURM if launch.name == "srun" else MATCH.format(facts["vendor"])
        return [Finding("problem", "MPI", fact, remedy)], {}
    if not facts["sum"]:
        fact = f"a sum over all ranks of {name} is wrong"
        return [Finding("problem", "MPI", fact, "install another MPI, and report this")], {}
    if not facts["threads"]:
        fact = f"{name} supports no calls from several threads in turn, which the hook makes"
        return [Finding("problem", "MPI", fact, "install an MPI with MPI_THREAD_SERIALIZED")], {}
    return [Finding("ok", "MPI", f"{name}, {facts['size']} ranks, a sum is right")], facts


def _failed(launch: Launch, failure: str) -> Finding:
    facts = probe(False, LIMIT)[0] if launch.has_mpi else {}
    if not facts:
        fact = f"MPI does not work: {failure}; only MPICommunicator needs it"
        grade: Grade = "problem" if launch.has_mpi else "remark"
        return Finding(grade, "MPI", fact, "pip install 'rhtcomm[mpi]'")
    fact = (
        f"{facts['vendor']}, which mpi4py uses, did not start under {_starter(launch)}: {failure}"
    )
    remedy = SLURM if launch.name == "srun" else MATCH.format(facts["vendor"])
    return Finding("problem", "MPI", fact, remedy)


def _starter(launch: Launch) -> str:
    return launch.name if launch.name == "srun" else f"mpiexec of {launch.name}"


def _alone(launch: Launch, vendor: str, name: str) -> Finding:
    """The mpiexec that would be used, compared with mpi4py's MPI."""
    if launch.name == "srun":
        fact = f"{name}; srun started these ranks without MPI"
        return Finding("ok", "MPI", fact)
    beside = Path(sys.prefix) / "bin" / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        remedy = f"install the one of {vendor}, if you want MPICommunicator"
        return Finding("remark", "MPI", f"{name}, but no mpiexec was found", remedy)
    try:
        done = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=10)
        other = vendor_of(done.stdout + done.stderr)
    except (OSError, subprocess.TimeoutExpired):
        other = None
    if other is not None and (other == "Open MPI") != (vendor == "Open MPI"):
        fact = f"{name}, but {mpiexec} is of {other}: each rank would be alone"
        return Finding("remark", "MPI", fact, MATCH.format(vendor))
    return Finding("ok", "MPI", f"{name}, and {mpiexec} fits it")
