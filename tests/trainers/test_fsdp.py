"""FSDP2 without a trainer, on two ranks; tests/hooks has the details."""

import os
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from trainers import (
    OPTIONS,
    RATE,
    batches,
    check_resumed,
    check_resumed_example,
    example,
    launched,
    loss_of,
    seeded,
)

import rhtcomm.hooks

FSDP_OPTIONS = OPTIONS | {"error_feedback": False}  # which FSDP2 has not


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = seeded()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def shards(net: nn.Module) -> torch.Tensor:
    parameters: list[Any] = [*net.parameters()]
    return torch.cat([p.detach().to_local().flatten() for p in parameters])


def saved(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(net, optimizer)
    return {"model": weights, "optimizer": moments}


def train(
    rank: int, folder: str, epochs: range, keep: bool = True, **options: Any
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """This rank's shards after some epochs, and the figures of the steps; the first run is saved.

    Without `keep` the hook's state is not loaded.
    """
    net = sharded()
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    figures = []
    with rhtcomm.hooks.compress_fsdp(net, **FSDP_OPTIONS | options) as handle:
        if epochs.start:
            loaded = saved(net, optimizer) | ({"hook": handle} if keep else {})
            dcp.load(loaded, checkpoint_id=f"{folder}/{epochs.start}")
            set_state_dict(
                net,
                optimizer,
                model_state_dict=loaded["model"],
                optim_state_dict=loaded["optimizer"],
            )
        for epoch in epochs:
            for x in batches(rank):
                loss_of(net, x).backward()
                optimizer.step()
                optimizer.zero_grad()
                figures.append(handle.figures())
            if not epochs.start:
                state = saved(net, optimizer) | {"hook": handle}
                dcp.save(state, checkpoint_id=f"{folder}/{epoch + 1}")
    return shards(net), figures


def uncompressed(rank: int, epochs: int) -> torch.Tensor:
    net = sharded()
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    for x in batches(rank) * epochs:
        loss_of(net, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return shards(net)


def cases(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    os.chdir(folder)
    whole, figures = train(rank, folder, range(2))
    resumed, _ = train(rank, folder, range(1, 2))
    forgotten, _ = train(rank, folder, range(1, 2), keep=False)
    fine, _ = train(rank, f"{folder}/fine", range(2), bits=8)
    with pytest.warns(match="hook was never called"):
        rhtcomm.hooks.compress_fsdp(sharded()).close()
    with (
        launched(rank, world_size),
        mock.patch("torch.distributed.init_process_group"),  # there is one, which others need
        mock.patch("torch.distributed.destroy_process_group"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # fsdp-3
        printed = [example("train_fsdp.py", *last) for last in ([], ["fsdp-2"])]
    return {
        "whole": whole,
        "figures": figures,
        "resumed": resumed,
        "forgotten": forgotten,
        "begun": shards(sharded()),
        "fine": fine,
        "uncompressed": uncompressed(rank, 2),
        "printed": printed,
    }


def test_trains_as_plain_fsdp2(results: list[dict[str, Any]]) -> None:
    """With 8 bits. An error in the gradients' place or size would be as large as the way."""
    for result in results:
        error = (result["fine"] - result["uncompressed"]).norm()
        way = (result["uncompressed"] - result["begun"]).norm()
        assert 0 < error < 0.05 * way


def test_resume_is_bit_identical(results: list[dict[str, Any]]) -> None:
    check_resumed(results)


def test_logs_each_step(results: list[dict[str, Any]]) -> None:
    """8 bits in the steps of the warm-up, then 2; each rank sends half of each unit."""
    numel = sum(p.numel() for p in seeded().parameters())
    for result in results:
        for step, figures in enumerate(result["figures"]):
            bits = 8 if step < OPTIONS["warmup_steps"] else OPTIONS["bits"]
            sent = numel / 2 * bits / 8
            assert sent < figures["rhtcomm/bytes_sent"] < 1.3 * sent + 200
            assert figures["rhtcomm/compression_ratio"] == pytest.approx(
                numel / 2 * 4 / figures["rhtcomm/bytes_sent"], rel=0.05
            )
            assert figures["rhtcomm/exchange_seconds"] > 0


def test_a_hook_that_was_never_called_warns(results: list[dict[str, Any]]) -> None:
    assert results  # where the ranks waited for it in vain


def test_example(results: list[dict[str, Any]]) -> None:
    check_resumed_example(results[0]["printed"], loss=0.05)
