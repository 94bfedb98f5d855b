"""rhtcomm.hooks.compress_fsdp: gradients of models that `fully_shard` was called on, on real ranks.

References are plain models in float64.
"""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from problems import numbers
from sharded import (
    CLOSE,
    FINE,
    WIDTHS,
    backward,
    errors,
    exact_mean,
    gradients,
    layers,
    loss,
    net,
    probe,
    sharded,
    whole,
)
from states import TIMEOUT
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from rhtcomm.hooks import compress_fsdp
from rhtcomm.hooks.models import plain_name

ERROR = {2: 0.24583, 4: 0.011587}  # of QUIC-FL by bits, of one encoding: README's table


# ---- Errors and bytes -------------------------------------------------------------------------

NUMELS = (30011, 70007)  # neither divisible by the number of ranks, nor into whole blocks


def many_keys(rank: int, world_size: int, bits: int, n: int) -> tuple[float, float, float]:
    """Over all ranks: the squared error of one mean of gradients as a multiple of what theory says,
    that of the mean of n means times n, and the bytes sent as a multiple of the formula."""
    model = probe(*NUMELS)
    own = [
        [numbers(other, i, shape=(k,)) for i, k in enumerate(NUMELS)] for other in range(world_size)
    ]
    exact = [torch.stack(g).double().mean(0) for g in zip(*own, strict=True)]
    power = sum(g.double().square().sum().item() for g in itertools.chain(*own)) / world_size
    totals, once = [torch.zeros(k, dtype=torch.float64) for k in NUMELS], 0.0
    with compress_fsdp(model, bits, timeout=TIMEOUT, warmup_steps=0) as handle:
        for _ in range(n):
            model.zero_grad()
            model(*own[rank]).backward()
            for total, x, mean in zip(totals, gradients(model).values(), exact, strict=True):
                total += x
                once += (x - mean).square().sum().item() / n
        sent = handle.stats().bytes_sent / n
        codec = handle.state.codec
    left = sum((t / n - x).square().sum().item() for t, x in zip(totals, exact, strict=True))
    expected = ERROR[bits] / world_size * power
    formula = (world_size - 1) * codec.nbytes(sum(math.ceil(k / world_size) for k in NUMELS))
    return once / expected, n * left / expected, sent / formula


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("world_size", [2, 4])
def test_errors_are_those_of_one_hop_without_bias_and_bytes_too(
    world_size: int, bits: int, ranks: Ranks
) -> None:
    for once, left, sent in ranks.run(many_keys, world_size, bits, 200, timeout=200):
        assert once == pytest.approx(1, abs=0.03)
        assert left == pytest.approx(1, abs=0.1)
        assert sent == pytest.approx(1, abs=0.01)


# ---- What torch does to gradients -------------------------------------------------------------

FLOAT, BF16 = torch.float32, torch.bfloat16
POLICIES = {
    "as they are": {},
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16)},
    "bf16, reduced as float32": {"mp_policy": MixedPrecisionPolicy(BF16, FLOAT)},
    "reduced as bf16": {"mp_policy": MixedPrecisionPolicy(reduce_dtype=BF16)},
    "reduced as float16": {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float16)},
    "kept after forward": {"reshard_after_forward": False},
}


def train(rank: int, world_size: int, policy: str) -> float:
    model, worst = sharded(net(), **POLICIES[policy]), 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with compress_fsdp(model, **FINE) as handle:
        for step in range(3):
            found = backward(model, rank, step)
            worst = max(worst, *errors(found, exact_mean(model, list(range(world_size)), step)))
            optimizer.step()
        assert handle.stats().steps == 3
        assert handle.stats().rotations == {1: 0, 2: 9, 3: 0}, "something was not compressed"
    return worst


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_are_means(world_size: int, policy: str, ranks: Ranks) -> None:
    assert max(ranks.run(train, world_size, policy)) < CLOSE


def accumulate(rank: int, world_size: int) -> float:
    """Microbatches, of which only the last one's backward pass reduces."""
    model = sharded(net())
    everybody = list(range(world_size))
    with compress_fsdp(model, **FINE) as handle:
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            model.set_is_last_backward(micro == 2)
            loss(model, rank, micro).backward()
        exact = [exact_mean(model, everybody, micro) for micro in range(3)]
        assert handle.stats().steps == 1
        return max(errors(gradients(model), {k: sum(e[k] for e in exact) for k in exact[0]}))


def accumulate_means(rank: int, world_size: int) -> float:
    """Microbatches, of which each one's backward pass reduces; two of them before FSDP ends."""
    model = sharded(net())
    everybody = list(range(world_size))
    with compress_fsdp(model, **FINE) as handle:
        for micro in range(3):
            model.set_is_last_backward(micro == 2)
            loss(model, rank, micro).backward()
        exact = [exact_mean(model, everybody, micro) for micro in range(3)]
        assert handle.stats().steps == 3
        return max(errors(gradients(model), {k: sum(e[k] for e in exact) for k in exact[0]}))


@pytest.mark.parametrize("how", [accumulate, accumulate_means])
def test_gradients_accumulate(how: Any, ranks: Ranks) -> None:
    assert max(ranks.run(how, 2)) < CLOSE


def freeze(rank: int, world_size: int) -> None:
    """One layer, and of another one its bias; later the layer is trained again."""
    model = net()
    first, _, last = layers(model)
    first.requires_grad_(False)
    last.bias.requires_grad_(False)
    model = sharded(model)
    with compress_fsdp(model, exclude=["4.weight"], **FINE):
        for step in range(2):
            found, exact = backward(model, rank, step), exact_mean(model, [0, 1], step)
            assert found.keys() == {"2.weight", "2.bias", "4.weight"}
            assert max(errors(found, {name: exact[name] for name in found})) < CLOSE
            assert max(errors({"": found["4.weight"]}, {"": exact["4.weight"]})) < 1e-5
        first.requires_grad_(True)
        assert (
            max(errors({**backward(model, rank, 2)}, exact_of(model, 2, without="4.bias"))) < CLOSE
        )


def exact_of(model: nn.Module, step: int, without: str) -> dict[str, torch.Tensor]:
    exact = exact_mean(model, list(range(dist.get_world_size())), step)
    return {name: x for name, x in exact.items() if name != without}


def test_frozen_parameters_have_no_gradients(ranks: Ranks) -> None:
    ranks.run(freeze, 2)


def divide(rank: int, world_size: int, factor: float | None, only_sums: bool) -> float:
    model = sharded(net())
    for unit in [*layers(model), model]:
        if factor is not None:
            unit.set_gradient_divide_factor(factor)
        unit.set_force_sum_reduction_for_comms(only_sums)
    with compress_fsdp(model, **FINE):
        exact = exact_mean(model, list(range(world_size)), 0)
        scale = world_size / (factor or world_size)
        found = backward(model, rank, 0)
    return max(errors(found, {name: x * scale for name, x in exact.items()}))


@pytest.mark.parametrize("only_sums", [False, True])
@pytest.mark.parametrize("factor", [None, 1.0, 2.0, 5.0])
def test_divide_factors_are_heeded(factor: float | None, only_sums: bool, ranks: Ranks) -> None:
    """By torch these are a mean, a sum, and a sum of numbers that were divided before."""
    assert max(ranks.run(divide, 2, factor, only_sums)) < CLOSE


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(WIDTHS[0], 40), nn.Linear(30, 10)
        self.block = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 30))
        self.scale = nn.Parameter(torch.ones(30))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.block(self.first(x)) * self.scale)
        return y


def nest(rank: int, world_size: int) -> float:
    """A unit in a unit, two modules that are one, and what is left in the root."""
    model: Any = Nested()
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(model.block[0], mesh=mesh)
    fully_shard(model.block, mesh=mesh)
    fully_shard([model.first, model.last], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with compress_fsdp(model, exclude=["scale", "block.2.*"], **FINE) as handle:
        found = backward(model, rank, 0)
        assert handle.stats().rotations[2] == 2  # of four units, two travel exactly
    exact = exact_mean(model, list(range(world_size)), 0, Nested())
    assert {
        name for name in found if max(errors(*({name: x[name]} for x in (found, exact)))) < 1e-5
    } == {"scale", "block.2.weight", "block.2.bias"}
    return max(errors(found, exact))


def test_units_may_be_nested_and_put_together(ranks: Ranks) -> None:
    assert max(ranks.run(nest, 2)) < CLOSE


def shard_columns(rank: int, world_size: int) -> None:
    model = sharded(net(), shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
    with compress_fsdp(model, exclude=["2.weight"], nmse_every=1, **FINE) as handle:
        found, exact = backward(model, rank, 0), exact_mean(model, [0, 1], 0)
        assert max(errors(found, exact)) < CLOSE
        assert max(errors({"": found["2.weight"]}, {"": exact["2.weight"]})) < 1e-5
        assert handle.stats().nmse is not None
        assert 1e-7 < handle.stats().nmse < CLOSE**2
        # Of 10460 coordinates 5000 travel as 4 bytes, and the others as about 1.
        assert handle.stats().compression_ratio == pytest.approx(10460 * 4 / 25460, rel=0.05)


def test_columns_may_be_sharded_and_the_error_measured(ranks: Ranks) -> None:
    ranks.run(shard_columns, 2)


def wrap(rank: int, world_size: int) -> dict[str, float]:
    """Parameters have other names in wrappers, but not where they are excluded."""
    model: Any = net()
    model[2] = checkpoint_wrapper(model[2])
    compiled: Any = torch.compile(sharded(model), backend="eager")
    with compress_fsdp(compiled, exclude=["2.weight"], **FINE):
        found = {plain_name(k): g for k, g in backward(model, rank, 0).items()}
    exact = exact_mean(sharded(net()), [0, 1], 0)
    return {name: errors({"": found[name]}, {"": exact[name]})[0] for name in exact}


def test_models_may_be_in_wrappers(ranks: Ranks) -> None:
    for outcome in ranks.run(wrap, 2):
        assert max(outcome.values()) < CLOSE
        assert [name for name, error in outcome.items() if error < 1e-5] == ["2.weight"]


# ---- What travels exactly ---------------------------------------------------------------------


def travel(rank: int, world_size: int, options: dict[str, Any], dtype: torch.dtype) -> list[float]:
    """The relative errors of two parameters' gradients, in two steps."""
    own = [
        [numbers(other, i, shape=(k,)).to(dtype) for i, k in enumerate((301, 5000))]
        for other in range(world_size)
    ]
    model, found = probe(301, 5000, dtype=dtype), []
    exact = [torch.stack(g).double().mean(0) for g in zip(*own, strict=True)]
    with compress_fsdp(model, **(FINE | {"bits": 2} | options)):
        for _ in range(2):
            model.zero_grad()
            model(*own[rank]).backward()
            got = [whole(p.grad) for p in model.parameters()]
            assert all(g.dtype == dtype for g in got)
            found += errors(dict(enumerate(got)), dict(enumerate(exact)))
    return found


EXACT = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-15}
FAR = 0.1


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_to_be_compressed_travels_exactly(
    dtype: torch.dtype, world_size: int, ranks: Ranks
) -> None:
    cases: list[tuple[dict[str, Any], list[bool]]] = [
        ({"min_numel": 6000}, [True] * 4),
        ({"min_numel": 5000}, [False] * 4),
        ({"warmup_steps": 1, "warmup_bits": 32}, [True, True, False, False]),
        ({"exclude": ["*.0"]}, [True, False] * 2),
        ({"exclude": ["*.1"]}, [False, True] * 2),
        ({"exclude": ["weights.*"]}, [True] * 4),
    ]
    for options, exact in cases:
        for outcome in ranks.run(travel, world_size, options, dtype):
            for error, is_exact in zip(outcome, exact, strict=True):
                assert error < EXACT[dtype] if is_exact else error > FAR, (options, outcome)


def test_float64_travels_exactly(ranks: Ranks) -> None:
    for outcome in ranks.run(travel, 3, {}, torch.float64):
        assert max(outcome) < EXACT[torch.float64]


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(301, dtype=torch.complex64))
        self.others = nn.Parameter(torch.ones(200, dtype=torch.complex64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((self.weights * x).sum() + (self.others * y).sum()).real.clone()


def reduce_complex(rank: int, world_size: int) -> list[float]:
    own = [
        [torch.view_as_complex(numbers(r, i, shape=(n, 2))) for i, n in enumerate((301, 200))]
        for r in range(world_size)
    ]
    model = fully_shard(Waves(), mesh=init_device_mesh("cpu", (world_size,)))
    with compress_fsdp(model, exclude=["others"], **FINE):
        model(*own[rank]).backward()
    exact = [torch.stack(g).conj().mean(0) for g in zip(*own, strict=True)]
    return [
        ((whole(p.grad) - x).norm() / x.norm()).item()
        for p, x in zip(model.parameters(), exact, strict=True)
    ]


def test_complex_numbers_are_pairs(ranks: Ranks) -> None:
    for weights, others in ranks.run(reduce_complex, 2):
        assert 1e-4 < weights < CLOSE
        assert others < 1e-6


class Words(nn.Module):
    """An embedding, of whose symbols some are used by no rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(30, 64), nn.Linear(64, 4)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.embedding(symbols))
        return y


def read_words(rank: int, world_size: int) -> None:
    model = sharded(Words())
    with compress_fsdp(model, **(FINE | {"bits": 2})):
        model(torch.tensor([3 * rank, 3 * rank + 1])).square().sum().backward()
    rows = gradients(model)["embedding.weight"].abs().sum(1)
    used = {3 * other + i for other in range(world_size) for i in range(2)}
    assert {i for i, x in enumerate(rows.tolist()) if x} == used


def test_rows_that_no_rank_used_are_zeros(ranks: Ranks) -> None:
    ranks.run(read_words, 4)


def overflow(rank: int, world_size: int) -> tuple[bool, bool]:
    """Whether this rank's shard shows that another rank's gradient was not finite."""
    model = probe(256 * world_size, 256 * world_size)
    own = [numbers(rank, i, shape=(256 * world_size,)) for i in range(2)]
    if rank == 0:
        own[1][-5] = torch.inf  # in the last rank's shard
    with compress_fsdp(model, **FINE):
        model(*own).backward()
    first, second = (p.grad.to_local() for p in model.parameters())
    return bool(first.isfinite().all()), bool(second.isnan().all())


def test_what_is_not_finite_stays_visible(ranks: Ranks) -> None:
    assert ranks.run(overflow, 3) == [(True, False)] * 2 + [(True, True)]
