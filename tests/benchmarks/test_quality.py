"""What benchmarks/quality.py is made of: runs that go on where they stopped, pairs, intervals."""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness import ROOT, limit

import quality
from lib import problems
from quality import BASE, Losses, Run

EVERY = [*problems.PROBLEMS]


def problem(name: str) -> problems.Problem:
    if name == "digits":
        pytest.importorskip("sklearn")
    return problems.PROBLEMS[name]


@pytest.mark.parametrize("name", EVERY)
def test_ranks_seeds_and_steps_have_batches_of_their_own(name: str) -> None:
    draw = problem(name).draw
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    batches = [draw(key)[0] for key in keys]
    assert torch.equal(batches[0], draw(keys[0])[0])
    for i, batch in enumerate(batches):
        assert batch.shape == batches[0].shape
        assert not any(torch.equal(batch, other) for other in batches[i + 1 :])


@pytest.mark.parametrize("optimizer", quality.OPTIMIZERS)
@pytest.mark.parametrize("name", EVERY)
def test_each_problem_is_learned(name: str, optimizer: str) -> None:
    task = problem(name)
    torch.manual_seed(0)
    model = task.make_model()
    before, rule = task.score(model), task.optimizers[optimizer](model)
    model.train()
    for step in range(8):
        inputs, targets = task.draw((0, step, 0))
        rule.zero_grad()
        task.loss(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
    assert 0 < task.score(model) < 0.99 * before


def test_no_weights_do_better_than_the_optimum_of_the_regression() -> None:
    x, y = problems.regression()
    model = problems.PROBLEMS["regression"].make_model()
    assert isinstance(model, torch.nn.Linear)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], dim=1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:-1].T)
        model.bias.copy_(solution[-1])
    assert abs(problems.PROBLEMS["regression"].score(model)) < 1e-6
    with torch.no_grad():
        model.bias += 0.1
    assert problems.PROBLEMS["regression"].score(model) == pytest.approx(0.01, rel=0.01)


def test_the_learning_rate_grows_and_falls() -> None:
    rates = [problems.learning_rate(step, 100, 10) for step in range(100)]
    assert max(rates) == rates[9] == pytest.approx(0.91)
    assert rates[0] == 0.1
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(4, 2.776), (7, 2.365), (15, 2.131), (1000, 1.962)]
)
def test_students_distribution(freedom: int, quantile: float) -> None:
    assert quality.students_t(freedom) == pytest.approx(quantile, rel=1e-3)


def test_intervals_hold_the_mean_of_95_in_100() -> None:
    random = torch.Generator().manual_seed(0)
    samples = torch.randn(2000, 8, generator=random) + 3
    held = sum(abs(mean - 3) <= half for mean, half in map(quality.interval, samples.tolist()))
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


Row = tuple[int, str, float, float]


def results_of(rows: Sequence[Row]) -> quality.Results:
    return {
        Run("digits", "SGD", seed, name): Losses(final, path) for seed, name, final, path in rows
    }


def test_differences_are_of_the_same_seed() -> None:
    # Seeds differ by far more than contestants do, and seed 5 has no float32 yet.
    base = [(seed, BASE, 1.0 + seed, 2.0) for seed in range(5)]
    other = [(seed, "ECDQ, 2 bits", 1.03 + seed, 2.0 + 0.01 * seed) for seed in range(6)]
    row = quality.cells(results_of(base + other), "digits", "SGD", "ECDQ, 2 bits")
    # The path's differences are 0, 0.5, ..., 2 percent.
    half = 2.776 * 0.5 * math.sqrt(2.5 / 5)
    assert row == [
        "ECDQ, 2 bits",
        "5",
        "3.0300",
        "**+1.00% ± 0.00**",
        f"**+1.00% ± {half:.2f}**",
    ]
    assert quality.cells(results_of(base), "digits", "SGD", "ECDQ, 2 bits") is None


def test_what_diverged_is_marked() -> None:
    assert quality.difference([(1.0, 1.0), (1.0, math.nan)]).startswith("**")


def test_results_are_kept_row_by_row(tmp_path: Path) -> None:
    results = results_of([(0, BASE, 1 / 3, 0.1), (1, "PowerSGD, rank 4", math.nan, 2.0)])
    assert quality.read(tmp_path / "quality.csv") == {}
    for run, losses in results.items():
        quality.keep(tmp_path / "quality.csv", run, losses)
    found = quality.read(tmp_path / "quality.csv")
    assert repr(found) == repr(results)  # NaN is not equal to itself


def test_parts_of_the_turns_are_whole_seeds() -> None:
    names = [*quality.contestants()]
    turns = quality.turns(["digits", "text"], quality.OPTIMIZERS, names, 3)
    assert len(set(turns)) == len(turns) == 2 * 2 * 3 * len(names)
    assert [run.seed for run in turns] == sorted(run.seed for run in turns)


@pytest.mark.parametrize("name", [*quality.contestants()])
def test_contestants_agree_over_few_steps(name: str, tmp_path: Path) -> None:
    """In one process, where all but PowerSGD's and the codecs' own ways are exact."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        task = problems.PROBLEMS["regression"]
        register = quality.contestants()
        base = quality.train(task, "SGD", 1, register[BASE], 3)
        found = quality.train(task, "SGD", 1, register[name], 3)
    finally:
        torch.distributed.destroy_process_group()
    assert found.final == pytest.approx(base.final, rel=1e-2)


def test_the_program_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--out", str(tmp_path)]
    command += ["--problems", "regression", "--contestants", "ECDQ, 2 bits", "--steps", "3"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}

    def run(*more: str) -> str:
        done = subprocess.run(
            [*command, *more],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=limit(240),
        )
        return done.stdout

    assert "## regression" not in run("--minutes", "0", "--seeds", "1")
    run("--seeds", "1")
    first = (tmp_path / "quality.csv").read_text()
    assert "| ECDQ, 2 bits | 2 |" in run("--seeds", "2")
    assert (tmp_path / "quality.csv").read_text().startswith(first)
    found = quality.read(tmp_path / "quality.csv")
    assert len(found) == 8
    # Ranks that drew other batches would end elsewhere; seeds begin with other weights.
    assert len({dataclasses.astuple(losses) for losses in found.values()}) == 8
