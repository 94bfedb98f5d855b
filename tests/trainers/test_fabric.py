"""Lightning Fabric, on two ranks."""

import csv
import os
from pathlib import Path
from typing import Any

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

import rhtcomm.hooks
from rhtcomm.hooks.trainers.common import state_of_all_ranks

pytest.importorskip("lightning", reason="the extra 'test' is not installed")


def train(
    rank: int, folder: str, epochs: range, hook: bool = True, unwrapped: bool = False
) -> torch.Tensor:
    """Parameters after some epochs, of which each is saved.

    Without `hook` its state is not loaded. With `unwrapped`, a mistake by which no gradient is
    averaged.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import CSVLogger

    logger = CSVLogger(folder, "logs", flush_logs_every_n_steps=1)
    devices = torch.distributed.get_world_size()
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp", loggers=logger)
    fabric.launch()
    net = seeded()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), RATE))
    with rhtcomm.hooks.register(model, **OPTIONS) as handle:
        state = {"model": model, "optimizer": optimizer, "hook": handle}
        if epochs.start:
            known = state if hook else {"model": model, "optimizer": optimizer}
            fabric.load(f"{folder}/{epochs.start}.ckpt", known, strict=hook)
        for epoch in epochs:
            for index, x in enumerate(batches(rank), start=epoch * len(batches(rank))):
                fabric.backward(loss_of(net if unwrapped else model, x))
                optimizer.step()
                optimizer.zero_grad()
                fabric.log_dict(handle.figures(), index)
            fabric.save(f"{folder}/{epoch + 1}.ckpt", state | {"hook": state_of_all_ranks(handle)})
    return parameters_of(net)


def cases(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    os.chdir(folder)
    with launched(rank, world_size):
        expected, figures = plain(rank, epochs=2)
        whole = train(rank, folder, range(2))
        resumed = train(rank, folder, range(1, 2))
        forgotten = train(rank, folder, range(1, 2), hook=False)
        with pytest.warns(match="hook was never called"):
            train(rank, f"{folder}/unwrapped", range(1), unwrapped=True)
        printed = [example("train_fabric.py", *last) for last in ([], ["fabric-2.ckpt"])]
    return {
        "whole": whole,
        "plain": expected,
        "figures": figures,
        "resumed": resumed,
        "forgotten": forgotten,
        "printed": printed,
    }


def one_process(rank: int, world_size: int, folder: str) -> None:
    with launched(rank, world_size):
        assert torch.equal(train(rank, folder, range(1)), plain(rank, 1)[0])


def test_same_bits_as_plain_ddp(
    results: list[dict[str, Any]], trainer_ranks: Ranks, tmp_path: Path
) -> None:
    check_same(results)
    trainer_ranks.run(one_process, 1, str(tmp_path))


def test_resume_is_bit_identical(results: list[dict[str, Any]]) -> None:
    check_resumed(results)


def test_logs_each_step(results: list[dict[str, Any]], folder: Path) -> None:
    with (folder / "logs/version_0/metrics.csv").open() as file:
        check_logged([*csv.DictReader(file)], results[0]["figures"])


def test_a_hook_that_was_never_called_warns(results: list[dict[str, Any]]) -> None:
    assert results  # where the ranks waited for it in vain


def test_example(results: list[dict[str, Any]]) -> None:
    check_resumed_example(results[0]["printed"], loss=0.05)
