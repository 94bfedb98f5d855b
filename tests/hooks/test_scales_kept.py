"""What equalize keeps: scales by parameter, through trainings, checkpoints and copies."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equalized import SHAPES, backward, flat, gradients, learn, state_of
from harness import Ranks
from models import Probe, mlp, parameters_of, train, wrapped
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rhtcomm
from lib.problems import PROBLEMS
from rhtcomm.hooks import RHTState
from rhtcomm.hooks.scales import RANGE

# ---- Training ---------------------------------------------------------------------------------


def descend(rank: int, world_size: int, options: dict[str, Any] | None) -> float:
    """What is left of the regression's loss under AdamW."""
    problem = PROBLEMS["regression"]
    torch.manual_seed(0)
    ddp = DistributedDataParallel(problem.make_model(), bucket_cap_mb=100)
    if options is not None:
        rhtcomm.hooks.register(ddp, min_numel=0, warmup_steps=0, **options)
    rule = problem.optimizers["AdamW"](ddp.module)
    schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1 - step / 100)
    for step in range(100):
        inputs, targets = problem.draw((0, step, rank))
        rule.zero_grad()
        problem.loss(ddp(inputs), targets).backward()
        rule.step()
        schedule.step()
    return problem.score(ddp.module)


def test_a_regression_under_adam_loses_less(ranks: Ranks) -> None:
    best, plain, equal = (
        ranks.run(descend, 2, options)[0] for options in (None, {}, {"equalize": True})
    )
    assert plain - best > 0.1 * best
    assert equal - best < (plain - best) / 3, (best, plain, equal)


# ---- Checkpoints and copies -------------------------------------------------------------------


def resume(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Four steps at once; and two, a checkpoint, and two more in new objects."""

    def start() -> tuple[nn.Module, Any, RHTState]:
        torch.manual_seed(0)
        model, state = mlp(32, 64, 64, 8), state_of(bits=2)
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
        ddp.register_comm_hook(state, rhtcomm.hooks.rht_hook)
        return model, ddp, state

    model, ddp, state = start()
    train(model, ddp, rank, range(2))
    saved = pickle.dumps({"model": model.state_dict(), "hook": state.state_dict(ddp)})
    copied, twin = pickle.loads(pickle.dumps([model, state]))
    assert copied is not model
    assert twin.scales.digest() == state.scales.digest()  # type: ignore[union-attr]
    train(model, ddp, rank, range(2, 4))
    found = {"whole": parameters_of(model)}
    state.close()
    for kept in ("resumed", "forgotten"):
        model, ddp, state = start()
        checkpoint = pickle.loads(saved)
        model.load_state_dict(checkpoint["model"])
        if kept == "forgotten":
            del checkpoint["hook"]["scales"]
        state.load_state_dict(checkpoint["hook"], model)
        train(model, ddp, rank, range(2, 4))
        found[kept] = parameters_of(model)
        state.close()
    return found


def test_a_resumed_run_ends_with_the_same_bits(ranks: Ranks) -> None:
    results = ranks.run(resume, 2)
    for result in results:
        assert torch.equal(result["resumed"], result["whole"])
        assert torch.equal(result["whole"], results[0]["whole"])
        assert torch.equal(result["forgotten"], results[0]["forgotten"])
        assert not torch.equal(result["forgotten"], result["whole"])


def disagree(rank: int, world_size: int, late: bool) -> str:
    with state_of() as state:
        ddp = wrapped(Probe(*SHAPES), state)
        for step in range(2 * late):
            backward(ddp, gradients(rank, step))
        saved = state.state_dict(ddp)
        if rank:
            saved["scales"]["weights.0"] += 256
        state.load_state_dict(saved, ddp)
        try:
            backward(ddp, gradients(rank, 2))
        except RuntimeError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("late", [False, True])
def test_ranks_with_other_scales_find_out(late: bool, ranks: Ranks) -> None:
    for message in ranks.run(disagree, 2, late):
        assert "configured differently in scales (" in message


def test_a_state_has_log2_of_the_largest_gradients() -> None:
    state = state_of()
    part = torch.tensor([[1.0, -4.0, 0.0], [0.5, 0.25, 0.0]])
    model = learn(state, part, torch.tensor([3.0, 1.0]))
    saved = state.state_dict(model)["scales"]
    expected = [129, 129, 126, 127, 129, 0]
    assert saved["weights.0"].tolist() == [256 * number for number in expected]
    assert saved["weights.1"].tolist() == [256 * 128 + 128]  # log2 3 is 1.58
    for step in range(1, 60):
        assert state.scales is not None
        state.scales.learn(list(model.parameters()), flat([2 * part, torch.zeros(2)]))
        saved = state.state_dict(model)["scales"]
        assert saved["weights.1"].tolist() == [256 * 128 + 128]
        share = saved["weights.0"][0].item() / 256 - 129
        assert abs(share - (1 - 0.875**step)) < 0.04  # it stops 7 / 256 below


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_sums_of_logarithms_within_a_range(dtype: torch.dtype) -> None:
    rows, columns = torch.tensor([0, -1, -3]), torch.tensor([0, -2, -9, -1])
    exponents = [rows[:, None] + columns, torch.tensor([-2] * 5), torch.tensor([3] * 2)]
    parts = [(2.0**exponent).to(dtype) for exponent in exponents]
    state = state_of()
    model = learn(state, *parts)
    found, given = torch.ones(19, dtype=dtype), torch.ones(19)
    assert state.scales is not None
    with state.scales.applied([*model.parameters()], [found, given], [False, False, True]):
        # The largest that is compressed is 1.
        expected = [-RANGE - exponent.clamp(min=-RANGE) for exponent in exponents[:2]]
        assert torch.equal(found, 2.0 ** flat([*expected, torch.zeros(2)]).to(dtype))
        assert torch.equal(given, found.float())
    assert torch.equal(found, torch.ones(19, dtype=dtype))
    with state.scales.applied([*model.parameters()], [found], None):
        assert found.tolist()[-1] == 2.0**-RANGE
        assert found.tolist()[0] == 2.0 ** (3 - RANGE)


def test_checkpoints_that_do_not_fit() -> None:
    state = state_of(quantizer="eden", error_feedback=True)
    model = learn(state, torch.ones(6, 5), torch.ones(7))
    good = state.state_dict(model) | {"rank": 0, "world_size": 1}
    assert {name: value.numel() for name, value in good["scales"].items()} == {
        "weights.0": 12,
        "weights.1": 1,
    }
    good["residuals"] = {"weights.1": torch.ones(7)}
    wrong: list[Any] = [
        {"weights.0": torch.ones(11, dtype=torch.int32)},
        {"weights.2": torch.ones(1, dtype=torch.int32)},
        {"weights.1": torch.tensor([65280])},
        {"weights.1": torch.tensor([-1])},
        {"weights.1": torch.ones(1)},
        {"weights.1": 1},
    ]
    before = state.scales.digest()  # type: ignore[union-attr]
    for scales in wrong:
        with pytest.raises(ValueError, match="scales must be integers from 0 to 65279"):
            state.load_state_dict(good | {"scales": scales}, model)
        assert len(state.residuals) == 0
        assert state.scales.digest() == before  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="scales must be a dictionary"):
        state.load_state_dict(good | {"scales": 3}, model)
    with pytest.raises(ValueError, match=r"call state_dict\(model\)"):
        state_of().state_dict()
    state.load_state_dict(good, model)
    assert state.scales.digest() == before  # type: ignore[union-attr]
    del good["scales"]
    state.load_state_dict(good, model)
    assert state.scales.digest() == state_of().scales.digest()  # type: ignore[union-attr]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_the_scales_of_copied_parameters(
    duplicate: Callable[[Any], Any],
) -> None:
    state = state_of()
    model = learn(state, torch.ones(6, 5))
    other, twin = duplicate([model, state])
    assert twin.state_dict(other)["scales"]["weights.0"].any()
    twin.scales.learn(list(other.parameters()), 3 * torch.ones(30))
    assert state.scales.digest() != twin.scales.digest()  # type: ignore[union-attr]


def test_scales_of_parameters_that_are_gone_go_with_them() -> None:
    state = state_of()
    model = learn(state, torch.ones(6, 5))
    assert len(state.scales.by_parameter()) == 1  # type: ignore[union-attr]
    del model
    gc.collect()
    assert not state.scales.by_parameter()  # type: ignore[union-attr]


def save_before_the_first_step(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    models = [DistributedDataParallel(mlp(32, 64, 8)) for _ in range(2)]
    handles = [rhtcomm.hooks.register(ddp, warmup_steps=0, equalize=True) for ddp in models]
    saved = handles[0].state_dict()
    handles[1].load_state_dict(saved)
    for handle in handles:
        handle.close()
    scales: dict[str, torch.Tensor] = saved["scales"]
    return scales


def test_a_handle_saves_all_names_at_once(ranks: Ranks) -> None:
    """torch.distributed.checkpoint reads into what is there."""
    saved = ranks.run(save_before_the_first_step, 1)[0]
    sizes = {"0.weight": 1 + 64 + 32, "0.bias": 1, "2.weight": 1 + 8 + 64, "2.bias": 1}
    assert {name: value.numel() for name, value in saved.items()} == sizes
    assert not any(value.any() for value in saved.values())
