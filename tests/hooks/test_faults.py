"""What happens to the other ranks when one fails; benchmarks/faults.py holds the scenarios.

That differently configured ranks end is tested in test_state_arguments.py.
"""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import ROOT, Ranks, limit, reserved_port
from torch.nn.parallel import DistributedDataParallel

import faults
from lib import processes
from rhtcomm import QuicFL
from rhtcomm.hooks import RHTState, rht_hook

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "LIMIT", limit(faults.LIMIT))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        # In the middle of a payload either another survivor or the failed rank is seen first.
        ("killed", r"could not exchange bucket 0 of step 1: another rank died, or failed"),
        ("stopped", r"another rank did not answer within its timeout of 5 s|another rank died"),
        ("raises", r"could not exchange bucket 0 of step 1: another rank died, or failed"),
        ("raises, two levels", r"could not exchange bucket 0 of step 1: another rank died"),
        ("no hook", r"to the others: .*(within its timeout of 5 s|died).* registered no hook"),
    ],
)
def test_the_other_ranks_end_and_name_the_cause(name: str, cause: str) -> None:
    survivors = faults.run(name)
    world_size = faults.SCENARIOS[name].world_size
    assert [survivor.rank for survivor in survivors] == [0, *range(2, world_size)]
    for survivor in survivors:
        assert survivor.exit_code == 1
        assert re.search(rf"rht_hook: rank {survivor.rank} of {world_size} ", survivor.printed)
        assert re.search(cause, survivor.printed), survivor.printed
    if name in ("stopped", "no hook"):  # who waits in vain ends, and is seen by the rest
        assert any("did not answer" in survivor.printed for survivor in survivors)


@pytest.mark.parametrize(
    ("name", "code", "cause"),
    # What mpiexec itself says of an abort is sometimes lost, its exit code never.
    [("abort", 3, "fault at"), ("raises", 1, "injected failure")],
)
def test_mpiexec_ends_all_ranks_when_one_fails(name: str, code: int, cause: str) -> None:
    pytest.importorskip("mpi4py", reason="the extra 'mpi' is not installed")
    exit_code, printed = faults.run_mpi(name)
    assert exit_code == code
    assert re.search(cause, printed)


# ---- Launchers --------------------------------------------------------------------------------

MODEL = "--layers 1 --width 64 --heads 2 --context 32 --batch 4 --warmup 2 --threads 1"
MODEL += " --backend gloo --eval-batches 1 --eval-every 1000"


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_torchrun_restarts_a_killed_rank_from_the_checkpoint(tmp_path: Path) -> None:
    def log_of(name: str) -> Path:
        return tmp_path / f"{name}.csv"

    losses = {}
    for name in ("undisturbed", "killed"):
        with (
            processes.marked_processes() as (environment, started),
            (tmp_path / "printed").open("w+") as output,
        ):
            environment |= {"PYTHON": sys.executable, "MAX_RESTARTS": "1"}
            command = [str(ROOT / "launch" / "torchrun.sh"), *MODEL.split()]
            command += ["--steps=150", "--checkpoint-every=5", f"--csv={log_of(name)}"]
            command += [f"--checkpoint={tmp_path / name}.pt"]
            process = processes.start(command, environment, output)
            started.append(process)
            deadline = time.monotonic() + faults.LIMIT
            if name == "killed":
                while len(rows_of(log_of(name))) < 12:
                    assert time.monotonic() < deadline, "no step was logged"
                    time.sleep(0.01)
                (victim,) = processes.living(environment, RANK="1")
                before = rows_of(log_of(name))[:5]
                os.kill(victim, signal.SIGKILL)
            processes.wait(process, deadline, "torchrun")
            output.seek(0)
            assert process.returncode == 0, output.read()
            assert processes.living(environment) == []
        rows = rows_of(log_of(name))
        assert [row["step"] for row in rows] == [str(step) for step in range(1, 151)]
        losses[name] = float(rows[-1]["val_loss"])
    # The times of these steps would differ if they had been run again.
    assert rows[:5] == before
    assert losses["killed"] == pytest.approx(losses["undisturbed"], rel=0.01)


SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$ARGUMENTS"
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait "$first" && wait "$second"
"""
SCONTROL = (
    "#!/usr/bin/env bash\n[[ $* == 'show hostnames node[0-1]' ]] && echo localhost && echo b\n"
)


def test_slurm_starts_a_torchrun_on_each_node(tmp_path: Path) -> None:
    """Two of them on this machine, by stand-ins for Slurm's commands."""
    for command, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / command).write_text(text)
        (tmp_path / command).chmod(0o755)
    script = str(ROOT / "launch" / "slurm.sbatch")
    with reserved_port() as port, processes.marked_processes() as (environment, started):
        environment |= {
            **{"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable},
            **{"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"},
            **{"SLURM_SUBMIT_DIR": str(ROOT), "NPROC_PER_NODE": "1", "MASTER_PORT": str(port)},
            "ARGUMENTS": str(tmp_path / "arguments"),
        }
        with (tmp_path / "printed").open("w+") as output:
            command = [script, *MODEL.split(), "--steps=3", f"--csv={tmp_path / 'log'}"]
            process = processes.start(command, environment, output)
            started.append(process)
            processes.wait(process, time.monotonic() + faults.LIMIT, "srun")
            output.seek(0)
            printed = output.read()
        assert process.returncode == 0, printed
        assert processes.living(environment) == []
    assert "2 ranks, 3 steps" in printed
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} < set(arguments)
    assert f"--rdzv-endpoint=localhost:{port}" in arguments
    help_text = subprocess.run([script, "--help"], capture_output=True, text=True).stdout
    assert "sbatch --nodes=2 launch/slurm.sbatch" in help_text
    outside = subprocess.run([script], capture_output=True, text=True)
    assert outside.returncode != 0
    assert "submit this file with sbatch" in outside.stderr


# ---- What the hook refuses, and closing late ----------------------------------------------------


def reduce_sparse(rank: int, world_size: int) -> None:
    with RHTState() as state:
        model = DistributedDataParallel(torch.nn.Embedding(10, 4, sparse=True))
        model.register_comm_hook(state, rht_hook)
        with pytest.raises(Exception, match="bucket 0 is a sparse gradient"):
            model(torch.tensor([rank, 3])).sum().backward()


def test_sparse_gradients_are_refused(ranks: Ranks) -> None:
    ranks.run(reduce_sparse, 2)


def close_in_another_world(rank: int, world_size: int) -> None:
    """The hook's group went with the world that it was made in."""
    state = RHTState(min_numel=0)
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    model.register_comm_hook(state, rht_hook)
    model(torch.ones(1, 8)).sum().backward()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state.close()
    assert dist.get_world_size() == 1, "close destroyed a group that is not its own"


def test_close_in_another_world(ranks: Ranks) -> None:
    ranks.run(close_in_another_world, 2)


def test_bits_must_be_a_plain_int() -> None:
    with pytest.raises(ValueError, match="bits=True must be 1, 2"):
        QuicFL(True)
