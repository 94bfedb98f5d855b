"""What an averager does with all sorts of models, sites and checkpoints."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import Ranks
from outer import averager, everything, mean_of_models, normed, train, wander
from problems import numbers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import HierarchicalCommunicator

# ---- Dtypes and buffers -----------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.linspace(1, 1.9, 64, dtype=torch.bfloat16))
        self.wide = nn.Parameter(torch.linspace(0, 1, 9, dtype=torch.float64))
        self.complex = nn.Parameter(torch.zeros(5, 2, dtype=torch.complex64))
        self.channels = nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.codes = nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_buffer("statistic", torch.zeros(6))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), 1 / 3]))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(4), persistent=False)


def mixed(rank: int, world_size: int) -> dict[str, Any]:
    model = Mixed()

    def learn(scale: float) -> None:
        with torch.no_grad():
            model.low += scale * (rank + 1)
            model.wide += scale * (rank + 1)
            model.complex += scale * torch.complex(torch.tensor(1.0), torch.tensor(2.0 * rank))
            model.channels += scale * numbers(rank, shape=(4, 3, 2, 2))
            model.frozen += rank
            model.statistic = model.statistic + scale * (rank + 1)  # another tensor
            model.count += rank
            model.cache += rank

    with averager(model, mean_of_models, period=1, bits=8) as outer:
        outer.step()  # of nothing
        nothing = {name: x.clone() for name, x in model.state_dict().items()}
        same = {name: x.clone() for name, x in model.state_dict().items()}
        model.load_state_dict(same, assign=True)  # other tensors too
        learn(1.0)
        outer.step()
        learned = {name: x.clone() for name, x in model.state_dict().items()}
        learned["cache"] = model.cache.clone()
        master = outer.anchors.low.detach().clone()
        outer.step()
        kept = outer.anchors.low.detach().clone()
        dtypes = {name: x.dtype for name, x in outer.anchors.named_parameters()}
    return {
        **{"nothing": nothing, "learned": learned, "dtypes": dtypes},
        **{"master": master, "kept": kept},
    }


def test_each_dtype_is_averaged_and_what_is_not_followed_stays(ranks: Ranks) -> None:
    results, begin = ranks.run(mixed, 2), Mixed().state_dict()
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["nothing"], dict(begin), rtol=0, atol=0)
        found = result["learned"]
        for name in ("low", "wide", "complex", "channels", "statistic", "mask"):
            assert torch.equal(found[name], results[0]["learned"][name]), name
        torch.testing.assert_close(found["low"], begin["low"] + 1.5, rtol=2.0**-7, atol=0)
        torch.testing.assert_close(found["wide"], begin["wide"] + 1.5, rtol=0, atol=1e-15)
        torch.testing.assert_close(
            found["complex"], begin["complex"] + complex(1, 1), rtol=0.05, atol=0
        )
        exact = torch.stack([numbers(r, shape=(4, 3, 2, 2)) for r in (0, 1)]).mean(0)
        assert (found["channels"] - exact).norm() < 0.03 * exact.norm()
        assert torch.equal(found["statistic"], torch.full((6,), 1.5)), "not exact"
        assert torch.equal(found["mask"], begin["mask"])
        for name, value in {"frozen": rank, "count": rank, "cache": rank}.items():
            assert bool((found[name] == value).all()), name
        # Master weights: nothing was learned, so what the model cannot hold is not taken back.
        assert torch.equal(result["kept"], result["master"])
        assert not torch.equal(result["kept"], found["low"].float()), "of the model's dtype"
        assert result["dtypes"]["low"] == result["dtypes"]["complex"] == torch.float32
        assert result["dtypes"]["wide"] == torch.float64


# ---- Sites ------------------------------------------------------------------------------------


def sites(rank: int, world_size: int, levels: bool) -> dict[str, Any]:
    """Two sites of two ranks, which train by DDP within each."""
    within, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    between, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    model = normed()
    ddp = DistributedDataParallel(model, process_group=within)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    ranks: dict[str, Any] = {"process_group": between}
    if levels:
        ranks = {"communicator": HierarchicalCommunicator(within, between), "timeout": None}
    seen = []
    with averager(ddp, period=2, **ranks) as outer:
        for step in range(5):
            train(ddp, optimizer, rank, step)
            outer.step()
            seen.append(everything(model)[: everything(outer.anchors).numel()])
        return {
            "seen": seen,
            "sent": outer.stats().bytes_sent,
            "names": [*outer.anchors.state_dict()],
        }


def test_sites_train_by_ddp_and_exchange_between_them(ranks: Ranks) -> None:
    sent = {}
    for levels in (False, True):
        results = ranks.run(sites, 4, levels)
        steps = [[result["seen"][step] for result in results] for step in range(5)]
        for step, (a, b, c, d) in enumerate(steps):
            assert torch.equal(a, b), "a site's ranks differ"
            assert torch.equal(c, d), "a site's ranks differ"
            assert torch.equal(a, c) is (step % 2 == 1)
        sent[levels] = sum(result["sent"] for result in results)
        assert results[0]["names"][0] == "0.weight"
    assert sent[True] < 0.6 * sent[False], "each byte crosses once"


def in_ddp(rank: int, world_size: int) -> None:
    ddp = DistributedDataParallel(normed())
    with pytest.warns(match=r"ranks \[0, 1\] are also in one Distributed"):
        outer = averager(ddp, period=1)
    outer.step()
    outer.close()


def test_a_model_in_ddp_over_the_ranks_that_exchange_warns(ranks: Ranks) -> None:
    ranks.run(in_ddp, 2)


# ---- Checkpoints by torch.distributed.checkpoint ----------------------------------------------


def save_and_load(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    def start() -> tuple[nn.Module, Any]:
        model = normed()
        return model, averager(model, period=2, bits=4, error_feedback=True)

    def go(model: nn.Module, outer: Any, steps: range) -> torch.Tensor:
        for step in steps:
            wander(model, rank, step)
            outer.step()
        return everything(model)

    model, outer = start()
    go(model, outer, range(4))
    dcp.save({"model": model, "outer": outer}, checkpoint_id=folder)
    whole = go(model, outer, range(4, 8))
    outer.close()
    model, outer = start()
    dcp.load({"model": model, "outer": outer}, checkpoint_id=folder)
    steps, resumed = outer.inner_steps, go(model, outer, range(4, 8))
    outer.close()
    return {"whole": whole, "resumed": resumed, "steps": steps}


def test_torch_distributed_checkpoint_takes_it_as_it_is(ranks: Ranks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for result in ranks.run(save_and_load, 2, str(Path(folder) / "checkpoint")):
            assert result["steps"] == 4
            assert torch.equal(result["resumed"], result["whole"])
