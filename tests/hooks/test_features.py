"""What DDP can be told, with the hook.

Most cases record each bucket as the hook gets it and gives it back, and compare that, bit for bit,
with Codec on what all ranks recorded; and the gradients with the mean of those of plain copies.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from models import (
    EarlyBranches,
    Probe,
    all_equal,
    descend,
    error_of_mean,
    gradients_of,
    mlp,
    parameters_of,
    task_loss,
    wrapped,
)
from problems import numbers
from states import BLOCK, FINE, TIMEOUT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import Codec, Key, QuicFL
from rhtcomm.hooks import RHTState, rht_hook

SEED = 3
RECORDED: dict[str, Any] = FINE | {"algorithm": "all_gather", "seed": SEED, "timeout": TIMEOUT}
CODEC = Codec(QuicFL(8), block=BLOCK)  # of RECORDED


# ---- Buckets as the hook sees them ------------------------------------------------------------

PlainRecord = tuple[int, int, torch.Tensor, torch.Tensor, list[int]]


@dataclass
class Record:
    step: int
    index: int
    sent: torch.Tensor
    received: torch.Tensor
    segments: list[int]


@dataclass
class Recorder:
    """rht_hook, keeping what it was given and what it gave."""

    records: list[Record] = field(default_factory=list)
    step: int = 0

    def hook(
        self,
        state: RHTState,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        step, index, sent = self.step, bucket.index(), bucket.buffer().clone()
        segments = [parameter.numel() for parameter in bucket.parameters()]
        self.step += bucket.is_last()

        def keep(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            received = future.value()
            self.records.append(Record(step, index, sent, received.clone(), segments))
            return received

        return rht_hook(state, bucket).then(keep)

    def plain(self) -> list[PlainRecord]:
        return [(r.step, r.index, r.sent, r.received, r.segments) for r in self.records]


def check_records(by_rank: list[list[PlainRecord]]) -> list[int]:
    """Every bucket holds what CODEC makes of all ranks' buckets; returns buckets by step."""
    world_size = len(by_rank)
    buckets: list[int] = []
    for records in zip(*by_rank, strict=True):
        ((step, index),) = {(step, index) for step, index, *_ in records}
        buckets[step:] = [index + 1]
        key = Key(SEED, step, index)
        payloads = [
            CODEC.encode(sent, key, rank, world_size)
            for rank, (_, _, sent, *_) in enumerate(records)
        ]
        numel, dtype = records[0][2].numel(), records[0][2].dtype
        expected = CODEC.decode_mean(torch.stack(payloads), key, numel).to(dtype)
        # What no rank used is zero.
        parts = [sent.split(segments) for _, _, sent, _, segments in records]
        for part, *of_ranks in zip(expected.split(records[0][4]), *parts, strict=True):
            if not any(own.any() for own in of_ranks):
                part.zero_()
        for rank, (_, _, _, received, _) in enumerate(records):
            assert torch.equal(received, expected), f"step {step}, bucket {index}, rank {rank}"
    return buckets


# ---- Models -----------------------------------------------------------------------------------


def plain_model() -> nn.Module:
    return mlp(32, 64, 64, 8)


class Mixed(nn.Module):
    """Parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 8)
        self.middle = nn.Linear(64, 64).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.first(x).tanh().bfloat16()).float()
        result: torch.Tensor = self.last(hidden.tanh())
        return result


class Branches(nn.Module):
    """One of two branches, as the first input says."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(32, 64)
        self.branches = nn.ModuleList([mlp(64, 32, 8), mlp(64, 48, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.branches[int(x[0, 0] > 0)](self.trunk(x).tanh())
        return result


# ---- Features ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    model: Callable[[], nn.Module]
    options: dict[str, Any]
    first: int | None  # buckets in the first step
    last: int  # in the last step, at least
    alike: bool = False  # all ranks take the same branch


FEATURES = {
    # One bucket of everything, then several in the order in which gradients came.
    "rebuilt buckets": Feature(plain_model, {"bucket_cap_mb": 0.001}, 1, 3),
    "one bucket": Feature(plain_model, {}, 1, 1),
    "mixed dtypes": Feature(Mixed, {"bucket_cap_mb": 0.001}, 2, 3),
    "views": Feature(plain_model, {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True}, 1, 3),
    "static graph": Feature(plain_model, {"bucket_cap_mb": 0.001, "static_graph": True}, None, 3),
    "unused parameters": Feature(
        Branches, {"bucket_cap_mb": 0.001, "find_unused_parameters": True}, None, 3
    ),
}
# DDP then hands over no bucket without gradients, not even a step's last one.
SKIP = {"find_unused_parameters": True, "skip_all_reduce_unused_params": True}
if SKIP.keys() <= inspect.signature(DistributedDataParallel).parameters.keys():
    FEATURES["skipped buckets"] = Feature(
        EarlyBranches, {"bucket_cap_mb": 0.001, **SKIP}, None, 3, alike=True
    )


def follow(rank: int, world_size: int, name: str) -> tuple[Any, torch.Tensor, list[float]]:
    """Four steps; the records, the parameters, and the squared errors of the gradients."""
    feature = FEATURES[name]
    torch.manual_seed(0)
    model = feature.model()
    recorder, errors = Recorder(), []
    with RHTState(**RECORDED) as state:
        ddp = wrapped(model, state, recorder.hook, **feature.options)
        for step in range(4):
            x = numbers(rank, step, shape=(16, 32))
            x[0, 0] = (step if feature.alike else rank + step) % 2 if step < 3 else 0  # the branch
            recorder.step = step
            plain = copy.deepcopy(model)
            task_loss(plain, x).backward()
            task_loss(ddp, x).backward()
            errors.append(error_of_mean(gradients_of(model), gradients_of(plain)))
            descend(model)
        assert state.stats().steps == 4
    return recorder.plain(), parameters_of(model), errors


# Of `error_of_mean`: the theory's is 4.4e-5 / world_size, and bfloat16 adds up to 2^-18 = 4e-6. The
# mean of another set of ranks, or of other parameters, would be off by about 1.
GRADIENT_TOLERANCE = 1e-4


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", FEATURES)
def test_gradients_are_the_compressed_mean(name: str, world_size: int, ranks: Ranks) -> None:
    results = ranks.run(follow, world_size, name)
    buckets = check_records([records for records, _, _ in results])
    assert all_equal([parameters for _, parameters, _ in results])
    for _, _, errors in results:
        assert 0 < max(errors) < GRADIENT_TOLERANCE
    feature = FEATURES[name]
    assert len(buckets) == 4
    assert feature.first in (None, buckets[0])
    assert buckets[-1] >= feature.last


def accumulate(rank: int, world_size: int) -> tuple[Any, torch.Tensor, list[float]]:
    """Two backward passes without synchronization and one with it, twice."""
    torch.manual_seed(0)
    model = plain_model()
    recorder, errors = Recorder(), []
    with RHTState(**RECORDED) as state:
        ddp = wrapped(model, state, recorder.hook, bucket_cap_mb=0.001)
        for round_ in range(2):
            plain = copy.deepcopy(model)
            for step in range(3):
                x = numbers(rank, round_, step, shape=(16, 32))
                task_loss(plain, x).backward()
                if step < 2:
                    with ddp.no_sync():
                        task_loss(ddp, x).backward()
                    assert torch.equal(gradients_of(model), gradients_of(plain))
                    assert state.stats().steps == round_, "no_sync called the hook"
                else:
                    task_loss(ddp, x).backward()
            assert state.stats().steps == round_ + 1
            errors.append(error_of_mean(gradients_of(model), gradients_of(plain)))
            descend(model)
    return recorder.plain(), parameters_of(model), errors


def test_no_sync_accumulates(ranks: Ranks) -> None:
    results = ranks.run(accumulate, 3)
    assert len(check_records([records for records, _, _ in results])) == 2
    assert all_equal([parameters for _, parameters, _ in results])
    assert all(max(errors) < GRADIENT_TOLERANCE for _, _, errors in results)


def train_unevenly(rank: int, world_size: int, batches: list[int]) -> tuple[Any, torch.Tensor, int]:
    torch.manual_seed(0)
    model = plain_model()
    recorder = Recorder()
    with RHTState(**RECORDED) as state:
        ddp = wrapped(model, state, recorder.hook, bucket_cap_mb=0.001)
        with ddp.join():
            for step in range(batches[rank]):
                task_loss(ddp, numbers(rank, step, shape=(16, 32))).backward()
                descend(model)
        return recorder.plain(), parameters_of(model), state.stats().steps


@pytest.mark.parametrize("batches", [(3, 5), (4, 1, 6), (3, 0)])
def test_join_with_uneven_inputs(batches: tuple[int, ...], ranks: Ranks) -> None:
    results = ranks.run(train_unevenly, len(batches), batches)
    assert len(check_records([records for records, _, _ in results])) == max(batches)
    assert all_equal([parameters for _, parameters, _ in results])
    assert [steps for _, _, steps in results] == [max(batches)] * len(batches)
    # A rank that is through takes part with zeros.
    for count, (records, _, _) in zip(batches, results, strict=True):
        assert all((step < count) == bool(sent.any()) for step, _, sent, *_ in records)


def train_in_subgroup(rank: int, world_size: int) -> tuple[float, torch.Tensor]:
    """Ranks 0 and 2, and 1 and 3, have nothing to do with each other."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[rank % 2]
    own = numbers(rank, shape=(1000,))
    model = Probe(1000)
    with RHTState(**RECORDED, process_group=group) as state:
        ddp = wrapped(model, state, process_group=group)
        ddp(own).backward()
    exact = (own + numbers((rank + 2) % 4, shape=(1000,))) / 2
    mean = gradients_of(model)
    return ((mean - exact).square().sum() / own.square().sum()).item(), mean


def test_subgroup_of_ddp(ranks: Ranks) -> None:
    errors, means = zip(*ranks.run(train_in_subgroup, 4), strict=True)
    assert max(errors) < GRADIENT_TOLERANCE
    assert torch.equal(means[0], means[2])
    assert torch.equal(means[1], means[3])
    assert not torch.equal(means[0], means[1])


def train_two_models(rank: int, world_size: int) -> list[tuple[Any, torch.Tensor]]:
    """In turns, the second one twice as often."""
    torch.manual_seed(0)
    models = [plain_model(), Mixed()]
    recorders = [Recorder(), Recorder()]
    states = [RHTState(**RECORDED), RHTState(**RECORDED)]
    ddps = [
        wrapped(model, state, recorder.hook, bucket_cap_mb=0.001)
        for model, state, recorder in zip(models, states, recorders, strict=True)
    ]
    for step, turn in enumerate([0, 1, 1, 0, 1, 1]):
        task_loss(ddps[turn], numbers(rank, step, shape=(16, 32))).backward()
        descend(models[turn])
    for state in states:
        state.close()
    return [(r.plain(), parameters_of(m)) for r, m in zip(recorders, models, strict=True)]


def test_two_models_with_a_state_each(ranks: Ranks) -> None:
    results = ranks.run(train_two_models, 2)
    for model, steps in [(0, 2), (1, 4)]:
        assert len(check_records([result[model][0] for result in results])) == steps
        assert all_equal([result[model][1] for result in results])
