"""What is compressed and what is not: warm-up, excluded parameters, bits by bucket."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from harness import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import HierarchicalCommunicator
from rhtcomm.hooks import RHTState, register, rht_hook

WIDTH = 64
SMALL: dict[str, Any] = {"min_numel": 0, "block": 256}
OPTIONS: dict[str, Any] = {"warmup_steps": 0, **SMALL}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(x).relu()))


def backward(model: nn.Module, rank: int, step: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1000 * rank + step))
    model(x).square().mean().backward()
    return {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def mean_of(world_size: int, step: int) -> dict[str, torch.Tensor]:
    own = [backward(Net(), rank, step) for rank in range(world_size)]
    return {name: torch.stack([g[name] for g in own]).mean(dim=0) for name in own[0]}


def errors(found: dict[str, torch.Tensor], world_size: int, step: int) -> dict[str, float]:
    exact = mean_of(world_size, step)
    return {name: ((found[name] - x).norm() / x.norm()).item() for name, x in exact.items()}


EXACT, ROUGH = 1e-6, 0.1  # relative errors: of float32 sums, and of gradients at 1 bit at least


def warm_up(
    rank: int, world_size: int, steps: int, begin: int, options: dict[str, Any]
) -> tuple[list[float], list[int]]:
    """For each step, the error of the worst parameter, and the bytes sent."""
    model = DistributedDataParallel(Net())
    with register(model, **options, **SMALL) as handle:
        handle.load_state_dict(handle.state_dict() | {"step": begin})
        worst, sent = [], [0]
        for step in range(steps):
            worst.append(max(errors(backward(model, rank, step), world_size, step).values()))
            sent.append(handle.stats().bytes_sent)
    return worst, [after - before for before, after in pairwise(sent)]


def test_the_first_steps_may_be_exact(ranks: Ranks) -> None:
    options = {"bits": 1, "warmup_steps": 2, "warmup_bits": 32}
    for worst, sent in ranks.run(warm_up, 3, 4, 0, options):
        assert max(worst[:2]) < EXACT
        assert min(worst[2:]) > ROUGH
        assert sent[3] < sent[1] == sent[0]


def test_by_default_64_steps_have_8_bits(ranks: Ranks) -> None:
    for worst, sent in ranks.run(warm_up, 2, 66, 0, {"bits": 1}):
        assert EXACT < max(worst[:64]) < 0.03  # where a parameter is quieter than its block
        assert min(worst[64:]) > ROUGH
        numel = sum(parameter.numel() for parameter in Net().parameters())
        # Codes, a byte per coordinate or an eighth of it; and the same scales and headers.
        assert set(sent[:64]) == {sent[0]}
        assert set(sent[64:]) == {sent[64]}
        assert sent[0] - sent[64] == pytest.approx(numel * 7 / 8, rel=0.05)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"bits": 1, "quantizer": "ecdq"}, 6),
        ({"bits": 1, "quantizer": "vector"}, 4),
        ({"bits": 2, "quantizer": "lattice"}, 8),
        ({"bits": 1, "quantizer": "eden", "error_feedback": True}, 8),
        ({"bits": 5}, 8),
        ({"bits": lambda _: 3}, 8),
        ({"bits": 1, "warmup_bits": 3}, 3),
        ({"bits": 4, "warmup_bits": 3}, 4),
        ({"bits": 2, "exclude": ["norm.*"]}, 8),
    ],
)
def test_bits_of_the_warm_up(options: dict[str, Any], most: int) -> None:
    model = Net()
    with RHTState(warmup_steps=2, **options, **SMALL) as state:
        state.policy.learn(model.named_parameters())
        parameters = list(model.parameters())
        bits = options["bits"] if not callable(options["bits"]) else 3
        for step, expected in ((0, most), (1, most), (2, bits), (1, most)):
            treatment = state.policy.treatment(step, parameters)
            codec = treatment.codec if treatment else state.codec
            assert bits_of(codec) == expected
            assert bits_of(state.codec) == (4 if callable(options["bits"]) else bits)


def bits_of(codec: Any) -> float:
    return getattr(codec, "quantizer", codec).bits


def test_a_resumed_run_ends_the_warm_up_where_the_first_would_have(ranks: Ranks) -> None:
    options = {"bits": 1, "warmup_steps": 5}
    for worst, _ in ranks.run(warm_up, 2, 4, 3, options):
        assert max(worst[:2]) < 0.03
        assert min(worst[2:]) > ROUGH


def leave_out(rank: int, world_size: int, how: str, options: dict[str, Any]) -> dict[str, float]:
    excludes: dict[str, Any] = {
        "names": ["norm.*", "*.bias"],
        "predicate": lambda parameter: parameter.dim() == 1,
    }
    if options.get("communicator"):
        options = options | {"communicator": HierarchicalCommunicator.from_mesh(mesh())}
    model = DistributedDataParallel(Net())
    with register(model, bits=1, exclude=excludes[how], **OPTIONS, **options) as handle:
        worst: dict[str, float] = {}
        for step in range(3):  # buckets change after the first
            found = backward(model, rank, step)
            for name, error in errors(found, world_size, step).items():
                worst[name] = max(error, worst.get(name, 0.0))
            total = torch.cat([g.flatten() for g in found.values()])
            others = [torch.empty_like(total) for _ in range(world_size)]
            torch.distributed.all_gather(others, total)
            assert all(torch.equal(total, other) for other in others)
        assert handle.stats().compression_ratio > 2
    return worst


def mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2))


@pytest.mark.parametrize("how", ["names", "predicate"])
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, {}),
        (3, {"algorithm": "two_shot"}),
        (2, {"quantizer": "lattice"}),
        (2, {"quantizer": "eden", "error_feedback": True}),
        (4, {"communicator": True}),
    ],
    ids=["all_gather", "two_shot", "lattice", "error feedback", "two levels"],
)
def test_excluded_parameters_travel_exactly_within_their_bucket(
    how: str, world_size: int, options: dict[str, Any], ranks: Ranks
) -> None:
    for worst in ranks.run(leave_out, world_size, how, options):
        for name, error in worst.items():
            if name.startswith("norm") or name.endswith("bias"):
                assert error < EXACT, name
            else:
                assert error > ROUGH, name


def bits_by_bucket(rank: int, world_size: int) -> tuple[dict[str, float], list[int]]:
    seen: list[int] = []

    def bits(parameters: Sequence[torch.Tensor]) -> int:
        seen.append(len(parameters))
        return 8 if any(p.shape == (8, WIDTH) for p in parameters) else 1

    # In buckets of their own from the second step on.
    model = DistributedDataParallel(Net(), bucket_cap_mb=0.001)
    with register(model, bits=bits, **OPTIONS):
        for step in range(3):
            found = errors(backward(model, rank, step), world_size, step)
    return found, seen


def test_bits_may_depend_on_the_bucket(ranks: Ranks) -> None:
    for found, seen in ranks.run(bits_by_bucket, 2):
        assert found["head.weight"] < 0.02
        assert found["embedding.weight"] > ROUGH
        assert seen[0] == 6, "DDP begins with one bucket"
        assert sum(seen[1:]) == 6, "it is asked once for each bucket"


def fail_to_train(model: nn.Module, rank: int, **options: Any) -> None:
    with register(model, **(OPTIONS | options)):
        backward(model, rank, 0)


def differ(rank: int, world_size: int, what: str) -> str:
    options: dict[str, tuple[Any, Any]] = {
        "warmup_steps": (1, 2),
        "warmup_bits": (8, 32),
        "exclude": (["*.bias"], ["norm.*"]),
        "bits": (lambda _: 3, lambda _: 4),
        "predicate": (lambda p: p.dim() == 1, lambda p: p.dim() == 2),
        "all or nothing": (lambda _: False, lambda _: True),
    }
    name = "exclude" if what in ("predicate", "all or nothing") else what
    model = DistributedDataParallel(Net())
    given = {name: options[what][rank == 1]}
    if what == "warmup_bits":
        given["warmup_steps"] = 3
    with pytest.raises(Exception, match="configured differently") as caught:
        fail_to_train(model, rank, **given)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("warmup_steps", "warmup_steps (1 on ranks 0, 2; 2 on rank 1)"),
        ("warmup_bits", "warmup_bits (8 on ranks 0, 2; 32 on rank 1)"),
        ("exclude", "exclude (['*.bias'] on ranks 0, 2; ['norm.*'] on rank 1)"),
        ("bits", "codec of bucket 0 (Codec(quantizer=QuicFL(bits=3"),
        ("predicate", "exact segments of bucket 0 (["),
        ("all or nothing", "codec of bucket 0 (Codec(quantizer=QuicFL(bits=4"),
    ],
)
def test_ranks_compare_policies(what: str, named: str, ranks: Ranks) -> None:
    for message in ranks.run(differ, 3, what):
        assert named in message


def by_register_comm_hook(rank: int, world_size: int) -> None:
    """The state finds its model, and with it the names; a copy of it does so too."""
    for copied in (False, True):
        model = DistributedDataParallel(Net())
        state = RHTState(1, exclude=["norm.*"], warmup_steps=1, warmup_bits=32, **SMALL)
        with copy.deepcopy(state) if copied else state as used:
            model.register_comm_hook(used, rht_hook)
            backward(model, rank, 0)
            found = errors(backward(model, rank, 1), world_size, 1)
            assert found["norm.weight"] < EXACT
            assert found["head.weight"] > ROUGH
        state.bypass(model)


def test_names_are_found_without_register_too(ranks: Ranks) -> None:
    ranks.run(by_register_comm_hook, 2)


def misspell(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError, match="exclude has") as caught:
        register(DistributedDataParallel(Net()), exclude=["norms.*"])
    return str(caught.value)


def test_a_name_that_no_parameter_has_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(misspell, 2):
        assert "exclude has 'norms.*', but no parameter of the model matches" in message
        assert "embedding.weight" in message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"warmup_steps": -1}, ValueError, "warmup_steps=-1 must not be negative"),
        ({"warmup_steps": 0.5}, TypeError, "warmup_steps=0.5 must be an integer"),
        (
            {"warmup_bits": 9},
            ValueError,
            "warmup_bits=9 must be bits that the quantizer supports, or 32",
        ),
        ({"warmup_bits": "8"}, ValueError, "warmup_bits='8' must be bits"),
        ({"quantizer": "ecdq", "warmup_bits": 8}, ValueError, "warmup_bits=8 must be bits"),
        ({"exclude": "*.bias"}, TypeError, "must be a list of parameter names"),
        ({"exclude": [3]}, TypeError, "must be a list of parameter names"),
        ({"bits": 9}, ValueError, "bits=9"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RHTState(**arguments)


def ask_for_too_much(rank: int, world_size: int, bits: Callable[[Any], Any]) -> str:
    model = DistributedDataParallel(Net())
    with pytest.raises(Exception, match="bits") as caught:
        fail_to_train(model, rank, bits=bits)
    return str(caught.value)


def nine(_: Any) -> int:
    return 9


def thirty_two(_: Any) -> int:
    return 32


def half(_: Any) -> float:
    return 0.5


@pytest.mark.parametrize(
    ("bits", "message"), [(nine, "bits=9"), (thirty_two, "bits=32"), (half, "bits=0.5")]
)
def test_bits_out_of_range_are_refused(bits: Any, message: str, ranks: Ranks) -> None:
    for found in ranks.run(ask_for_too_much, 2, bits):
        assert message in found
