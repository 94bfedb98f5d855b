"""rhtcomm.hooks.compress_fsdp: keys, checkpoints, how it ends and how it fails."""

import gc
from pathlib import Path
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
    gradients,
    loss,
    net,
    same,
    sharded,
)
from states import GAVE_UP, SAVERS, SOON, TIMEOUT
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from rhtcomm import DisagreementError, Key
from rhtcomm.hooks import compress_fsdp
from rhtcomm.hooks.inline import InlineEngine

# ---- Keys -------------------------------------------------------------------------------------


def record_keys(patch: pytest.MonkeyPatch) -> list[Key]:
    keys: list[Key] = []
    run = InlineEngine.run
    patch.setattr(InlineEngine, "run", lambda self, b: keys.append(b.key) or run(self, b))
    return keys


class Reentrant(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.children():
            x = checkpoint(layer, x, use_reentrant=True)
        return x


class Chunked(nn.Module):
    """Its head is called for chunks of what the rest of the unit returns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm = nn.Linear(WIDTHS[0], 60), nn.LayerNorm(60)
        self.head = nn.Linear(60, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x))


def reduce_chunks(rank: int, world_size: int) -> None:
    """torch reduces the unit of the head for each of them."""
    with pytest.MonkeyPatch.context() as patch:
        keys, own = record_keys(patch), []
        for compressed in (False, True):
            model = Chunked()
            mesh = init_device_mesh("cpu", (world_size,))
            fully_shard([model.norm, model.head], mesh=mesh)
            model = fully_shard(model, mesh=mesh)
            if compressed:
                handle = compress_fsdp(model, **FINE)
            y = model(numbers(rank, shape=(8, WIDTHS[0])))
            sum(model.head(part).square().sum() for part in y.chunk(4)).backward()
            own.append(gradients(model))
        handle.close()
    assert [key.bucket for key in keys].count(1) > 1
    assert len({*keys}) == len(keys)
    assert max(errors(own[1], {name: x.double() for name, x in own[0].items()})) < CLOSE


def test_a_unit_may_be_reduced_several_times_in_one_pass(ranks: Ranks) -> None:
    ranks.run(reduce_chunks, 2)


def backward_by_stages(model: Any, rank: int, step: int) -> None:
    """As torch's pipelines do, which have the gradients reduced when the pass is over."""
    model.set_is_last_backward(False)
    model.set_reshard_after_backward(False)
    model.set_requires_gradient_sync(False)
    loss(model, rank, step).backward()
    model.set_is_last_backward(True)
    model.set_reshard_after_backward(True)
    model.set_requires_gradient_sync(True)
    state = model._get_fsdp_state()
    for one in state._state_ctx.all_states:
        if one._fsdp_param_group is not None:
            one._fsdp_param_group.post_backward()
    state._root_post_backward_final_callback()


def use(rank: int, world_size: int, how: str) -> list[tuple[int, int]]:
    """Step and unit of each reduction."""
    with pytest.MonkeyPatch.context() as patch:
        keys = record_keys(patch)
        model: Any = net()
        if how == "checkpointed layers":
            model[2] = checkpoint_wrapper(model[2])
        if how == "reentrant":  # which begins backward passes in the backward pass
            model = Reentrant(model)
        if how == "grouped":
            mesh = init_device_mesh("cpu", (world_size,))
            fully_shard([model[0], model[2]], mesh=mesh)
            fully_shard([model[3], model[4]], mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            model = sharded(model)
        with compress_fsdp(model, **FINE) as handle:
            for step in range(2):
                if how == "twice":
                    loss(model, rank, step).backward()
                    loss(model, rank, step + 7).backward()
                elif how == "in stages":
                    backward_by_stages(model, rank, step)
                    handle.load_state_dict(handle.state_dict())
                elif how == "two losses":
                    y = model(numbers(rank, step, shape=(8, WIDTHS[0])))
                    y.square().mean().backward(retain_graph=True)
                    y.sum().backward()
                elif how == "two passes in one":
                    (loss(model, rank, step) + loss(model, rank, step + 7)).backward()
                elif how == "reentrant":
                    x = numbers(rank, step, shape=(8, WIDTHS[0])).requires_grad_()
                    model(x).square().mean().backward()
                else:
                    loss(model, rank, step).backward()
            assert handle.stats().steps == handle.state.key.step
    assert len({*keys}) == len(keys)
    return [(key.step, key.bucket) for key in keys]


@pytest.mark.parametrize(
    ("how", "steps"),
    [
        ("once", 2),
        ("twice", 4),
        ("in stages", 2),
        ("two losses", 4),
        ("two passes in one", None),
        ("checkpointed layers", 2),
        ("reentrant", None),
        ("grouped", 2),
    ],
)
def test_keys_never_repeat(how: str, steps: int | None, ranks: Ranks) -> None:
    first, second = ranks.run(use, 2, how)
    assert first == second
    assert first, "nothing was reduced"
    if steps is not None:
        assert [step for step, _ in first] == sorted(step for step, _ in first)
        assert {step for step, _ in first} == {*range(steps)}


# ---- Checkpoints ------------------------------------------------------------------------------


def steps_of(model: nn.Module, rank: int, steps: range) -> list[dict[str, torch.Tensor]]:
    """Gradients; every other step is two microbatches, and the last layer is not in each."""
    found = []
    for step in steps:
        model.zero_grad()
        if step % 2:
            loss(model, rank, step + 100).backward()
        loss(model, rank, step).backward()
        found.append(gradients(model))
    return found


def resume(rank: int, world_size: int, saver: str, options: dict[str, Any], folder: str) -> None:
    options = FINE | {"bits": 2} | options
    model = sharded(net())
    with compress_fsdp(model, **options) as handle:
        steps_of(model, rank, range(3))
        load = SAVERS[saver](handle, folder)
        expected = steps_of(model, rank, range(3, 5))
    again = sharded(net())
    with compress_fsdp(again, **options) as resumed:
        load(resumed)
        assert resumed.state.key == Key(0, 4)
        for one, other in zip(steps_of(again, rank, range(3, 5)), expected, strict=True):
            assert same(one, other)
    fresh = sharded(net())
    with compress_fsdp(fresh, **options):
        assert not same(steps_of(fresh, rank, range(3, 4))[0], expected[0]), "nothing was loaded"


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"rotations": "auto"}, {"quantizer": "eden"}, {"quantizer": "ecdq", "bits": 2.5}],
    ids=lambda options: " ".join(map(str, options.values())) or "plain",
)
def test_a_resumed_run_goes_on_with_the_same_bits(
    saver: str, options: dict[str, Any], tmp_path: Path, ranks: Ranks
) -> None:
    ranks.run(resume, 3, saver, options, str(tmp_path / "checkpoint"))


def disagree_on_the_checkpoint(rank: int, world_size: int) -> str:
    model = sharded(net())
    with compress_fsdp(model, **FINE) as handle:
        handle.load_state_dict({"seed": 0, "step": 5 + rank})
        with pytest.raises(DisagreementError) as caught:
            backward(model, rank, 0)
    return str(caught.value)


def test_ranks_that_took_different_checkpoints_find_out(ranks: Ranks) -> None:
    for message in ranks.run(disagree_on_the_checkpoint, 2):
        assert "step (5 on rank 0; 6 on rank 1)" in message


# ---- The end ----------------------------------------------------------------------------------


def remove(rank: int, world_size: int) -> None:
    model, plain = sharded(net()), sharded(net())
    handle = compress_fsdp(model, bits=1, min_numel=0, timeout=TIMEOUT, warmup_steps=0)
    assert not same(backward(model, rank, 0), backward(plain, rank, 0))
    handle.remove()
    assert same(backward(model, rank, 1), backward(plain, rank, 1))
    assert handle.stats().steps == 1
    with compress_fsdp(model, **FINE):
        assert not same(backward(model, rank, 2), backward(plain, rank, 2))


def test_after_remove_gradients_are_those_of_torch(ranks: Ranks) -> None:
    ranks.run(remove, 2)


def never_called(rank: int, world_size: int) -> None:
    model = sharded(net())
    handle = compress_fsdp(model, **FINE)
    with pytest.warns(UserWarning, match="the hook was never called"):
        handle.close()
    with pytest.raises(RuntimeError, match="its handle was closed; call compress_fsdp again"):
        backward(model, rank, 0)


def test_a_hook_that_was_never_called_warns(ranks: Ranks) -> None:
    ranks.run(never_called, 2)


def forget(rank: int, world_size: int) -> bool:
    """Whether the hook ends with its model."""
    model = sharded(net())
    handle = compress_fsdp(model, **FINE)
    backward(model, rank, 0)
    (engine,) = handle.state.engines  # type: ignore[attr-defined]
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="its model is gone"):
        handle.state_dict()
    del handle
    gc.collect()
    return bool(engine.ended)


def test_it_ends_with_the_model(ranks: Ranks) -> None:
    assert ranks.run(forget, 2) == [True] * 2


# ---- Failures ---------------------------------------------------------------------------------


def fail_on_one(rank: int, world_size: int) -> str:
    """In the second step, in a function of the user's."""
    calls = []

    def excluded(parameter: torch.Tensor) -> bool:
        calls.append(parameter)
        if rank == 1 and len(calls) > 2:
            raise ValueError("no idea")
        return False

    model = sharded(net())
    with compress_fsdp(model, **(FINE | {"timeout": SOON, "exclude": excluded})):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            backward(model, rank, 0)
        dist.barrier()  # nobody leaves, by which the others would hear of it too
        if hasattr(model, "reset_iter_state"):  # from torch 2.13 on
            model.reset_iter_state()
            with pytest.raises(RuntimeError, match="an earlier bucket failed"):
                backward(model, rank, 1)
    return str(caught.value)


def test_an_error_of_one_rank_ends_the_others(ranks: Ranks) -> None:
    first, second = ranks.run(fail_on_one, 2, timeout=30)
    assert first.startswith("rhtcomm.hooks.compress_fsdp: rank 0 of 2 could not exchange bucket 1")
    assert GAVE_UP in first
    assert second == "no idea"


class Half(nn.Module):
    """Of whose two parameters one takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(300)) for _ in range(2))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.second * gradient).sum()


def leave_out_a_parameter(rank: int, world_size: int, options: dict[str, Any]) -> None:
    model = fully_shard(Half(), mesh=init_device_mesh("cpu", (world_size,)))
    own = [numbers(other, shape=(300,)) for other in range(world_size)]
    exact = {"second": torch.stack(own).double().mean(0)}
    with compress_fsdp(model, **(FINE | options)):
        if options:
            with pytest.raises(RuntimeError, match=r"call model\.set_reduce_scatter_unused_params"):
                model(own[rank]).backward()
            return
        model(own[rank]).backward()
        assert max(errors(gradients(model), exact)) < CLOSE


def leave_out_a_parameter_openly(rank: int, world_size: int) -> None:
    model = fully_shard(Half(), mesh=init_device_mesh("cpu", (world_size,)))
    model.set_reduce_scatter_unused_params(True)
    own = [numbers(other, shape=(300,)) for other in range(world_size)]
    with compress_fsdp(model, exclude=["first"], **FINE):
        model(own[rank]).backward()
    found = gradients(model)
    assert not found["first"].any()
    assert max(errors({"": found["second"]}, {"": torch.stack(own).double().mean(0)})) < CLOSE


def test_parameters_without_a_gradient(ranks: Ranks) -> None:
    ranks.run(leave_out_a_parameter, 2, {})
    ranks.run(leave_out_a_parameter, 2, {"exclude": ["first"]})
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        ranks.run(leave_out_a_parameter_openly, 2)
