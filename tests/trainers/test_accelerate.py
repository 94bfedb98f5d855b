"""Accelerate, on two ranks."""

import gc
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import Ranks
from models import parameters_of
from trainers import (
    OPTIONS,
    RATE,
    batches,
    check_logged,
    check_resumed,
    check_resumed_example,
    check_same,
    example,
    launched,
    loss_of,
    plain,
    seeded,
)

pytest.importorskip("accelerate", reason="the extra 'test' is not installed")


def accelerator(**options: Any) -> Any:
    """A new one, as in a new process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


def tracker() -> Any:
    """What Accelerate logs to; it has `rows`."""
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory = "rows", False

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, Any]] = []

        @property
        def tracker(self) -> Any:
            return self.rows

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, Any], step: int | None, **_: Any) -> None:
            self.rows.append({"step": step, **values})

    return Tracker()


def train(rank: int, folder: str, epochs: range, unwrapped: bool = False) -> Any:
    """Parameters after some epochs, of which each is saved, and what was logged.

    With `unwrapped`, a mistake by which no gradient is averaged.
    """
    from rhtcomm.hooks.trainers.accelerate import register

    rows = tracker()
    acc = accelerator(log_with=[rows])
    acc.init_trackers("test")
    net = seeded()
    model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), RATE))
    handle = register(acc, model, **OPTIONS)
    if epochs.start:
        acc.load_state(f"{folder}/{epochs.start}")
    for epoch in epochs:
        for index, x in enumerate(batches(rank)):
            acc.backward(loss_of(acc.unwrap_model(model) if unwrapped else model, x))
            optimizer.step()
            optimizer.zero_grad()
            acc.log(handle.figures(), step=index)
        acc.save_state(f"{folder}/{epoch + 1}")
    end(acc)
    assert handle.state.engine is None or handle.state.engine.ended
    return parameters_of(net), rows.rows


def accumulate(rank: int) -> list[bool]:
    """After which of two batches per step there were figures."""
    from rhtcomm.hooks.trainers.accelerate import register

    acc = accelerator(gradient_accumulation_steps=2)
    net = seeded()
    model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), RATE))
    handle = register(acc, model, **OPTIONS)
    logged = []
    for x in batches(rank)[:2] * 2:
        with acc.accumulate(model):
            acc.backward(loss_of(model, x))
            optimizer.step()
            optimizer.zero_grad()
        logged.append(bool(handle.figures()))
    end(acc)
    with pytest.raises(TypeError, match="Net that is neither in DistributedDataParallel nor"):
        register(acc, net, **OPTIONS)
    return logged


def end(acc: Any) -> None:
    with mock.patch("torch.distributed.destroy_process_group") as destroy:  # others need it
        acc.end_training()
    destroy.assert_called_once()


def cases(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    os.chdir(folder)
    with launched(rank, world_size):
        expected, figures = plain(rank, epochs=2)
        whole, rows = train(rank, folder, range(2))
        resumed, _ = train(rank, folder, range(1, 2))
        torch.distributed.barrier()
        Path(folder, f"1/rhtcomm_0_rank{rank}.pt").unlink()
        torch.distributed.barrier()
        with pytest.warns(match="has no state of the hook"):
            forgotten, _ = train(rank, folder, range(1, 2))
        accumulated = accumulate(rank)
        with pytest.warns(match="hook was never called"):
            train(rank, f"{folder}/unwrapped", range(1), unwrapped=True)
        with mock.patch("torch.distributed.destroy_process_group"):
            accelerator()
            printed = [example("train_accelerate.py", *last) for last in ([], ["accelerate-2"])]
    return {
        "whole": whole,
        "plain": expected,
        "figures": figures,
        "resumed": resumed,
        "forgotten": forgotten,
        "rows": rows,
        "accumulated": accumulated,
        "printed": printed,
    }


def one_process(rank: int, world_size: int, folder: str) -> None:
    """Trains on from a checkpoint of two ranks."""
    with (
        launched(rank, world_size),
        pytest.warns(match="a single process sends no gradients.*accelerate launch"),
    ):
        train(rank, folder, range(2, 3))


def one_model_after_another(rank: int, world_size: int, folder: str) -> None:
    from rhtcomm.hooks.trainers.accelerate import register

    with launched(rank, world_size):
        acc = accelerator()
        for trial in range(2):
            model = acc.prepare(torch.nn.Linear(2, 2))
            with pytest.warns(match="a single process sends no gradients"):
                handle = register(acc, model)
            handle.load_state_dict({"seed": 0, "step": 5 + trial})
            acc.save_state(f"{folder}/trial{trial}")
            del model
            acc.free_memory()
            gc.collect()


def test_same_bits_as_plain_ddp(results: list[dict[str, Any]]) -> None:
    check_same(results)


def test_resume_is_bit_identical(results: list[dict[str, Any]]) -> None:
    check_resumed(results)


def test_logs_each_step(results: list[dict[str, Any]]) -> None:
    check_logged(results[0]["rows"], results[0]["figures"])


def test_a_step_of_several_batches_is_logged_once(results: list[dict[str, Any]]) -> None:
    assert results[0]["accumulated"] == [False, True, False, True]


def test_a_hook_that_was_never_called_warns(
    results: list[dict[str, Any]], trainer_ranks: Ranks, folder: Path
) -> None:
    assert results  # where the ranks waited for it in vain
    trainer_ranks.run(one_process, 1, str(folder))


def test_the_hook_of_a_model_that_is_gone_is_not_saved(trainer_ranks: Ranks, folder: Path) -> None:
    """As in a search of hyperparameters, with one accelerator."""
    trainer_ranks.run(one_model_after_another, 1, str(folder))
    assert [file.name for file in folder.glob("trial1/rhtcomm*")] == ["rhtcomm_0_rank0.pt"]
    assert torch.load(folder / "trial1/rhtcomm_0_rank0.pt")["step"] == 6


def test_example(results: list[dict[str, Any]]) -> None:
    check_resumed_example(results[0]["printed"], loss=0.05)
