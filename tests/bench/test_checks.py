"""Contestants that are wrong get no time, and ranks decide alike; on real ranks, by counts."""

import argparse
import itertools
from typing import Any

import torch
import torch.distributed as dist
from harness import Ranks as Processes
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from rhtcomm.bench.budget import TURN
from rhtcomm.bench.checks import Problem, check
from rhtcomm.bench.contestants import Contestant, compressed, torchs
from rhtcomm.bench.exchanges import field
from rhtcomm.bench.ranks import Ranks
from rhtcomm.bench.rounds import Budget, Entry, measure


def broken(fault: str) -> Contestant:
    """An average that has one fault."""
    if fault == "exact":  # where compression was asked for
        one = torchs("gloo", 2, ["float32"])[0]
        return Contestant(fault, "gloo", one.hook, lambda: None, 0.01, quantizer="quic_fl")

    def hook(state: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        if fault == "raises":
            raise ValueError("it cannot")
        mean = default_hooks.allreduce_hook(None, bucket).wait()
        if fault == "wrong":
            mean[0] += mean.norm()
        elif fault == "nan":
            mean[5] = torch.nan
        elif fault == "differs" and dist.get_rank() == 1:
            mean[3] = mean[3].nextafter(mean[3] + 1)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(mean)
        return done

    return Contestant(fault, "gloo", hook, lambda: None, 1e-10)


FAULTS = ["exact", "wrong", "nan", "differs", "raises"]


def measured_with_faults(rank: int, world_size: int) -> list[tuple[str, str, int]]:
    ranks = Ranks(torch.device("cpu"))
    problem = Problem(1 << 14, ranks)
    everybody = [broken(fault) for fault in FAULTS] + torchs("gloo", 2, ["float32", "bf16"])
    everybody += [compressed("gloo", 4, "gather"), compressed("gloo", 1.5, "two_shot", "ecdq")]
    everybody += [
        compressed("gloo", 1, quantizer="eden"),
        compressed("gloo", 2, quantizer="vector"),
    ]
    entries = [Entry(one, problem) for one in everybody]
    dropped = measure(entries, 1e3, Budget(1e3, ranks), ranks, "test")
    for one in everybody:
        one.close()
    assert not dropped
    return [(one.contestant.name, one.failure, len(one.seconds)) for one in entries]


def test_broken_contestants_get_no_time(ranks: Processes) -> None:
    both = ranks.run(measured_with_faults, 2)
    found = {name: (failure, rounds) for name, failure, rounds in both[0]}
    assert all(found[fault][1] == 0 for fault in FAULTS)
    assert "not the exchange that was asked for" in found["exact"][0]
    for fault in ("wrong", "nan"):
        assert "the mean is off by an NMSE of" in found[fault][0]
    assert found["differs"][0] == "ranks end with different means"
    assert found["raises"][0] == "ValueError: it cannot"
    rest = [found[name] for name in found if name not in FAULTS]
    assert len(rest) == 6
    assert all(failure == "" and rounds > 0 for failure, rounds in rest)
    assert both[0] == both[1]


def measured_by_counts(rank: int, world_size: int) -> tuple[list[int], int]:
    """Each look at the clock takes an hour by that of rank 0, and a day by the others'."""
    ranks = Ranks(torch.device("cpu"))
    problem = Problem(1024, ranks)
    names = ["float32", "bf16", "fp16"] * 4
    entries = [Entry(torchs("gloo", 2, [name])[0], problem) for name in names]
    looks = itertools.count()
    hour, own = 3600.0, 3600.0 if rank == 0 else 86400.0
    budget = Budget(20 * hour, ranks, clock=lambda: own * next(looks))
    dropped = measure(entries, 20 * hour, budget, ranks, "test")
    return [len(entry.seconds) for entry in entries], len(dropped)


def test_all_ranks_follow_the_budget_of_the_first(ranks: Processes) -> None:
    both = ranks.run(measured_by_counts, 2)
    assert both[0] == both[1]
    rounds, dropped = both[0]
    # One look to begin with, leaving 19 hours; one for each check, for which 60% are reserved.
    assert dropped == 1
    # 15 looks were taken before the first turn, and each further one takes another.
    assert rounds == [5 * TURN] * 11 + [0]


def checked_on_two_levels(rank: int, world_size: int) -> list[tuple[str, str, float]]:
    ranks = Ranks(torch.device("cpu"), ranks_per_node=2)
    assert (ranks.nodes, ranks.ranks_per_node) == (2, 2)
    chosen = {"bits": [4], "quantizers": ["ecdq"], "algorithms": ["all_gather", "two_shot"]}
    everybody = field(
        argparse.Namespace(communicator="torch", connections=2, **chosen), "gloo", ranks
    )
    problem = Problem(1 << 14, ranks)
    found = []
    for one in everybody:
        if one.compresses:
            nmse, _ = check(one, problem)
            found.append((one.name, one.carrier, nmse / one.error))
        one.close()
    return found


def test_two_levels_are_checked_as_one(ranks: Processes) -> None:
    found = ranks.run(checked_on_two_levels, 4)
    assert {(name, carrier) for name, carrier, _ in found[0]} == {
        (f"rht4 ecdq {algorithm}", carrier)
        for algorithm in ("all_gather", "two_shot")
        for carrier in ("gloo, 2 connections", "gloo, two levels")
    }
    assert all(0.8 < ratio < 1.2 for _, _, ratio in found[0])


def problems(rank: int, world_size: int) -> tuple[list[torch.Tensor], ...]:
    problem = Problem(2048, Ranks(torch.device("cpu")))
    own, mean = problem.low_rank()
    return [problem.data, own], [problem.mean, mean]


def test_problems_have_the_mean_that_they_say(ranks: Processes) -> None:
    found = ranks.run(problems, 2)
    for kind in range(2):
        data = torch.stack([of_rank[0][kind] for of_rank in found]).double()
        assert not torch.equal(data[0], data[1])
        for _, means in found:
            torch.testing.assert_close(means[kind], data.mean(dim=0).float())
