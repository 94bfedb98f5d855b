"""DeepSpeed without ZeRO, on two ranks."""

import csv
import logging
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from models import parameters_of
from torch.nn.parallel import DistributedDataParallel
from trainers import (
    OPTIONS,
    RATE,
    batches,
    check_example,
    check_logged,
    check_resumed,
    check_same,
    example,
    launched,
    loss_of,
    seeded,
)

import rhtcomm.hooks

pytest.importorskip("deepspeed", reason="make test-trainers installs it")


def engine_of(net: torch.nn.Module, logs: str = "", **config: Any) -> Any:
    import deepspeed

    monitor = {"enabled": bool(logs), "output_path": str(logs), "job_name": "rank 0"}
    config = {"train_micro_batch_size_per_gpu": 4, "csv_monitor": monitor, **config}
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    return engine


def plain(rank: int, epochs: int, accumulate: int) -> tuple[torch.Tensor, list[Any]]:
    """As `trainers.plain`, in DDP whose one bucket has the parameters in the model's order."""
    model = seeded()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)  # never other buckets
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    figures = []
    with rhtcomm.hooks.register(ddp, **OPTIONS) as handle:
        for i, x in enumerate(batches(rank) * epochs, 1):
            with nullcontext() if i % accumulate == 0 else ddp.no_sync():
                (loss_of(ddp, x) / accumulate).backward()
            if i % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                figures.append(handle.figures())
    return parameters_of(model), figures


def train(
    rank: int, folder: str, epochs: range, accumulate: int = 1, unwrapped: bool = False
) -> torch.Tensor:
    """Parameters after some epochs, of which each is saved."""
    from rhtcomm.hooks.trainers.deepspeed import register

    net = seeded()
    engine = engine_of(net, f"{folder}/logs", gradient_accumulation_steps=accumulate)
    handle = register(engine, **OPTIONS)
    with pytest.raises(RuntimeError, match="the engine already has a hook"):
        register(engine, **OPTIONS)
    if epochs.start:
        engine.load_checkpoint(folder, f"{epochs.start}")
    for epoch in epochs:
        for x in batches(rank):
            loss = loss_of(net if unwrapped else engine, x)
            if unwrapped:
                loss.backward()
            else:
                engine.backward(loss)
                engine.step()
        engine.save_checkpoint(folder, f"{epoch + 1}")
    trained = parameters_of(net)
    handle.remove()
    if accumulate == 1 and not unwrapped:  # then the engine averages and saves by itself
        calls = handle.stats().steps
        engine.backward((rank + 0.5) * net.first.bias.sum())
        assert torch.equal(net.first.bias.grad, torch.ones(48)), "the mean of 1/2 and 3/2"
        engine.save_checkpoint(folder, "plain")
        assert not [*Path(folder, "plain").glob("rhtcomm*")]
        assert handle.stats().steps == calls
    return trained


def logged(folder: str) -> list[dict[str, str]]:
    """What DeepSpeed's monitor wrote, by step: one file for each name."""
    rows: list[dict[str, str]] = []
    for file in Path(folder, "logs/rank 0").glob("rhtcomm_*.csv"):
        with file.open() as lines:
            (_, header), *values = csv.reader(lines)
        rows = rows or [{} for _ in values]
        for row, (samples, value) in zip(rows, values, strict=True):
            row |= {f"rhtcomm/{header}": value, f"samples of {header}": samples}
    return rows


def refused() -> None:
    """What has no place for the hook."""
    from rhtcomm.hooks.trainers.deepspeed import register

    with pytest.raises(TypeError, match="must be a DeepSpeedEngine, the first of what"):
        register(seeded())
    with pytest.raises(ValueError, match=r"ZeRO stage 1.*compress_fsdp"):
        register(
            engine_of(seeded(), zero_optimization={"stage": 1}, zero_allow_untested_optimizer=True)
        )
    with pytest.raises(ValueError, match="sums gradients"):
        register(engine_of(seeded(), gradient_allreduce_op="sum"))
    with pytest.raises(ValueError, match="leave out process_group"):
        register(engine_of(seeded()), process_group=torch.distributed.group.WORLD)


def cases(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    with launched(rank, world_size), warnings.catch_warnings():
        os.environ |= {"DS_ACCELERATOR": "cpu"}
        os.chdir(folder)
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.utils import logger

        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated")

        logger.setLevel(logging.ERROR)
        # Which DeepSpeed would spend a minute to compile, and is for inference.
        with mock.patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
            return results_of(rank, folder)


def results_of(rank: int, folder: str) -> dict[str, Any]:
    expected, figures = plain(rank, epochs=2, accumulate=1)
    whole = train(rank, folder, range(2))
    rows = logged(folder) if rank == 0 else []
    resumed = train(rank, folder, range(1, 2))
    torch.distributed.barrier()
    Path(folder, f"1/rhtcomm_rank{rank}.pt").unlink()
    torch.distributed.barrier()
    with pytest.warns(match="has no state of the hook"):
        forgotten = train(rank, folder, range(1, 2))
    accumulated = train(rank, f"{folder}/accumulated", range(2), accumulate=3)
    expected_accumulated, _ = plain(rank, epochs=2, accumulate=3)
    refused()
    with pytest.warns(match="hook was never called"):
        train(rank, f"{folder}/unwrapped", range(1), unwrapped=True)
    return {
        "plain": expected,
        "figures": figures,
        "whole": whole,
        "accumulated": accumulated,
        "plain accumulated": expected_accumulated,
        "rows": rows,
        "resumed": resumed,
        "forgotten": forgotten,
        "example": example("train_deepspeed.py"),
    }


def test_same_bits_as_plain_ddp(results: list[dict[str, Any]]) -> None:
    check_same(results)
    for result in results:
        assert torch.equal(result["accumulated"], result["plain accumulated"])


def test_resume_is_bit_identical(results: list[dict[str, Any]]) -> None:
    check_resumed(results)


def test_logs_each_step(results: list[dict[str, Any]]) -> None:
    rows = results[0]["rows"]
    check_logged(rows, results[0]["figures"])
    assert [int(row["samples of bytes_sent"]) for row in rows] == [8, 16, 24, 32, 40, 48]


def test_a_hook_that_was_never_called_warns(results: list[dict[str, Any]]) -> None:
    assert results  # where the ranks called it in vain


def test_example(results: list[dict[str, Any]]) -> None:
    check_example(results[0]["example"], loss=0.5)
