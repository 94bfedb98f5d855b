"""Saved states: what they hold, and what is refused."""

import gc
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from models import LAZY, backward, net, wrapped
from problems import numbers
from states import GAVE_UP, TIMEOUT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm.hooks import RHTState, rht_hook


def test_state_dict_is_plain() -> None:
    state = RHTState(seed=7)
    assert state.state_dict() == {"seed": 7, "step": 0, "rotations": [], "buckets": []}
    state.load_state_dict({"seed": 8, "step": 3})
    assert state.state_dict() == {"seed": 8, "step": 3, "rotations": [], "buckets": []}


def test_what_is_no_saved_state_is_refused_and_what_a_state_is_can_be_read() -> None:
    state = RHTState(bits=3, seed=5)
    with pytest.raises(ValueError, match=r"has \['model'\]; pass what state_dict"):
        state.load_state_dict({"model": {}})
    assert "QuicFL(bits=3" in repr(state)
    assert "seed=5, step=0" in repr(state)


@pytest.mark.parametrize(
    ("junk", "message"),
    [
        (None, "is None"),
        ([1, 2], r"is \[1, 2\]"),
        ({"seed": 0, "step": 1, "residuals": {}, "rotations": 3}, "rotations must hold"),
        ({"seed": 0, "step": 1, "residuals": {}, "rotations": [[1, 2]]}, "rotations must hold"),
        ({"seed": 0, "step": 1, "residuals": {}, "rotations": [["a", 1, 2]]}, "rotations must"),
        ({"seed": 0, "step": 1, "residuals": [1]}, "residuals must be a dictionary"),
        *(
            (
                {"seed": 0, "step": 1, "rank": 0, "world_size": 1, "residuals": {"0.bias": value}},
                "residuals must be dense tensors of finite real numbers",
            )
            for value in (
                [0.0] * 64,
                torch.zeros(64).to_sparse(),
                torch.zeros(64, dtype=torch.complex64),
                torch.full((64,), torch.nan),
            )
        ),
    ],
    ids=str,
)
def test_junk_is_no_saved_state(junk: Any, message: str) -> None:
    with RHTState(rotations="auto", error_feedback=True) as state:
        before = state.state_dict(net())
        with pytest.raises(ValueError, match=message):
            state.load_state_dict(junk, net())
        assert state.state_dict(net()) == before


# ---- Residuals --------------------------------------------------------------------------------


class Odd(nn.Module):
    """A convolution whose weights may lie channels last, and a complex matrix."""

    def __init__(self, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(4, 8, 3).to(memory_format=memory_format)  # type: ignore[call-overload]
        self.matrix = nn.Parameter(torch.randn(8, 16, dtype=torch.complex64))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.convolution(x).mean(dim=(2, 3))
        result: torch.Tensor = self.head((pooled.to(torch.complex64) @ self.matrix).abs())
        return result


def odd_state(model: nn.Module) -> tuple[RHTState, DistributedDataParallel]:
    state = RHTState(
        2, quantizer="eden", error_feedback=True, block=256, min_numel=0, timeout=TIMEOUT
    )
    return state, wrapped(model, state)


def train_odd(ddp: nn.Module, rank: int) -> None:
    for step in range(2):
        ddp.zero_grad()
        ddp(numbers(rank, step, shape=(5, 4, 8, 8))).square().mean().backward()


def move_residuals(rank: int, world_size: int) -> list[str]:
    last, first = torch.channels_last, torch.contiguous_format
    state, ddp = odd_state(Odd(last))
    train_odd(ddp, rank)
    saved = state.state_dict(ddp)
    assert (saved["rank"], saved["world_size"]) == (rank, world_size)
    shapes = {name: tuple(value.shape) for name, value in saved["residuals"].items()}
    assert shapes["convolution.weight"] == (8, 4, 3, 3)
    assert shapes["matrix"] == (8, 16, 2)
    # What is saved is by index, whatever the memory is: as the other format's, loaded and saved.
    other, other_ddp = odd_state(Odd(first))
    other.load_state_dict(saved, other_ddp)
    for name, value in other.state_dict(other_ddp)["residuals"].items():
        assert torch.equal(value, saved["residuals"][name]), name
    # And by what the residual means: the flat one of the step is in the bucket's order.
    weight = ddp.module.convolution.weight
    (flat,) = state.residuals.pieces([weight], torch.zeros(1))
    by_hand = flat.view(8, 3, 3, 4).permute(0, 3, 1, 2)
    assert torch.equal(by_hand, saved["residuals"]["convolution.weight"])
    # Buckets do not follow a parameter that changes its memory format.
    moved, moved_ddp = odd_state(Odd(first))
    train_odd(moved_ddp, rank)
    kept = moved.state_dict(moved_ddp)["residuals"]["convolution.weight"]
    kept = kept.clone()
    moved_ddp.module.to(memory_format=last)
    flat = moved.residuals._of[moved_ddp.module.convolution.weight].flat
    flat.copy_(2 * kept.flatten())  # as a step would
    after_move = moved.state_dict(moved_ddp)["residuals"]["convolution.weight"]
    assert torch.equal(after_move, 2 * kept)
    moved.close()
    # Names are those of the model without its wrappers.
    compiled = torch.compile(ddp, backend="eager")
    for wrapper in (ddp.module, ddp, compiled, torch.compile(ddp.module, backend="eager")):
        assert state.state_dict(wrapper)["residuals"].keys() == saved["residuals"].keys()
        state.load_state_dict(saved, wrapper)  # type: ignore[arg-type]

    refused = []
    cases: list[tuple[dict[str, Any], nn.Module]] = [
        ({**saved, "rank": 1 - rank}, ddp),
        ({**saved, "world_size": 3}, ddp),
        ({name: value for name, value in saved.items() if name != "rank"}, ddp),
        (saved, net()),
        ({**saved, "residuals": {"matrix": torch.ones(256)}}, ddp),
    ]
    before = state.state_dict(ddp)
    for content, model in cases:
        with pytest.raises(ValueError, match="load_state_dict") as caught:
            state.load_state_dict({**content, "step": 9}, model)
        refused.append(str(caught.value))
        after = state.state_dict(ddp)
        assert after["step"] == before["step"], "half of it was taken"
        assert all(torch.equal(v, after["residuals"][k]) for k, v in before["residuals"].items())
    # To begin without residuals, as after a change of the number of ranks, is always possible.
    state.load_state_dict({**saved, "world_size": 3, "residuals": {}}, ddp)
    assert not len(state.residuals)

    # Residuals of parameters that are gone go too.
    train_odd(ddp, rank)
    model = ddp.module
    del ddp, compiled, wrapper, cases, weight
    state.close()
    model.head = nn.Linear(16, 4)
    gc.collect()
    assert set(state.state_dict(model)["residuals"]) == {
        "convolution.weight",
        "convolution.bias",
        "matrix",
    }
    with pytest.warns(UserWarning, match="never called"):
        other.close()
    return refused


def test_a_saved_state_says_what_it_is_of(ranks: Ranks) -> None:
    rank, size, absent, model, shape = ranks.run(move_residuals, 2)[0]
    assert "these are from rank 1 of 2, but this is rank 0 of 2" in rank
    assert "these are from rank 0 of 3, but this is rank 0 of 2" in size
    assert "these are from rank None of 2" in absent
    assert "but the model has none" in model
    assert "with shape (256,), but the model has it with shape (8, 16, 2)" in shape


def change_the_memory_format(
    rank: int, world_size: int, when: int, views: bool, lazy: bool, apart: bool = False
) -> list[float]:
    """Before a step, by step: |results + mean residual - exact means| / |exact means|, of sums."""
    torch.manual_seed(0)
    model = nn.Conv2d(8, 24, 3)
    weight, bias = model.weight, model.bias
    assert bias is not None
    state = RHTState(2, error_feedback=True, block=256, min_numel=0, timeout=TIMEOUT)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=views, **LAZY if lazy else {})
    ddp.register_comm_hook(state, rht_hook)
    model.forward = lambda x: (weight * x).sum() + bias.sum()  # type: ignore[method-assign]
    if apart:  # DDP begins with the weight
        saved = {"seed": 0, "step": 0, "residuals": {}, "buckets": [["bias", "weight"]]}
        state.load_state_dict(saved, model)
    errors = []
    results, exact = (torch.zeros(weight.shape, dtype=torch.float64) for _ in range(2))
    for step in range(4):
        if step == when:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ddp.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            ddp(numbers(rank, step, shape=tuple(weight.shape))).backward()
        results += weight.grad
        exact += sum(numbers(r, step, shape=tuple(weight.shape)) for r in range(2)) / 2
        left = state.state_dict(ddp)["residuals"]["weight"].double()
        dist.all_reduce(left)
        errors.append(float((results + left / 2 - exact).norm() / exact.norm()))
    state.close()
    return errors


@pytest.mark.parametrize(
    ("when", "views", "apart"),
    [(0, True, False), (0, True, True), (1, False, False), (1, True, True)],
)
def test_residuals_follow_the_layout_of_the_bucket(
    when: int, views: bool, apart: bool, ranks: Ranks
) -> None:
    """DDP makes its buckets again in the second step, by how the parameters lie by then."""
    for errors in ranks.run(change_the_memory_format, 2, when, views, False, apart):
        assert max(errors) < 1e-5


@pytest.mark.skipif(not LAZY, reason="this torch keeps its buckets")
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_residuals_follow_the_layout_of_new_buckets(when: int, views: bool, ranks: Ranks) -> None:
    """They are made in each step, by how the parameters lie by then."""
    for errors in ranks.run(change_the_memory_format, 2, when, views, True):
        assert max(errors) < 1e-5


def load_before_the_ranks_are_known(rank: int, world_size: int) -> str:
    """A state that was loaded before torch.distributed began is checked at its first bucket."""
    state = RHTState(4, quantizer="eden", error_feedback=True, min_numel=0, timeout=TIMEOUT)
    model = net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        residuals = {"0.weight": torch.ones(64, 32)}
        state.load_state_dict(
            {"seed": 0, "step": 1, "rank": 0, "world_size": 2, "residuals": residuals}, model
        )
    with pytest.raises((ValueError, RuntimeError)) as caught:
        backward(wrapped(model, state), rank)
    return str(caught.value)


def test_another_ranks_state_is_found_out_at_the_first_bucket(ranks: Ranks) -> None:
    first, second = ranks.run(load_before_the_ranks_are_known, 2)
    assert GAVE_UP in first
    assert "these are from rank 0 of 2, but this is rank 1 of 2" in second
