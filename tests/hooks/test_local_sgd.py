"""Outer steps: what ranks end with, against theory and references in float64."""

import io
import threading
from typing import Any

import pytest
import torch
from harness import Ranks, limit
from outer import averager, everything, mean_of_models, normed, train, wander
from problems import ROUNDOFF
from torch import nn

from rhtcomm.reduce import Reducer

# ---- Anchors ----------------------------------------------------------------------------------


def ten_outer_steps(rank: int, world_size: int) -> dict[str, Any]:
    model = normed()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    apart, together = [], []
    with averager(model, period=3) as outer:
        for step in range(30):
            train(model, optimizer, rank, step)
            apart.append(everything(model))
            if outer.step():
                together.append(everything(model))
        anchors, stats = everything(outer.anchors), outer.stats()
    return {"apart": apart[2], "together": together, "anchors": anchors, "stats": stats}


def test_anchors_are_the_same_bits_after_ten_outer_steps(ranks: Ranks) -> None:
    results = ranks.run(ten_outer_steps, 3)
    first = results[0]
    assert len(first["together"]) == 10
    assert not torch.equal(results[1]["apart"], first["apart"]), "ranks had the same data"
    for result in results:
        for ours, theirs in zip(result["together"], first["together"], strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(result["anchors"], first["anchors"])
        numel = first["anchors"].numel()
        assert torch.equal(result["anchors"], result["together"][-1][:numel])
        assert result["stats"].steps == 10
        # 4 bits, two_shot or all_gather of 3 ranks, and BatchNorm's statistics in float64.
        assert 4 < result["stats"].compression_ratio < 8.1


# ---- One exchange -----------------------------------------------------------------------------


class Vector(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


NUMEL = 1 << 17


def one_exchange(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    model = Vector(NUMEL)
    with averager(
        model, mean_of_models, period=2, block=4096, algorithm="all_gather", nmse_every=1
    ) as outer:
        for step in range(2):
            wander(model, rank, step)
            mine = model.weight.detach().double().clone()
            outer.step()
        return {"mine": mine, "mean": model.weight.detach().double(), "nmse": outer.stats().nmse}


def test_one_exchange_errs_as_theory_says(ranks: Ranks) -> None:
    results = ranks.run(one_exchange, 3)
    changes = torch.stack([result["mine"] for result in results])  # from zeros
    exact = changes.mean(0)
    expected = 0.01159 * changes.square().sum(1).mean() / 3
    for result in results:
        error = (result["mean"] - exact).square().sum()
        assert abs(error / expected - 1) < 0.03
        assert result["nmse"] == pytest.approx(float(error / exact.square().sum()), rel=1e-3)


# ---- References in float64 --------------------------------------------------------------------


def follow(rank: int, world_size: int, options: dict[str, Any], steps: int) -> list[torch.Tensor]:
    """Uncompressed exchanges of parameters that wander; the parameters after each step."""
    model, seen = normed(), []
    with averager(model, **options, min_numel=1 << 30) as outer:
        for step in range(steps):
            wander(model, rank, step)
            outer.step()
            seen.append(everything(model)[: everything(outer.anchors).numel()])
    return seen


def reference(
    world_size: int, steps: int, period: int, sizes: list[list[int]], delay: int
) -> list[list[torch.Tensor]]:
    """By rank and step, what `follow` should see. `sizes` are those of each fragment's tensors.

    Nesterov's momentum as Sutskever et al. (ICML 2013) have it, in torch's form:
    v <- 0.9 v + g, a <- a - 0.7 (g + 0.9 v).
    """
    start = everything(normed())
    numel = sum(map(sum, sizes))
    w = [start[:numel].clone() for _ in range(world_size)]
    a, v = start[:numel].clone(), torch.zeros(numel, dtype=torch.float64)
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + sum(size))
    began: dict[int, tuple[int, list[torch.Tensor]]] = {}  # by step: fragment and parameters
    seen: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
    for t in range(1, steps + 1):
        for rank in range(world_size):
            model = normed()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            wander(model, rank, t - 1)
            w[rank] += everything(model)[:numel]
        for p in range(len(sizes)):
            if t >= (at := period * (p + 1) // len(sizes)) and (t - at) % period == 0:
                began[t] = (p, [x.clone() for x in w])
        if t - delay in began:
            p, before = began.pop(t - delay)
            here = slice(edges[p], edges[p + 1])
            g = a[here] - torch.stack(before)[:, here].mean(0)
            v[here] = 0.9 * v[here] + g
            a[here] -= 0.7 * (g + 0.9 * v[here])
            for rank in range(world_size):
                w[rank][here] = a[here] + w[rank][here] - before[rank][here]
        for rank in range(world_size):
            seen[rank].append(w[rank].clone())
    return seen


TENSORS = [64 * 96, 96, 96, 96, 96 * 64, 64]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"period": 2}, [TENSORS]),
        ({"period": 4, "delay": 3}, [TENSORS]),
        ({"period": 5, "delay": 3, "fragments": 2}, [TENSORS[:3], TENSORS[3:]]),
        ({"period": 3, "delay": 1, "fragments": 3}, [TENSORS[:1], TENSORS[1:4], TENSORS[4:]]),
    ],
)
def test_outer_nesterov_follows_its_reference(
    options: dict[str, Any], sizes: list[list[int]], ranks: Ranks
) -> None:
    steps = 14
    found = ranks.run(follow, 3, options, steps)
    expected = reference(3, steps, options["period"], sizes, options.get("delay", 0))
    for ours, theirs in zip(found, expected, strict=True):
        bound = steps * 16 * ROUNDOFF * float(theirs[-1].abs().max())
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=bound)


def train_meanwhile(rank: int, world_size: int) -> list[bool]:
    """The exchange begins in the second step, and goes on only after that has returned."""
    model, goes_on, original = normed(), threading.Event(), Reducer.mean_

    def waiting(self: Reducer, *args: Any, **options: Any) -> Any:
        assert goes_on.wait(limit(40)), "step() waited for the exchange"
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch, averager(model, period=2, delay=1) as outer:
        patch.setattr(Reducer, "mean_", waiting)
        applied = [outer.step(), outer.step()]
        goes_on.set()
        return [*applied, outer.step()]


def test_an_exchange_with_delay_lets_training_go_on(ranks: Ranks) -> None:
    assert ranks.run(train_meanwhile, 2) == [[False, False, True]] * 2


# ---- Checkpoints ------------------------------------------------------------------------------

RESUMED: dict[str, Any] = {"period": 4, "fragments": 2, "delay": 1, "bits": 2}
RESUMED |= {"quantizer": "eden", "error_feedback": True, "seed": 5}


def resume(rank: int, world_size: int) -> dict[str, Any]:
    """Eleven steps at once; and seven, a checkpoint, and four more in new objects."""

    def start() -> tuple[nn.Module, Any, Any]:
        model = normed()
        return model, torch.optim.AdamW(model.parameters(), 1e-3), averager(model, **RESUMED)

    def go(model: nn.Module, optimizer: Any, outer: Any, steps: range) -> None:
        for step in steps:
            train(model, optimizer, rank, step)
            outer.step()

    def ends(model: nn.Module, outer: Any) -> dict[str, Any]:
        saved = outer.state_dict()
        outer.synchronize()
        outer.close()
        return {"model": everything(model), "averager": saved}

    model, optimizer, outer = start()
    go(model, optimizer, outer, range(6))
    file = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "averager": outer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    go(model, optimizer, outer, range(6, 11))
    outcome = {"whole": ends(model, outer)}
    for kept in (["model", "optimizer", "averager"], ["model", "optimizer"]):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, optimizer, outer = start()
        for name, part in {"model": model, "optimizer": optimizer, "averager": outer}.items():
            if name in kept:
                part.load_state_dict(saved[name])
        go(model, optimizer, outer, range(6, 11))
        outcome[kept[-1]] = ends(model, outer)
    return outcome | {"saved": saved["averager"]}


def test_a_resumed_run_ends_with_the_same_bits(ranks: Ranks) -> None:
    for rank, outcome in enumerate(ranks.run(resume, 2)):
        saved = outcome["saved"]
        assert saved["inner_steps"] == 6
        assert saved["in_flight"] == [[0, 7]], "the checkpoint had to hold an exchange"
        assert saved[f"residuals of rank {rank} of 2"]["0.weight"].abs().max() > 0
        torch.testing.assert_close(outcome["averager"], outcome["whole"], rtol=0, atol=0)
        assert not torch.equal(outcome["optimizer"]["model"], outcome["whole"]["model"])
