"""Real MPI, started by the mpiexec next to the interpreter, at 2 and 4 ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT, limit

pytest.importorskip("mpi4py", reason="the extra 'mpi' is not installed")

MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
CASES = str(ROOT / "tests" / "lib" / "mpi_cases.py")
LAUNCH = ROOT / "launch"


def mpiexec(ranks: int, *program: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(MPIEXEC), "-n", str(ranks), sys.executable, "-m", "mpi4py", *program],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit(timeout),
    )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", ["exchanges", "means", "disagreement"])
def test_under_mpiexec(case: str, ranks: int) -> None:
    done = mpiexec(ranks, CASES, case)
    assert done.returncode == 0, done.stderr


def test_a_rank_that_waits_in_vain_raises() -> None:
    done = mpiexec(2, CASES, "timeout")
    assert "timed out" in done.stdout, done.stderr


def test_processes_of_torchrun_alone_are_told_to_use_mpiexec() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import rhtcomm; rhtcomm.MPICommunicator()"],
        env=os.environ | {"WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode != 0
    assert "MPI has 1 rank(s) but torch has 2; start the program with mpiexec -n 2" in done.stderr


def test_training_through_mpi_equals_training_through_gloo(tmp_path: Path) -> None:
    """After 20 steps all parameters have the same bits, whatever carried the payloads."""
    model = "--layers 2 --width 64 --heads 2 --context 32 --batch 4 --steps 20 --hook rht"
    model += " --eval-every 20 --eval-batches 1 --warmup 5 --backend gloo --threads 1"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    weights = []
    for launcher in (["torchrun.sh"], ["mpirun.sh", "2"]):
        checkpoint = tmp_path / f"{launcher[0]}.pt"
        done = subprocess.run(
            [
                str(LAUNCH / launcher[0]),
                *launcher[1:],
                *model.split(),
                f"--checkpoint={checkpoint}",
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit(300),
        )
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(checkpoint)["model"])
    assert weights[0].keys() == weights[1].keys()
    for name, parameter in weights[0].items():
        assert torch.equal(parameter, weights[1][name]), name
