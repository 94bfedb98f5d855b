"""Resumed runs end with the bits of uninterrupted ones, though DDP begins with other buckets."""

import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from harness import Ranks
from models import EarlyBranches, all_equal, descend, mlp, parameters_of, task_loss, wrapped
from problems import numbers
from states import BLOCK, TIMEOUT, logged
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm.hooks import RHTState
from rhtcomm.hooks.layout import Layout

STEPS = 5
NO_BUCKETS: dict[str, Any] = {"buckets": []}


class Dtypes(nn.Module):
    """Parameters of three dtypes, which DDP's first buckets are of, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 8)
        self.middle = mlp(64, 64, 64).bfloat16()
        self.scale = nn.Parameter(torch.ones(64, dtype=torch.float64))
        self.first.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.first(x).tanh().bfloat16())
        result: torch.Tensor = self.last((hidden * self.scale).float().tanh())
        return result


def plain() -> nn.Module:
    return mlp(32, 64, 64, 48, 8)


def bits_by_size(parameters: Sequence[torch.Tensor]) -> int:
    return 2 if sum(map(torch.Tensor.numel, parameters)) > 3000 else 4


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)  # of DDP
    state: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = plain
    after: tuple[int, ...] = (2,)  # steps at which a checkpoint is taken
    rebuilt: bool = True  # whether DDP makes its buckets anew


CASES = {
    "plain": Case(after=(0, 1, 3)),
    "views": Case({"gradient_as_bucket_view": True}),
    "one bucket": Case({"bucket_cap_mb": 25}),
    "dtypes": Case(model=Dtypes, after=(1, 2)),
    "static graph": Case({"static_graph": True}, model=Dtypes, after=(2, 3)),
    "unused parameters": Case({"find_unused_parameters": True}, model=EarlyBranches, rebuilt=False),
    "error feedback": Case({}, {"quantizer": "eden", "error_feedback": True}, Dtypes),
    "equalized": Case({}, {"equalize": True, "error_feedback": True, "quantizer": "ecdq"}),
    "rotations": Case({}, {"rotations": "auto", "nmse_every": 2, "exact_fraction": 1 / 512}),
    "policy": Case({}, {"bits": bits_by_size, "exclude": ["*.bias"], "warmup_steps": 3}),
    "small buckets": Case({}, {"min_numel": 3000, "quantizer": "lattice", "bits": 4}, Dtypes),
}


# DDP then hands over no bucket without gradients, not even a step's last one.
SKIP = {"find_unused_parameters": True, "skip_all_reduce_unused_params": True}
if SKIP.keys() <= inspect.signature(DistributedDataParallel).parameters.keys():
    CASES["skipped buckets"] = Case(SKIP, model=EarlyBranches, after=(1, 2), rebuilt=False)


def train(model: nn.Module, ddp: nn.Module, rank: int, steps: range) -> None:
    for step in steps:
        x = numbers(rank, step, shape=(16, 32))
        x[0, 0] = step % 2  # the branch
        task_loss(ddp, x).backward()
        descend(model)


def begin(case: Case, **state_options: Any) -> tuple[nn.Module, Any, RHTState]:
    torch.manual_seed(0)
    model = case.model()
    given = {"bits": 2, "block": BLOCK, "min_numel": 0, "seed": 9, "warmup_steps": 0}
    state = RHTState(**{**given, **case.state, **state_options, "timeout": TIMEOUT})
    return model, wrapped(model, state, **{"bucket_cap_mb": 0.005, **case.options}), state


def saved(model: nn.Module, state: RHTState) -> io.BytesIO:
    by_name = state.error_feedback or state.scales is not None
    file = io.BytesIO()
    hook = state.state_dict(model) if by_name else state.state_dict()
    torch.save({"model": model.state_dict(), "hook": hook}, file)
    return file


def load(file: io.BytesIO, model: nn.Module, state: RHTState, **changes: Any) -> None:
    file.seek(0)
    content = torch.load(file)
    model.load_state_dict(content["model"])
    by_name = state.error_feedback or state.scales is not None
    state.load_state_dict(content["hook"] | changes, *([model] if by_name else []))


def resume(rank: int, world_size: int, name: str) -> dict[Any, torch.Tensor]:
    """The parameters at the end of a whole run, and of runs from its checkpoints."""
    case = CASES[name]
    model, ddp, state = begin(case)
    files = {0: saved(model, state)}
    for step in range(STEPS):
        train(model, ddp, rank, range(step, step + 1))
        files[step + 1] = saved(model, state)
    found: dict[Any, torch.Tensor] = {"whole": parameters_of(model)}
    state.close()
    for after, changes in [(after, {}) for after in case.after] + [(case.after[-1], NO_BUCKETS)]:
        model, ddp, state = begin(case)
        load(files[after], model, state, **changes)
        train(model, ddp, rank, range(after, STEPS))
        found["without" if changes else after] = parameters_of(model)
        assert changes or state.stats().steps == STEPS - after
        state.close()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_with_the_same_bits(name: str, ranks: Ranks) -> None:
    case = CASES[name]
    results = ranks.run(resume, 3 if name == "plain" else 2, name)
    for found in results:
        assert torch.equal(found["whole"], results[0]["whole"])
        for after in case.after:
            assert torch.equal(found[after], found["whole"]), after
        same = torch.equal(found["without"], found["whole"])
        assert same != case.rebuilt, "the buckets make no difference"


# ---- Checkpoints that do not fit --------------------------------------------------------------


def load_elsewhere(rank: int, world_size: int) -> dict[str, Any]:
    """What the log says and how training ends, where a checkpoint of `plain` is loaded."""
    model, ddp, state = begin(CASES["plain"])
    train(model, ddp, rank, range(3))
    file = saved(model, state)
    state.close()
    found: dict[str, Any] = {}
    for name, case in {
        "as it was": CASES["plain"],
        "larger buckets": Case({"bucket_cap_mb": 0.02}),
        "smaller buckets": Case({"bucket_cap_mb": 0.001}),
        "buckets of the first step": Case({"find_unused_parameters": True}),
        "another model": Case(model=lambda: mlp(32, 64, 32, 48, 8)),
        "fewer parameters": Case(model=lambda: mlp(32, 64, 48, 8)),
        "more parameters": Case(model=lambda: mlp(32, 64, 64, 64, 48, 8)),
    }.items():
        model, ddp, state = begin(case)
        file.seek(0)
        state.load_state_dict(torch.load(file)["hook"])
        with logged() as lines:
            train(model, ddp, rank, range(3, 6))
        found[name] = parameters_of(model), lines, state.key.step
        state.close()
    return found


def test_a_checkpoint_of_other_buckets_can_be_loaded(ranks: Ranks) -> None:
    """Then bits differ from those of a whole run, which the log says once."""
    results = ranks.run(load_elsewhere, 3)
    for name, (parameters, lines, step) in results[0].items():
        assert step == 6
        fits = name in ("as it was", "another model")
        assert [line[:41] for line in lines] == ["rht_hook: DDP's buckets cannot be split i"] * (
            not fits
        ), name
        assert all_equal([result[name][0] for result in results]), name
        assert parameters.isfinite().all()


def test_numbers_of_buckets() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    model, layout = nn.ParameterList(parameters), Layout()
    layout.learn(model, dict(model.named_parameters()))

    def step(*buckets: tuple[int, ...], by_index: bool = True) -> list[list[int]]:
        """The numbers under which each of DDP's buckets travels."""
        found = []
        for index, bucket in enumerate(buckets):
            last = index == len(buckets) - 1
            asked = (index, last) if by_index else (0, False)
            place = layout.place(*asked, [parameters[i] for i in bucket])
            assert place.last == last
            found.append([number for number, _ in place.parts] or [place.number])
        return found

    saved = [["2"], ["1", "3"], ["0"]]
    # What is given up within a step: no number comes twice in it.
    layout.load(saved)
    assert step((2, 0), (1, 3)) == [[0, 2], [1]]
    with logged() as lines:
        step((2, 0), (1,), (3,))
    assert len(lines) == 1
    layout.load(saved)
    assert step((2, 0), (1,), (3,)) == [[0, 2], [4], [5]]
    assert step((2, 0), (1,), (3,)) == [[0], [1], [2]]
    # As static_graph has it at first, then the saved ones, and then others.
    layout.load(saved)
    assert step((0, 2), (3, 1), by_index=False) == [[0, 2], [1]]
    assert step((2,), (1, 3), (0,)) == [[0], [1], [2]]
    with logged() as lines:
        step((0, 1, 2, 3))
    assert lines == []
    assert layout.buckets() == [["0", "1", "2", "3"]]


def load_on_one_rank(rank: int, world_size: int) -> str:
    model, ddp, state = begin(CASES["plain"])
    train(model, ddp, rank, range(2))
    hook = state.state_dict()
    state.close()
    model, ddp, state = begin(CASES["plain"])
    state.load_state_dict(hook | (NO_BUCKETS if rank else {}))
    with pytest.raises(RuntimeError) as caught:
        train(model, ddp, rank, range(2, 3))
    state.close()
    return str(caught.value)


def test_ranks_with_other_saved_buckets_say_so(ranks: Ranks) -> None:
    for message in ranks.run(load_on_one_rank, 2):
        assert "the ranks are configured differently in buckets of the checkpoint (" in message


# ---- Other ways to go on ----------------------------------------------------------------------


def go_back(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """To a checkpoint, in the same objects; with ranks that run out of data; with a handle."""
    model, ddp, state = begin(CASES["dtypes"])
    train(model, ddp, rank, range(2))
    file = saved(model, state)
    found = {}
    with ddp.join():
        train(model, ddp, rank, range(2, 4 + rank))
    found["whole"] = parameters_of(model)
    load(file, model, state)
    with ddp.join():
        train(model, ddp, rank, range(2, 4 + rank))
    found["in the same objects"] = parameters_of(model)
    state.close()
    model, ddp, state = begin(CASES["dtypes"])
    load(file, model, state)
    with ddp.join():
        train(model, ddp, rank, range(2, 4 + rank))
    found["in new ones"] = parameters_of(model)
    state.close()
    return found


def test_one_can_go_back_and_ranks_may_run_out_of_data(ranks: Ranks) -> None:
    for found in ranks.run(go_back, 2):
        for name, parameters in found.items():
            assert torch.equal(parameters, found["whole"]), name
