"""The trainer, started again: what all ranks resume from, and how a restarted run ends."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, Ranks, limit, reserved_port
from trainer_in_ranks import train
from training_runs import FAULT, KILL, STEP_8, STEPS, Files

from lib import processes

LIMIT = 180  # seconds for agents and ranks, each of which is started twice and imports torch


def start(
    ranks: Ranks,
    files: Files,
    *options: str,
    environments: list[dict[str, str]] | None = None,
    fails_at: int | None = None,
) -> list[Any]:
    arguments = [[*files.arguments, *options]] * 2
    return ranks.outcomes(train, 2, arguments, environments or [{}, {}], fails_at)


def check_that_all_ended(outcomes: list[Any]) -> None:
    assert [str(outcome) for outcome in outcomes if not isinstance(outcome, str)] == []


@pytest.fixture(scope="module")
def whole(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A run without interruption."""
    files = Files(tmp_path_factory.mktemp("whole"), "whole")
    check_that_all_ended(start(ranks, files))
    return files


AGAIN = {"TORCHELASTIC_RESTART_COUNT": "1"}
REQUEUED = {"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "1"}


@pytest.mark.parametrize(
    "environments",
    [[AGAIN, {}], [{}, AGAIN], [AGAIN, AGAIN], [REQUEUED, REQUEUED]],
    ids=["rank 0", "rank 1", "both", "requeued"],
)
def test_all_ranks_go_on_if_one_was_started_again(
    environments: list[dict[str, str]], whole: Files, ranks: Ranks, tmp_path: Path
) -> None:
    files = Files(tmp_path, "run")
    failed = start(ranks, files, fails_at=8)
    assert {outcome.message for outcome in failed} == {"made for the purpose"}
    assert len(files.losses()) == 7
    with files.log.open() as log:
        before = log.readlines()[: 1 + 6]
    check_that_all_ended(start(ranks, files, environments=environments))
    files.check_that_it_ended_as(whole)
    with files.log.open() as log:  # the times of these steps would differ if they had run again
        assert log.readlines()[: 1 + 6] == before


def test_a_restart_before_the_first_checkpoint_takes_no_other_runs(
    whole: Files, ranks: Ranks, tmp_path: Path
) -> None:
    files = Files(tmp_path, "run")
    older = whole.checkpoint.read_bytes()
    files.checkpoint.write_bytes(older)
    start(ranks, files, fails_at=3)
    assert len(files.losses()) == 2
    check_that_all_ended(start(ranks, files, environments=[{}, AGAIN]))
    files.check_that_it_ended_as(whole)
    assert files.checkpoint.with_name("run.pt.previous").read_bytes() == older


@pytest.mark.parametrize("environments", [[{}, AGAIN], [{}, {}]], ids=["restarted", "--resume"])
def test_a_finished_run_ends_well(
    environments: list[dict[str, str]], whole: Files, ranks: Ranks, tmp_path: Path
) -> None:
    """Also where the rank that wrote the summary failed before it did."""
    files = Files(tmp_path, "run")
    files.checkpoint.write_bytes(whole.checkpoint.read_bytes())
    files.log.write_bytes(whole.log.read_bytes())
    options = [] if AGAIN in environments else ["--resume"]
    outcomes = start(ranks, files, *options, environments=environments)
    check_that_all_ended(outcomes)
    assert f"is at step {STEPS} and the run ends at step {STEPS}: nothing left" in outcomes[0]
    val_loss = json.loads(whole.summary.read_text())["final_val_loss"]
    assert f"2 ranks, {STEPS} steps, validation loss {val_loss:.4f}" in outcomes[0]
    assert files.log.read_bytes() == whole.log.read_bytes()
    assert files.summary.read_bytes() == whole.summary.read_bytes()
    assert files.checkpoint.read_bytes() == whole.checkpoint.read_bytes()


def test_a_finished_run_of_an_earlier_version_ends_well(
    whole: Files, ranks: Ranks, tmp_path: Path
) -> None:
    """Its checkpoint has no summary."""
    files = Files(tmp_path, "run")
    content = torch.load(whole.checkpoint, weights_only=True)
    del content["summary"]
    torch.save(content, files.checkpoint)
    outcomes = start(ranks, files, "--resume", environments=[{}, {}])
    check_that_all_ended(outcomes)
    assert "nothing left" in outcomes[0]


@pytest.mark.parametrize(
    ("case", "findings"),
    [
        ("missing on rank 1", r"rank 0 found step 12 in .*; rank 1 found no file"),
        ("missing on rank 0", r"rank 0 found no file; rank 1 found step 12 in"),
        ("other", r"rank 0 found step 12 in a file .*; rank 1 found step 12 in a file"),
        ("torn", r"rank 0 found step 12 .*; rank 1 found no readable checkpoint"),
        ("none", r"ranks 0, 1 found no file"),
    ],
)
def test_ranks_that_find_different_files_all_say_so(
    case: str, findings: str, whole: Files, ranks: Ranks, tmp_path: Path
) -> None:
    """As on nodes without a file system in common."""
    nodes = [Files(tmp_path / str(rank), "run") for rank in range(2)]
    content = whole.checkpoint.read_bytes()
    for rank, files in enumerate(nodes):
        files.checkpoint.parent.mkdir()
        if case != "none" and case != f"missing on rank {rank}":
            files.checkpoint.write_bytes(content)
    if case == "torn":
        nodes[1].checkpoint.write_bytes(content[:-1000])
    if case == "other":
        changed = torch.load(whole.checkpoint, weights_only=True)
        changed["model"]["norm.weight"] += 1
        torch.save(changed, nodes[1].checkpoint)
    options = ["--resume"] if case == "none" else []
    arguments = [[*files.arguments, *options] for files in nodes]
    outcomes = ranks.outcomes(train, 2, arguments, [AGAIN, {}], None)
    for rank, outcome in enumerate(outcomes):
        assert outcome.type == "ValueError", outcome
        prefix = f"the ranks cannot resume from --checkpoint {nodes[rank].checkpoint}: "
        assert outcome.message.startswith(prefix)
        assert re.match(findings, outcome.message.removeprefix(prefix)), outcome.message


# ---- Two torchrun agents ------------------------------------------------------------------------

SUMMARY = "pathlib.Path:write_text 1"  # after the last checkpoint

# Stand-ins for Slurm's commands.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait "$first" && wait "$second"
"""
SCONTROL = "#!/usr/bin/env bash\necho localhost; echo b\n"


def torchrun_on_two_nodes(files: Files, environment: dict[str, str]) -> list[list[str]]:
    launcher = str(ROOT / "launch" / "torchrun.sh")
    nodes = ["NNODES=2", "MASTER_ADDR=127.0.0.1"]
    return [["env", *nodes, f"NODE_RANK={node}", launcher, *files.arguments] for node in range(2)]


def slurm(files: Files, environment: dict[str, str]) -> list[list[str]]:
    folder = files.log.parent
    for command, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / command).write_text(text)
        (folder / command).chmod(0o755)
    environment |= {
        "PATH": f"{folder}{os.pathsep}{environment['PATH']}",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    return [[str(ROOT / "launch" / "slurm.sbatch"), *files.arguments]]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("launcher", "fault"),
    [
        (slurm, f"0 {STEP_8}"),
        (torchrun_on_two_nodes, f"1 {STEP_8}"),
        (torchrun_on_two_nodes, f"0 {SUMMARY}"),
    ],
    ids=["Slurm, rank 0", "torchrun.sh, rank 1", "torchrun.sh, rank 0 after the last checkpoint"],
)
def test_a_rank_killed_on_one_of_two_nodes(
    launcher: Any, fault: str, whole: Files, tmp_path: Path
) -> None:
    files = Files(tmp_path, "run")
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    with (
        reserved_port() as port,
        processes.marked_processes() as (environment, started),
        (tmp_path / "printed").open("w+") as output,
    ):
        environment |= {
            "PYTHON": sys.executable,
            "NPROC_PER_NODE": "1",
            "MAX_RESTARTS": "1",
            "MASTER_PORT": str(port),
            "FAULT": fault,
            "FAULT_DONE": str(tmp_path / "done"),
            "FAULT_COMMAND": KILL,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}",
        }
        for command in launcher(files, environment):
            started.append(processes.start(command, environment, output))
        deadline = time.monotonic() + limit(LIMIT)
        for process in started:
            processes.wait(process, deadline, launcher.__name__)
        output.seek(0)
        printed = output.read()
        assert [process.returncode for process in started] == [0] * len(started), printed
        assert processes.living(environment) == []
    assert (tmp_path / "done").exists(), "no rank was killed"
    files.check_that_it_ended_as(whole)
