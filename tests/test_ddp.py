"""The DDP hook in real processes.

Most cases record each bucket as the hook gets it and gives it back, and compare that, bit for bit,
with Codec on what all ranks recorded; and the gradients with the mean of those of plain copies.
"""

import copy
import inspect
import io
import itertools
import logging
import math
import random
import re
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, limit, run_program
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import Codec, Key, QuicFL, TorchCommunicator, collectives
from rhtcomm.hooks import RHTState, rht_hook

BLOCK = 256
SEED = 3
TIMEOUT = timedelta(seconds=limit(50))  # in case of a failure, before the 60 s of the test

# Compresses every bucket, finely enough to compare gradients.
FINE: dict[str, Any] = {
    **{"bits": 8, "algorithm": "all_gather", "block": BLOCK, "min_numel": 0, "seed": SEED},
    "timeout": TIMEOUT,
}
FINE_CODEC = Codec(QuicFL(8), block=BLOCK)


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
    """Every bucket holds what FINE_CODEC makes of all ranks' buckets; returns buckets by step."""
    world_size = len(by_rank)
    buckets: list[int] = []
    for records in zip(*by_rank, strict=True):
        ((step, index),) = {(step, index) for step, index, *_ in records}
        buckets[step:] = [index + 1]
        key = Key(SEED, step, index)
        payloads = [
            FINE_CODEC.encode(sent, key, rank, world_size)
            for rank, (_, _, sent, *_) in enumerate(records)
        ]
        numel, dtype = records[0][2].numel(), records[0][2].dtype
        expected = FINE_CODEC.decode_mean(torch.stack(payloads), key, numel).to(dtype)
        # What no rank used is zero.
        parts = [sent.split(segments) for _, _, sent, _, segments in records]
        for part, *of_ranks in zip(expected.split(records[0][4]), *parts, strict=True):
            if not any(own.any() for own in of_ranks):
                part.zero_()
        for rank, (_, _, _, received, _) in enumerate(records):
            assert torch.equal(received, expected), f"step {step}, bucket {index}, rank {rank}"
    return buckets


# ---- Models and data --------------------------------------------------------------------------


def mlp(*widths: int, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


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


class EarlyBranches(nn.Module):
    """The same with what all inputs take at the end, so that DDP's last buckets are a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([mlp(32, 48, 64), mlp(32, 32, 64)])
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.branches[int(x[0, 0] > 0)](x).tanh())
        return result


class Probe(nn.Module):
    """Parameters whose gradients are the tensors that it is called with."""

    def __init__(self, *numels: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(numel, dtype=dtype) for numel in numels])

    def forward(self, *gradients: torch.Tensor) -> torch.Tensor:
        terms = [(w * g).sum() for w, g in zip(self.weights, gradients, strict=True)]
        return torch.stack(terms).sum()


def numbers(*place: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers that depend on the place, such as (rank, step), alone."""
    seed = 0
    for part in place:
        seed = 1000 * seed + part + 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def task_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Learn a fixed linear map of (batch, 32) to (batch, 8)."""
    target = x @ numbers(0, shape=(32, 8)) / 6
    difference: torch.Tensor = model(x) - target
    return difference.square().mean()


def parameters_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def gradients_of(model: nn.Module) -> torch.Tensor:
    """All gradients, zero where there is none."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.float().flatten() for g in gradients])


def descend(model: nn.Module, rate: float = 0.05) -> None:
    """A step of gradient descent."""
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=rate)
                p.grad = None


def wrapped(model: nn.Module, state: Any, hook: Any = rht_hook, **options: Any) -> Any:
    ddp = DistributedDataParallel(model, **options)
    ddp.register_comm_hook(state, hook)
    return ddp


def all_equal(tensors: list[torch.Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors)


# ---- Training ---------------------------------------------------------------------------------


def late(function: Callable[..., Any], seconds: Callable[[], float]) -> Callable[..., Any]:
    def called_late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds())
        return function(*args, **kwargs)

    return called_late


def train_with_jitter(
    rank: int, world_size: int, algorithm: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """50 steps without the hook, and 50 with it and with ranks that are late at random."""
    delays = random.Random(rank)

    def wait(milliseconds: float) -> None:
        time.sleep(delays.random() * milliseconds / 1000)

    def mean_loss() -> float:
        batches = [(other, step) for other in range(world_size) for step in range(10)]
        with torch.no_grad():
            losses = [task_loss(model, numbers(*batch, shape=(16, 32))) for batch in batches]
        return torch.stack(losses).mean().item()

    def train(ddp: nn.Module, milliseconds: float) -> float:
        for step in range(50):
            wait(milliseconds)
            loss = task_loss(ddp, numbers(rank, step % 10, shape=(16, 32)))
            wait(milliseconds)
            loss.backward()
            descend(ddp, rate=0.5)
        return mean_loss()

    def late_hook(
        state: RHTState,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        wait(1)
        return rht_hook(state, bucket)

    def late(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def late_exchange(self: TorchCommunicator, x: torch.Tensor) -> Any:
            wait(1)
            return exchange(self, x)

        return late_exchange

    torch.manual_seed(0)
    model = mlp(32, 64, 32, 8, bias=False)  # of whole blocks, which takes half the time
    start = copy.deepcopy(model.state_dict())
    result: dict[str, Any] = {"before": mean_loss()}
    result["uncompressed"] = train(DistributedDataParallel(model), milliseconds=0)
    model.load_state_dict(start)
    with (
        pytest.MonkeyPatch.context() as patch,
        RHTState(
            4,
            algorithm=algorithm,
            block=BLOCK,
            min_numel=0,
            timeout=TIMEOUT,
            **options,
        ) as state,
    ):
        for exchange in ("start_all_gather", "start_all_to_all"):
            patch.setattr(TorchCommunicator, exchange, late(getattr(TorchCommunicator, exchange)))
        ddp = wrapped(model, state, late_hook, bucket_cap_mb=0.001)
        result["compressed"] = train(ddp, milliseconds=4)
        return result | {"parameters": parameters_of(model), "stats": state.stats()}


QUIC_FL, EDEN, VECTOR = ({"quantizer": name} for name in ("quic_fl", "eden", "vector"))
EXACT = {**QUIC_FL, "exact_fraction": 1 / 512}


@pytest.mark.parametrize(
    ("options", "algorithm", "world_size"),
    [
        *itertools.product((QUIC_FL, EDEN), ("all_gather", "two_shot"), (2, 3, 4)),
        (VECTOR, "all_gather", 2),
        (EXACT, "two_shot", 2),
    ],
)
def test_training_with_late_ranks(
    options: dict[str, Any], algorithm: str, world_size: int, ranks: Ranks
) -> None:
    results = ranks.run(train_with_jitter, world_size, algorithm, options)
    assert all_equal([result["parameters"] for result in results])
    assert bool(results[0]["parameters"].isfinite().all())
    for result in results:
        gain = result["before"] - result["uncompressed"]
        assert gain > 0.5 * result["before"], "the uncompressed run did not learn"
        assert result["compressed"] == pytest.approx(result["uncompressed"], abs=0.05 * gain)
        assert result["stats"].steps == 50
        assert result["stats"].compression_ratio > 3, "nothing was compressed"


# ---- What DDP can be told ---------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    model: Callable[[], nn.Module]
    options: dict[str, Any]
    first: int | None  # buckets in the first step
    last: int  # in the last step, at least
    alike: bool = False  # all ranks take the same branch


def plain_model() -> nn.Module:
    return mlp(32, 64, 64, 8)


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
    with RHTState(**FINE) as state:
        ddp = wrapped(model, state, recorder.hook, **feature.options)
        for step in range(4):
            x = numbers(rank, step, shape=(16, 32))
            x[0, 0] = (step if feature.alike else rank + step) % 2 if step < 3 else 0  # the branch
            recorder.step = step
            plain = copy.deepcopy(model)
            task_loss(plain, x).backward()
            task_loss(ddp, x).backward()
            errors.append(relative_error(gradients_of(model), gradients_of(plain)))
            descend(model)
        assert state.stats().steps == 4
    return recorder.plain(), parameters_of(model), errors


def relative_error(mean: torch.Tensor, own: torch.Tensor) -> float:
    """|mean - exact|^2 / (mean over ranks of |own|^2)"""
    exact, power = own / dist.get_world_size(), own.square().sum() / dist.get_world_size()
    dist.all_reduce(exact)
    dist.all_reduce(power)
    return ((mean - exact).square().sum() / power).item()


# The theory's error of the mean is 4.4e-5 / world_size, and bfloat16 adds up to 2^-18 = 4e-6. The
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
    with RHTState(**FINE) as state:
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
            errors.append(relative_error(gradients_of(model), gradients_of(plain)))
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
    with RHTState(**FINE) as state:
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
    with RHTState(**FINE, process_group=group) as state:
        ddp = wrapped(model, state, process_group=group)
        ddp(own).backward()
    exact = (own + numbers((rank + 2) % 4, shape=(1000,))) / 2
    mean = gradients_of(model)
    return ((mean - exact).square().sum() / own.square().sum()).item(), mean


def test_subgroup(ranks: Ranks) -> None:
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
    states = [RHTState(**FINE), RHTState(**FINE)]
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


# ---- Non-finite gradients ---------------------------------------------------------------------


def train_with_scaler(rank: int, world_size: int, algorithm: Any) -> dict[str, Any]:
    """Five steps under a gradient scaler; in the third, one element of one rank is infinite."""
    with RHTState(**FINE | {"algorithm": algorithm, "nmse_every": 1}) as state:
        model = Probe(3000, 500)
        ddp = wrapped(model, state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        parameters, scales = [parameters_of(model)], []
        for step in range(5):
            gradients = numbers(rank, step, shape=(3500,))
            if (rank, step) == (1, 2):
                gradients[1234] = torch.inf
            optimizer.zero_grad()
            scaler.scale(ddp(*gradients.split([3000, 500]))).backward()
            scaler.step(optimizer)
            scaler.update()
            parameters.append(parameters_of(model))
            scales.append(scaler.get_scale())
    return {"parameters": parameters, "scales": scales, "nmse": state.stats().nmse}


@pytest.mark.parametrize("algorithm", ["all_gather", "two_shot"])
def test_an_infinite_gradient_makes_all_ranks_skip_the_step(algorithm: str, ranks: Ranks) -> None:
    results = ranks.run(train_with_scaler, 3, algorithm)
    for result in results:
        assert result["scales"] == [1024, 1024, 512, 512, 512]
        moved = [not torch.equal(*pair) for pair in itertools.pairwise(result["parameters"])]
        assert moved == [True, True, False, True, True]
        assert bool(result["parameters"][-1].isfinite().all())
        assert 0 < result["nmse"] < 1e-3, "the step that was skipped spoils the mean error"
    assert all_equal([result["parameters"][-1] for result in results])


# ---- Errors -----------------------------------------------------------------------------------


def probe_backward(state: RHTState, *gradients: torch.Tensor, **options: Any) -> str | None:
    """One backward pass that hands these gradients to the hook; the error that came out of it."""
    model = Probe(*(g.numel() for g in gradients), dtype=gradients[0].dtype)
    ddp = wrapped(model, state, **options)
    try:
        ddp(*gradients).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def submit(state: RHTState, buffer: torch.Tensor, index: int = 0, last: bool = True) -> Any:
    """The future of a bucket that is handed over directly."""
    bucket = SimpleNamespace(
        buffer=lambda: buffer,
        index=lambda: index,
        is_last=lambda: last,
        parameters=lambda: [buffer],
    )
    return state.submit(bucket)


class Precise(nn.Module):
    """A float64 scale in a model of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 256)
        self.scale = nn.Parameter(torch.ones(256, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x) * self.scale
        return result


def train_in_two_precisions(
    rank: int, world_size: int, options: dict[str, Any]
) -> tuple[list[float], bool, list[str]]:
    """Errors of both gradients, whether the float64 one is exact to the bit, and the log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rhtcomm").addHandler(handler)
    torch.manual_seed(0)
    model = Precise()
    with RHTState(8, block=BLOCK, min_numel=0, timeout=TIMEOUT, **options) as state:
        ddp = wrapped(model, state)
        for step in range(3):
            plain = copy.deepcopy(model)
            x = numbers(rank, step, shape=(16, 64))
            for net in (plain, ddp):
                net.zero_grad()
                net(x).square().mean().backward()
        errors = [
            relative_error(mine.grad.float(), own.grad.float())
            for mine, own in zip(model.parameters(), plain.parameters(), strict=True)
        ]
        total = plain.scale.grad.clone()
        dist.all_reduce(total)
        exact = torch.equal(model.scale.grad, total / world_size)
        assert state.stats().nmse is None or state.stats().nmse < 1e-3
    logging.getLogger("rhtcomm").removeHandler(handler)
    return errors, exact, lines


@pytest.mark.parametrize(
    "options",
    [{}, {"quantizer": "eden", "error_feedback": True}, {"nmse_every": 1, "quantizer": "lattice"}],
    ids=["plain", "error feedback", "lattice"],
)
def test_float64_travels_exactly(options: dict[str, Any], ranks: Ranks) -> None:
    """And the log says so once."""
    for errors, exact, lines in ranks.run(train_in_two_precisions, 3, options):
        assert max(errors) < 1e-3
        assert exact
        assert len(lines) == 1
        assert "float64 travel as they are" in lines[0]


def reduce_integers(rank: int, world_size: int) -> str:
    with RHTState(timeout=TIMEOUT) as state, pytest.raises(TypeError) as caught:
        submit(state, torch.arange(10))
    return str(caught.value)


def test_integers_are_refused(ranks: Ranks) -> None:
    for message in ranks.run(reduce_integers, 2):
        assert "bucket 0 is torch.int64, and a mean of integers is no integer" in message


def fail_on_rank_1(rank: int, world_size: int) -> dict[str, Any]:
    """The second of three buckets fails on one rank."""
    encode, calls = Codec.encode, 0

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            raise ZeroDivisionError("made by the test")
        return encode(*args, **kwargs)

    state = RHTState(**FINE | {"timeout": timedelta(seconds=5)})
    gradients = [numbers(rank, i, shape=(1000,)) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Codec, "encode", failing)
        # Parameters of 4000 bytes, a bucket each; unused ones make DDP use the buckets at once.
        options = {"bucket_cap_mb": 0.003, "find_unused_parameters": True}
        error = probe_backward(state, *gradients, **options)
    calls_made = calls
    with pytest.raises(Exception, match="earlier bucket failed") as later:
        submit(state, gradients[0]).wait()
    again = probe_backward(state, gradients[0])
    state.close()
    with pytest.raises(RuntimeError, match="closed"):
        submit(state, gradients[0])
    # The default group is as usable as before.
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    return {
        **{"error": error, "later": str(later.value), "again": again},
        **{"calls": calls_made, "total": total.item()},
    }


# What Gloo says when another rank is silent or gone.
LOST_PEER = "Timed out|Connection (closed|reset) by peer|Broken pipe"


def test_an_error_on_one_rank_ends_all_of_them(ranks: Ranks) -> None:
    results = ranks.run(fail_on_rank_1, 3)
    for rank, result in enumerate(results):
        assert result["error"] is not None
        # Others may lose the bucket before too, of which not all had left the rank that gave up.
        fewest = 2 if rank == 1 else 1
        assert fewest <= result["calls"] <= 2, "buckets after the failure were worked on"
        assert result["total"] == 3
        assert "earlier bucket failed" in result["again"]
        if rank == 1:
            assert "ZeroDivisionError" in result["error"]
            assert "made by the test" in result["error"]
            assert "made by the test" in result["later"], "the first error is not named"
        else:
            # The first rank to give up closes its connections, which the next one may see earlier.
            for text in (result["error"], result["later"]):
                assert re.search(LOST_PEER, text)


CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bits": ({"bits": 4}, {"bits": 3}),
    "quantizer": ({"quantizer": "eden"}, {"quantizer": "quic_fl"}),
    "rotations": ({"rotations": 2}, {"rotations": 3}),
    "block": ({"block": 512}, {"block": 256}),
    "algorithm": ({"algorithm": "auto"}, {"algorithm": "two_shot"}),
    "seed": ({"seed": 1}, {"seed": 2}),
    "min_numel": ({"min_numel": 0}, {"min_numel": 1}),
    "nmse_every": ({"nmse_every": 0}, {"nmse_every": 1}),
}


def configure_differently(rank: int, world_size: int) -> dict[str, str | None]:
    """Rank 1 has the second configuration, the others the first."""
    errors = {}
    for name, configurations in CONFIGURATIONS.items():
        with RHTState(**configurations[rank == 1], timeout=TIMEOUT) as state:
            errors[name] = probe_backward(state, numbers(rank, shape=(1000,)))
    with RHTState(seed=5, timeout=TIMEOUT) as state:
        state.load_state_dict({"seed": 5, "step": 7 if rank == 1 else 8})
        errors["step"] = probe_backward(state, numbers(rank, shape=(1000,)))
    return errors


def test_ranks_with_different_arguments(ranks: Ranks) -> None:
    for errors in ranks.run(configure_differently, 3):
        for name, error in errors.items():
            assert error is not None, name
            assert "DisagreementError" in error
            assert f"configured differently in {name} (" in error
            assert "on ranks 0, 2; " in error
            assert "on rank 1" in error


def use_after_close(rank: int, world_size: int) -> None:
    gradient = numbers(rank, shape=(1000,))
    for uses in (0, 1):
        state = RHTState(**FINE)
        for _ in range(uses):
            assert probe_backward(state, gradient) is None
        steps = state.stats().steps
        state.close()
        state.close()
        error = probe_backward(state, gradient)
        assert error is not None
        assert "RHTState was closed; make a new one" in error
        assert state.stats().steps == steps == uses
    assert probe_backward(RHTState(**FINE), gradient) is None


def test_use_after_close(ranks: Ranks) -> None:
    ranks.run(use_after_close, 2)


def started(state: RHTState) -> Any:
    """The group that a state made for itself."""
    state._start(SimpleNamespace(buffer=lambda: torch.zeros(1), parameters=list))
    assert state._group is not None
    return state._group


def take_steps(state: RHTState, buffer: torch.Tensor) -> None:
    for _ in range(4):
        submit(state, buffer).wait()


def fail_on_one_rank(
    rank: int, world_size: int, algorithm: str, error: type[BaseException]
) -> list[str]:
    """Rank 1 fails at each of its calls of the codec in turn, and all ranks live on."""
    encode, messages = Codec.encode, []
    for call in range(1, 5):
        remaining = call

        def failing(*args: Any, **options: Any) -> torch.Tensor:
            nonlocal remaining
            remaining -= 1
            if rank == 1 and not remaining:
                raise error("made by the test")
            return encode(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "_FEWEST", 3 * BLOCK)
            patch.setattr(collectives, "_MOST", 3 * BLOCK)
            patch.setattr(Codec, "encode", failing)
            state = RHTState(**FINE | {"algorithm": algorithm})
            group = weakref.ref(started(state))
            with pytest.raises(RuntimeError) as caught:
                take_steps(state, numbers(rank, shape=(40 * BLOCK,)))
            state.close()
        messages.append(str(caught.value))
        # Even where the exception lives, nothing may keep the connections to the others open.
        assert group() is None
        dist.barrier()
    return messages


@pytest.mark.parametrize(
    ("algorithm", "error"),
    [
        *((algorithm, ZeroDivisionError) for algorithm in ("all_gather", "two_shot", "gather")),
        ("all_gather", SystemExit),  # which futures do not take
    ],
)
def test_a_rank_that_fails_wakes_the_others(
    algorithm: str, error: type[BaseException], ranks: Ranks
) -> None:
    of_ranks = ranks.run(fail_on_one_rank, 3, algorithm, error)
    for own in of_ranks[1]:
        assert "made by the test" in own
    for others in (of_ranks[0], of_ranks[2]):
        for message in others:
            assert "another rank died, or failed and gave up" in message


def leave_after_the_last_step(rank: int, world_size: int, how: str) -> None:
    """Rank 0 goes as soon as it has its mean; rank 1 asks for its own only later."""
    receive = TorchCommunicator._receive

    def late(*args: Any) -> Any:
        time.sleep(0.5 * rank)
        return receive(*args)

    buffer = numbers(rank, shape=(2_000_000,))
    shown = how == "last"
    with pytest.MonkeyPatch.context() as patch:
        state = RHTState(**FINE)
        if not shown:  # DDP leaves out the last buckets of steps, which the second one shows
            for index in (0, 1):
                submit(state, buffer.clone(), index, last=False).wait()
        submit(state, buffer.clone(), last=False).wait()
        patch.setattr(TorchCommunicator, "_receive", late)
        submit(state, buffer, index=1, last=shown).wait()
        state._running.close()  # as Python's exit does
    mean = sum(numbers(r, shape=(2_000_000,)) for r in range(world_size)) / world_size
    assert (buffer - mean).norm() < 0.01 * mean.norm()


@pytest.mark.parametrize("how", ["last", "left out"])
def test_a_rank_that_leaves_after_its_last_step_fails_nobody(how: str, ranks: Ranks) -> None:
    ranks.run(leave_after_the_last_step, 2, how)


def close_in_the_middle_of_a_step(rank: int, world_size: int, min_numel: int) -> str | None:
    """As where the backward pass of a rank raises between two buckets."""
    state = RHTState(**FINE | {"min_numel": min_numel})
    big, small = numbers(rank, shape=(3000,)), numbers(rank, shape=(1000,))
    submit(state, big, last=False).wait()
    dist.barrier()
    if rank == 1:
        state.close()
        return None
    with pytest.raises(RuntimeError) as caught:
        submit(state, small, index=1).wait()
    state.close()
    return str(caught.value)


@pytest.mark.parametrize("min_numel", [0, 2000])
def test_a_rank_that_closes_within_a_step_wakes_the_others(min_numel: int, ranks: Ranks) -> None:
    """The next bucket being compressed or not."""
    first, _, third = ranks.run(close_in_the_middle_of_a_step, 3, min_numel, timeout=30)
    for message in (first, third):
        assert "another rank died, or failed and gave up" in message


def share_a_communicator(rank: int, world_size: int) -> None:
    """Two models by turns, whose workers are late to settle on one rank or the other."""
    communicator, delays = TorchCommunicator(), random.Random(rank)
    settle = TorchCommunicator.settle

    def late(self: TorchCommunicator, wait: bool = True) -> None:
        time.sleep(delays.choice([0, 0.02]))
        settle(self, wait)

    options = {name: value for name, value in FINE.items() if name != "timeout"}
    x = numbers(rank, shape=(2000,))
    mean = torch.stack([numbers(r, shape=(2000,)) for r in range(world_size)]).mean(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchCommunicator, "settle", late)
        states = [RHTState(**options, communicator=communicator) for _ in range(2)]
        for _ in range(10):
            for state in states:
                buffer = x.clone()
                submit(state, buffer).wait()
                assert (buffer - mean).norm() < 0.01 * mean.norm()
            communicator.all_gather(torch.zeros(3, dtype=torch.uint8))
        for state in states:
            state.close()


def test_states_may_share_a_communicator_between_steps(ranks: Ranks) -> None:
    ranks.run(share_a_communicator, 3, timeout=40)


def settle_on_a_rank_that_is_gone(rank: int, world_size: int) -> str | None:
    """What fails behind a result fails the next bucket."""
    state = RHTState(**FINE)
    x = numbers(rank, shape=(1000,))
    submit(state, x.clone(), last=False).wait()
    dist.barrier()  # both have it
    if rank == 0:
        assert isinstance(state._communicator, TorchCommunicator)
        state._communicator.abort()
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_mean", lambda *_: None)
        submit(state, x, index=1).wait()
        with pytest.raises(RuntimeError) as caught:
            submit(state, x).wait()
    state.close()
    return str(caught.value)


def test_a_failure_behind_a_result_fails_the_next_bucket(ranks: Ranks) -> None:
    _, message = ranks.run(settle_on_a_rank_that_is_gone, 2)
    assert "an earlier bucket failed: rht_hook: rank 1 of 2 could not exchange bucket 1" in message
    assert "another rank died, or failed and gave up" in message


def close_at_once(rank: int, world_size: int) -> list[torch.Tensor]:
    """Close with buckets under way, while the other rank has not even begun."""
    time.sleep(0.2 * rank)
    buffers = [numbers(rank, i, shape=(1000,)) for i in range(3)]
    state = RHTState(**FINE)
    futures = [submit(state, b, i, last=i == 2) for i, b in enumerate(buffers)]
    state.close()
    assert all(future.done() for future in futures)
    for future, buffer in zip(futures, buffers, strict=True):
        assert torch.equal(future.value(), buffer)
    return buffers


def test_close_finishes_what_is_under_way(ranks: Ranks) -> None:
    for i, (first, second) in enumerate(zip(*ranks.run(close_at_once, 2), strict=True)):
        assert torch.equal(first, second)
        exact = (numbers(0, i, shape=(1000,)) + numbers(1, i, shape=(1000,))) / 2
        assert ((first - exact).square().sum() / exact.square().sum()).item() < GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"quantizer": "foo"}, "quantizer='foo' must be one of quic_fl, eden"),
        ({"algorithm": "foo"}, "algorithm='foo' must be one of auto, all_gather, two_shot"),
        ({"block": 48}, "block=48 must be a power of two"),
        ({"block": 16}, "block=16 must be a power of two from 32"),
        ({"rotations": 0}, "rotations=0"),
        ({"rotations": 4}, "rotations=4"),
        ({"min_numel": -1}, "min_numel=-1"),
        ({"nmse_every": -1}, "nmse_every=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1 << 64}, "seed=18446744073709551616"),
        ({"communicator": object(), "timeout": TIMEOUT}, "leave out process_group and timeout"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RHTState(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": 5}, "timeout=5 must be a datetime.timedelta"),
        ({"communicator": "mpi"}, "communicator='mpi' must be an object"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        RHTState(**arguments)


def test_a_hook_without_a_state_says_how_to_register_it() -> None:
    with pytest.raises(TypeError, match=r"None, not an RHTState; register it with"):
        rht_hook(None, None)  # type: ignore[arg-type]


def test_without_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match="not initialized"):
        submit(RHTState(), torch.zeros(5))


# ---- Checkpoints ------------------------------------------------------------------------------


def train_and_resume(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Four steps at once; and two, a checkpoint, and two more in new objects."""

    def start() -> tuple[nn.Module, Any, RHTState]:
        torch.manual_seed(0)
        model = plain_model()
        state = RHTState(2, block=BLOCK, min_numel=0, seed=9, timeout=TIMEOUT)
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
        # Buckets are rebuilt after the first backward pass, and codes depend on them: without this
        # pass, the first step of a run would have buckets that a resumed run has at another step.
        task_loss(ddp, numbers(rank, 0, shape=(16, 32))).backward()
        for p in model.parameters():
            p.grad = None
        ddp.register_comm_hook(state, rht_hook)
        return model, ddp, state

    def train(model: nn.Module, ddp: Any, first: int, stop: int) -> None:
        for step in range(first, stop):
            task_loss(ddp, numbers(rank, step, shape=(16, 32))).backward()
            descend(model)

    model, ddp, state = start()
    file = io.BytesIO()
    train(model, ddp, 0, 2)
    torch.save({"model": model.state_dict(), "hook": state.state_dict()}, file)
    train(model, ddp, 2, 4)
    whole = parameters_of(model)
    state.close()

    resumed = {}
    for kept in ("both", "model"):
        file.seek(0)
        checkpoint = torch.load(file)
        model, ddp, state = start()
        model.load_state_dict(checkpoint["model"])
        if kept == "both":
            state.load_state_dict(checkpoint["hook"])
        train(model, ddp, 2, 4)
        resumed[kept] = parameters_of(model)
        state.close()
    return {"whole": whole, **resumed}


def test_a_resumed_run_ends_with_the_same_bits(ranks: Ranks) -> None:
    results = ranks.run(train_and_resume, 2)
    assert all_equal([result["whole"] for result in results])
    for result in results:
        assert torch.equal(result["both"], result["whole"])
        assert not torch.equal(result["model"], result["whole"]), "the state makes no difference"


def test_state_dict_is_plain() -> None:
    state = RHTState(seed=7)
    assert state.state_dict() == {"seed": 7, "step": 0, "rotations": []}
    state.load_state_dict({"seed": 8, "step": 3})
    assert state.state_dict() == {"seed": 8, "step": 3, "rotations": []}


# ---- Statistics -------------------------------------------------------------------------------


def count(rank: int, world_size: int, algorithm: Any, nmse_every: int) -> list[Any]:
    """Stats after each of four steps of a large bucket and a small one that is not compressed."""
    numels = (1 << 18, 100)
    options = {"algorithm": algorithm, "min_numel": 1000, "nmse_every": nmse_every}
    with RHTState(4, **options, timeout=TIMEOUT) as state:
        ddp = wrapped(Probe(*numels), state, bucket_cap_mb=0.0001, find_unused_parameters=True)
        stats = [state.stats()]
        for step in range(4):
            ddp(*(numbers(rank, step, i, shape=(n,)) for i, n in enumerate(numels))).backward()
            ddp.zero_grad()
            stats.append(state.stats())
        return stats


@pytest.mark.parametrize(("algorithm", "world_size"), [("all_gather", 2), ("two_shot", 4)])
@pytest.mark.parametrize("nmse_every", [0, 3])
def test_stats(algorithm: str, world_size: int, nmse_every: int, ranks: Ranks) -> None:
    ring = 2 * (world_size - 1) / world_size
    payload = Codec(QuicFL(4)).nbytes(1 << 18)
    hops = world_size - 1 if algorithm == "all_gather" else ring
    sent = hops * payload + ring * 4 * 100
    uncompressed = ring * 4 * ((1 << 18) + 100)
    for stats in ranks.run(count, world_size, algorithm, nmse_every):
        for step, now in enumerate(stats):
            assert now.steps == step
            assert now.bytes_sent == pytest.approx(step * sent, rel=1e-3)
            assert now.bytes_uncompressed == pytest.approx(step * uncompressed, rel=1e-3)
            assert now.bytes_saved == now.bytes_uncompressed - now.bytes_sent
            ratio = uncompressed / sent if step else 1.0
            assert now.compression_ratio == pytest.approx(ratio, rel=1e-2)
            for seconds in (now.encode_seconds, now.exchange_seconds, now.decode_seconds):
                assert (seconds > 0) == (step > 0)
            if not (nmse_every and step):
                assert now.nmse is None
        if nmse_every:
            # Independent gradients: |mean|^2 = |x|^2 / n, so the error of the mean is e.
            e = 0.011587
            expected = e if algorithm == "all_gather" else e + e * (1 + e)
            # Steps 0 and 3 are sampled. A coordinate's squared error has a kurtosis of 150.
            tolerance = 0.01 + 4 * math.sqrt(150 / (2 << 18))
            assert stats[4].nmse == pytest.approx(expected, rel=tolerance)
            assert stats[1].nmse == stats[2].nmse == stats[3].nmse != stats[4].nmse


def train_alone(rank: int, world_size: int) -> Any:
    with RHTState(**FINE) as state:
        gradient = numbers(rank, shape=(1000,))
        model = Probe(1000)
        ddp = wrapped(model, state)
        ddp(gradient).backward()
        assert torch.equal(gradients_of(model), gradient)
        return state.stats()


def test_one_rank_alone(ranks: Ranks) -> None:
    (stats,) = ranks.run(train_alone, 1)
    assert (stats.steps, stats.bytes_sent, stats.compression_ratio) == (1, 0, 1.0)


# ---- How processes end ------------------------------------------------------------------------

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from rhtcomm.hooks import RHTState, rht_hook
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(64, 64), bucket_cap_mb=0.001)
state = RHTState(block=256, min_numel=0)
model.register_comm_hook(state, rht_hook)
torch.manual_seed(rank)
for step in range(3):
    if step == 2 and {fails}:
        sys.exit("this rank fails")
    model(torch.randn(8, 64)).square().mean().backward()
{ending}
print("done")
"""

DESTROY, CLOSE = "dist.destroy_process_group()", "state.close()"


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        f"{CLOSE}; {DESTROY}",
        f"{DESTROY}; {CLOSE}",
        f"import gc; del model, state; gc.collect(); {DESTROY}",
    ],
)
def test_programs_end_cleanly(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHTCOMM_KERNELS", "reference")  # which says nothing about missing kernels
    for rank in run_program(PROGRAM.format(fails=False, ending=ending), world_size=2):
        assert (rank.returncode, printed(rank.stdout), rank.stderr) == (0, "done\n", "")


def printed(text: str) -> str:
    """Without what Gloo of torch 2.9 prints, the number of its connections."""
    return re.sub(r"\[Gloo\] Rank \d+ is connected to .*\n", "", text)


def test_a_state_that_was_closed_too_late_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHTCOMM_KERNELS", "reference")
    for rank in run_program(PROGRAM.format(fails=False, ending=DESTROY), world_size=2):
        assert (rank.returncode, printed(rank.stdout)) == (0, "done\n")
        assert "ResourceWarning: an RHTState was still open when torch.distr" in rank.stderr


def test_programs_end_when_one_rank_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHTCOMM_KERNELS", "reference")
    other, failed = run_program(PROGRAM.format(fails="rank == 1", ending=DESTROY), world_size=2)
    assert (failed.returncode, failed.stderr) == (1, "this rank fails\n")
    assert other.returncode == 1
    assert re.search(LOST_PEER, other.stderr)
