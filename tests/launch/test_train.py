"""The trainer on two ranks; where it resumes, run as users run it: through torchrun."""

import csv
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Ranks, limit
from trainer_in_ranks import train

import data
import train_ddp
from communication import union_length
from log import CSV_COLUMNS
from options import parse_args

TINY = (
    "--layers 2 --width 64 --heads 2 --context 32 --batch 4 --steps 12 --lr 1e-2 --warmup 2 "
    "--eval-every 5 --eval-batches 2 --threads 1 --backend gloo"
)


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [train_ddp.__file__, *TINY.split(), *map(str, arguments)]
    # The trainer must find the rhtcomm that these tests import, be it installed or a checkout.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=limit(120))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks, which a kill would leave behind
        pytest.fail(f"the trainer did not end in time: {process.communicate()[0]}")
    return subprocess.CompletedProcess(command, process.returncode, output)


def run(ranks: Ranks, *arguments: str | Path) -> list[Any]:
    """What two ranks printed or failed with, in processes that have imported torch before."""
    options = [*TINY.split(), *map(str, arguments)]
    return ranks.outcomes(train, 2, [options] * 2, [{}, {}], None)


def check_run(ranks: Ranks, *arguments: str | Path) -> None:
    assert [
        str(outcome) for outcome in run(ranks, *arguments) if not isinstance(outcome, str)
    ] == []


def read_log(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tensors_of(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors in nested dicts and lists, by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        if isinstance(item, (torch.Tensor, dict, list)):
            found |= tensors_of(item, f"{name}/{key}")
    return found


@pytest.mark.parametrize("hook", ["none", "rht"])
def test_trains_and_resumes_as_if_uninterrupted(hook: str, ranks: Ranks, tmp_path: Path) -> None:
    def files(name: str) -> list[str | Path]:
        options: list[str | Path] = ["--csv", tmp_path / f"{name}.csv"]
        options += ["--checkpoint", tmp_path / f"{name}.pt", "--checkpoint-every", "3"]
        options += ["--hook", hook]
        if hook == "rht":
            options += ["--error-feedback", "--hook-warmup", "8"]
            options += ["--telemetry", tmp_path / f"{name}_telemetry.csv"]
        # Several buckets, each large enough to be compressed.
        return [*options, "--bucket-cap-mb", "0.15"]

    check_run(ranks, *files("whole"))
    # The log goes on after the checkpoint, as that of a run which was killed.
    check_run(ranks, *files("halved"), "--stop-at", "6")
    rows = (tmp_path / "halved.csv").read_text()
    (tmp_path / "halved.csv").write_text(rows + "7,99.0,,1.0,1.0,1\n")
    finished = torchrun(*files("halved"), "--resume")
    assert finished.returncode == 0, finished.stdout

    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    halved = torch.load(tmp_path / "halved.pt", weights_only=True)
    assert whole["step"] == halved["step"] == 12
    expected = tensors_of([whole["model"], whole["optimizer"]])
    actual = tensors_of([halved["model"], halved["optimizer"]])
    assert len(expected) > len(whole["model"]), "the optimizer's state is missing"
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []

    log = read_log(tmp_path / "whole.csv")
    assert tuple(log[0]) == CSV_COLUMNS
    assert [row["step"] for row in log] == [str(step) for step in range(1, 13)]
    assert [row["step"] for row in log if row["val_loss"]] == ["5", "10", "12"]
    uncompressed = 4 * sum(tensor.numel() for tensor in whole["model"].values())
    for row in log:
        ratio = uncompressed / int(row["bytes_sent"])
        if hook == "none":
            assert ratio == 1
        else:  # 8 bits, then 4
            assert 3 < ratio < 4 if int(row["step"]) <= 8 else ratio > 6
    assert all(0 < float(row["comm_seconds"]) < float(row["step_seconds"]) for row in log)
    losses = [float(row["train_loss"]) for row in log]
    assert losses[0] == pytest.approx(math.log(256), abs=0.2), "the model's start is not uniform"
    assert losses[-1] < losses[0] - 0.5

    # Step 6 ended a run here, and so was evaluated too.
    def training(name: str) -> list[tuple[str, str]]:
        return [(row["step"], row["train_loss"]) for row in read_log(tmp_path / f"{name}.csv")]

    assert training("halved") == training("whole")
    if hook == "rht":
        sent = [0] * 12
        for row in read_log(tmp_path / "halved_telemetry.csv"):
            sent[int(row["step"])] += int(row["bytes_sent"])
        assert sent == [int(row["bytes_sent"]) for row in log]


def test_resuming_another_run_names_what_differs(ranks: Ranks, tmp_path: Path) -> None:
    arguments = ("--hook", "none", "--checkpoint", tmp_path / "run.pt")
    check_run(ranks, *arguments, "--stop-at", "1")
    for refused in run(ranks, *arguments, "--resume", "--seed", "1"):
        assert "belongs to another run, with seed=0 (now 1)" in refused.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--eval-every 0", "--eval-every 0 must be at least 1"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--hook bf16 --telemetry x.csv", "--telemetry is for --hook rht, not bf16"),
        ("--checkpoint-every 0", "--checkpoint-every 0 must be at least 1"),
        ("--device cuda", "need a CUDA device, but torch finds none"),
        ("--backend nccl", "need a CUDA device, but torch finds none"),
    ],
)
def test_arguments_that_cannot_be_are_named(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_ddp.py", *arguments.split()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse_args()
    assert message in capsys.readouterr().err


def test_data_is_split_by_file_and_the_same_each_time() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    files = data.source_files(library)
    assert files == sorted(set(files)) == data.source_files(library)
    assert not any({"site-packages", "test"} & set(Path(path).parts) for path in files)

    # The two have no file in common and none is left out, as each file's bytes are in one.
    sizes = {True: 0, False: 0}
    for path in files:
        sizes[data.is_validation(path)] += (library / path).stat().st_size
    corpora = data.load_corpus(library)
    assert [len(corpus) for corpus in corpora] == [sizes[False], sizes[True]]
    assert 0.03 < sizes[True] / sum(sizes.values()) < 0.25
    for corpus, again in zip(corpora, data.load_corpus(library), strict=True):
        assert torch.equal(corpus, again)


def test_batches_depend_on_seed_step_and_rank_alone() -> None:
    corpus = torch.arange(251, dtype=torch.uint8).repeat(1000)
    inputs, targets = data.draw_batch(corpus, 4, 16, (0, 5, 1))
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, data.draw_batch(corpus, 4, 16, (0, 5, 1))[0])
    for other in ((1, 5, 1), (0, 6, 1), (0, 5, 0)):
        assert not torch.equal(inputs, data.draw_batch(corpus, 4, 16, other)[0])


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0.0),
        ([(1.0, 2.0), (4.0, 6.0)], 3.0),
        ([(4.0, 6.0), (1.0, 5.0)], 5.0),
        ([(1.0, 9.0), (2.0, 3.0), (4.0, 5.0)], 8.0),
    ],
)
def test_union_length(intervals: list[tuple[float, float]], length: float) -> None:
    assert union_length(intervals) == length
