"""equalize: buckets are divided by powers of two that all ranks learn from the means."""

import copy
import gc
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from groups import two_levels
from harness import Ranks
from models import Probe, gradients_of, mlp, parameters_of, task_loss, train, wrapped
from problems import nmse, numbers
from simulation import same_bits
from states import BLOCK, TIMEOUT
from streams import in_place_of_cuda, no_look_at_numbers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rhtcomm
from lib.problems import PROBLEMS
from rhtcomm.hooks import RHTState
from rhtcomm.hooks.scales import RANGE

SHAPES = ((96, 66), (40,), (60, 64))
QUIET = 6  # sizes 1, 1/2, ..., 1/32


def state_of(**options: Any) -> RHTState:
    given = {"bits": 4, "block": BLOCK, "min_numel": 0, "warmup_steps": 0, "equalize": True}
    timeout = None if "communicator" in options else TIMEOUT
    return RHTState(**given | {"timeout": timeout} | options)


def sizes() -> list[torch.Tensor]:
    """Of gradients: by column in the first matrix, by row in the second one."""
    columns = 2.0 ** -(torch.arange(66) % QUIET).float()
    rows = 2.0 ** -(torch.arange(60) % QUIET).float()
    return [columns.expand(96, 66), torch.full((40,), 0.25), rows[:, None].expand(60, 64)]


def gradients(
    rank: int, step: int, dtype: torch.dtype = torch.float32, factor: float = 1.0
) -> list[torch.Tensor]:
    found = []
    for i, size in enumerate(sizes()):
        own = (rank + 1) * numbers(rank, step, i, shape=tuple(size.shape))
        found.append((factor * size * own).to(dtype))
    return found


def flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def exact_mean(world_size: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    each = [flat(gradients(rank, step, dtype)).float() for rank in range(world_size)]
    return torch.stack(each).mean(0)


def backward(ddp: nn.Module, parts: list[torch.Tensor]) -> torch.Tensor:
    """The mean of these gradients, flat."""
    ddp.zero_grad()
    ddp(*parts).backward()
    return gradients_of(ddp)


# ---- Means ------------------------------------------------------------------------------------

STEPS = 12


def follow(
    rank: int, world_size: int, dtype: torch.dtype, nodes: int, options: dict[str, Any]
) -> tuple[torch.Tensor, str]:
    """The means of all steps (STEPS, numel), and a digest of the scales."""
    if nodes:
        options = options | {"communicator": two_levels(rank, nodes, world_size // nodes)}
    with state_of(**options) as state:
        ddp = wrapped(Probe(*SHAPES, dtype=dtype), state, bucket_cap_mb=0.01)
        means = [backward(ddp, gradients(rank, step, dtype)) for step in range(STEPS)]
        return torch.stack(means), state.scales.digest() if state.scales else ""


def is_vector(parameter: torch.Tensor) -> bool:
    return parameter.dim() < 2


FEEDBACK = {"quantizer": "eden", "bits": 2, "error_feedback": True}
WAYS: list[tuple[int, int, torch.dtype, dict[str, Any]]] = [
    (2, 0, torch.float32, {}),
    (2, 0, torch.bfloat16, {}),
    (2, 0, torch.float32, {"quantizer": "ecdq", "bits": 2}),
    (3, 0, torch.float32, {"algorithm": "two_shot"}),
    (3, 0, torch.float32, {"algorithm": "gather", "rotations": "auto"}),
    (2, 0, torch.float32, {"quantizer": "lattice", "bits": 8}),
    (2, 0, torch.float32, {"exclude": is_vector}),
    (3, 0, torch.float32, FEEDBACK),
    (2, 0, torch.bfloat16, FEEDBACK),
    (4, 2, torch.float32, {}),
]


def error_of_quiet(means: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the quietest coordinates, relative, over the steps in which scales are known."""
    quiet = flat(sizes()) == 2.0 ** (1 - QUIET)
    return nmse(means[2:, quiet], exact[2:, quiet])


@pytest.mark.parametrize(("world_size", "nodes", "dtype", "options"), WAYS)
def test_replicas_have_the_same_bits_and_quiet_coordinates_less_error(
    world_size: int, nodes: int, dtype: torch.dtype, options: dict[str, Any], ranks: Ranks
) -> None:
    exact = torch.stack([exact_mean(world_size, step, dtype) for step in range(STEPS)])
    if options is FEEDBACK:  # what is not sent comes later
        exact = exact.cumsum(0)
    errors = []
    for equalize in (True, False):
        each = ranks.run(follow, world_size, dtype, nodes, options | {"equalize": equalize})
        means, digest = each[0]
        for other, its in each[1:]:
            assert same_bits(other, means)
            assert its == digest
        if options is FEEDBACK:
            means = means.cumsum(0)
        errors.append(error_of_quiet(means, exact))
        if "exclude" in options:
            vector = slice(96 * 66, 96 * 66 + 40)
            torch.testing.assert_close(means[:, vector], exact[:, vector], rtol=1e-6, atol=0)
    equal, plain = errors
    assert equal < plain / (10 if options is FEEDBACK else 20), (equal, plain)


def test_the_error_of_each_column_falls_as_predicted(ranks: Ranks) -> None:
    """A block's noise has the size of what is in it, for all coordinates alike: of columns of size
    s_k, 1/6 sum s_k^2 before; afterwards, where all are of size 1, s_k^2."""
    found = {}
    for equalize in (True, False):
        means = ranks.run(follow, 2, torch.float32, 0, {"equalize": equalize})[0][0][4:]
        exact = torch.stack([exact_mean(2, step) for step in range(4, STEPS)])
        error = (means - exact)[:, : 96 * 66].square().view(-1, 96, 66).mean(dim=(0, 1))
        found[equalize] = error.view(-1, QUIET).mean(0)
    squares = 4.0 ** -torch.arange(QUIET)
    ratio = found[True] / found[False] / (squares / squares.mean())
    # The size of a column is measured by its largest number, of a row as well, and rounded.
    assert ratio.min() > 1 / 4, ratio
    assert ratio.max() < 4, ratio


def average(rank: int, world_size: int, count: int) -> tuple[float, float]:
    """The error of the mean over `count` steps of one gradient, and the mean error of a step."""
    own = gradients(rank, 0)
    with state_of(bits=2) as state:
        ddp = wrapped(Probe(*SHAPES), state)
        for _ in range(8):
            backward(ddp, own)
        means = torch.stack([backward(ddp, own) for _ in range(count)]).double()
    # In units of each coordinate's size, so that a bias of small ones shows.
    size = flat(sizes()).double()
    exact, means = exact_mean(world_size, 0).double() / size, means / size
    return nmse(means.mean(0), exact), nmse(means, exact.expand_as(means))


def test_it_stays_unbiased(ranks: Ranks) -> None:
    count = 256
    often, once = ranks.run(average, 2, count)[0]
    assert 0.8 < count * often / once < 1.25, (once, often)


def compare_first(rank: int, world_size: int) -> list[bool]:
    found = [
        follow(rank, world_size, torch.float32, 0, {"equalize": on})[0] for on in (True, False)
    ]
    return [same_bits(a, b) for a, b in zip(*found, strict=True)]


def test_nothing_happens_before_something_is_known(ranks: Ranks) -> None:
    assert ranks.run(compare_first, 2)[0] == [True] + [False] * (STEPS - 1)


def test_it_is_off_by_default() -> None:
    state = RHTState()
    assert state.scales is None
    assert state.state_dict() == {"seed": 0, "step": 0, "rotations": []}
    with pytest.raises(TypeError, match="equalize=1 must be True or False"):
        RHTState(equalize=1)  # type: ignore[arg-type]


# ---- What is special in a bucket --------------------------------------------------------------


def extreme(rank: int, world_size: int, factor: float, flush: bool) -> list[torch.Tensor]:
    """Quiet columns are that no more, and all is as large or small as `factor`."""
    with state_of(bits=8) as state:
        torch.set_flush_denormal(flush and rank == 1)
        try:
            ddp = wrapped(Probe(*SHAPES), state)
            for step in range(3):
                backward(ddp, gradients(rank, step, factor=factor / 8))
            own = [factor * (1 + rank * part.sign()) for part in gradients(rank, 9)]
            return [backward(ddp, own), flat(own)]
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize(("factor", "flush"), [(1e38, False), (1e-38, False), (1e-38, True)])
def test_the_largest_and_smallest_numbers(factor: float, flush: bool, ranks: Ranks) -> None:
    (mean, first), (other, second) = ranks.run(extreme, 2, factor, flush)
    assert same_bits(mean, other)
    exact = (first.double() + second.double()) / 2
    # Of a block of columns that are scaled by up to 2^RANGE: 8 bits have 4.4e-5 without.
    assert nmse(mean.double(), exact) < 4.4e-5 * 4**RANGE / 4
    assert mean.isfinite().all()


def meet_infinity(rank: int, world_size: int, value: float) -> list[Any]:
    with state_of() as state:
        ddp = wrapped(Probe(*SHAPES), state)
        for step in range(2):
            backward(ddp, gradients(rank, step))
        before = state.state_dict(ddp)["scales"]
        odd = gradients(rank, 2)
        odd[0][0, 0] += value * rank
        seen = backward(ddp, odd)
        return [before, seen, state.state_dict(ddp)["scales"], backward(ddp, gradients(rank, 3))]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_seen_and_teaches_nothing(value: float, ranks: Ranks) -> None:
    (before, seen, after, later), other = ranks.run(meet_infinity, 2, value)
    assert same_bits(seen, other[1])
    assert not seen[0].isfinite()
    assert torch.equal(before["weights.0"], after["weights.0"])
    assert not torch.equal(before["weights.2"], after["weights.2"]), "it lies in other blocks"
    assert later.isfinite().all()


def travel_uncompressed(rank: int, world_size: int, options: dict[str, Any]) -> tuple[bool, bool]:
    means, digest = follow(rank, world_size, torch.float32, 0, options)
    plain, _ = follow(rank, world_size, torch.float32, 0, options | {"equalize": False})
    return same_bits(means, plain), digest == RHTState(equalize=True).scales.digest()  # type: ignore[union-attr]


def is_any(parameter: torch.Tensor) -> bool:
    return True


@pytest.mark.parametrize("options", [{"min_numel": 10**6}, {"exclude": is_any}])
def test_what_travels_uncompressed_is_left_alone_and_teaches(
    options: dict[str, Any], ranks: Ranks
) -> None:
    assert ranks.run(travel_uncompressed, 2, options)[0] == (True, False)


def keep_what_is_zero(rank: int, world_size: int) -> list[torch.Tensor]:
    """Rows and columns that are zero in a step, and one of the parameters."""
    with state_of() as state:
        ddp = wrapped(Probe(*SHAPES), state)
        found = []
        for step in range(2):
            own = gradients(rank, step)
            if step:
                own[0][5], own[0][:, 7] = 0, 0
                own[2].zero_()
            backward(ddp, own)
            found += [*state.state_dict(ddp)["scales"].values()]
        return found


def test_what_is_zero_keeps_what_it_had(ranks: Ranks) -> None:
    first, _, last, later, _, later_last = ranks.run(keep_what_is_zero, 2)[0]
    assert torch.equal(last, later_last)
    same = first == later
    assert same[1 + 5]
    # Of columns noise remains, since rows alone are restored to zero.
    assert not same.all()


def measure(rank: int, world_size: int) -> float | None:
    with state_of(nmse_every=1) as state:
        ddp = wrapped(Probe(*SHAPES), state)
        backward(ddp, gradients(rank, 0))
        before = state.totals.squared_error, state.totals.squared_norm
        mean = backward(ddp, gradients(rank, 1))
        error = state.totals.squared_error - before[0]
        norm = state.totals.squared_norm - before[1]
        return abs(error / norm / nmse(mean, exact_mean(world_size, 1)) - 1)


def test_nmse_is_that_of_the_gradients(ranks: Ranks) -> None:
    for difference in ranks.run(measure, 2):
        assert difference < 1e-3


# ---- On a stream ------------------------------------------------------------------------------


def train_on_a_stream(rank: int, world_size: int) -> bool:
    expected, _ = follow(rank, world_size, torch.float32, 0, {})
    with in_place_of_cuda() as streams:
        state = state_of(timeout=None)
        ddp = wrapped(Probe(*SHAPES), state, bucket_cap_mb=0.01)
        means = [backward(ddp, gradients(rank, 0))]
        with no_look_at_numbers():
            means += [backward(ddp, gradients(rank, step)) for step in range(1, STEPS)]
        streams.host_may_wait = True
        state.close()
    return same_bits(torch.stack(means), expected)


def test_the_host_waits_for_no_scale(ranks: Ranks) -> None:
    assert all(ranks.run(train_on_a_stream, 2))


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
        task_loss(ddp, numbers(rank, 0, shape=(16, 32))).backward()  # then buckets stay
        ddp.zero_grad()
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


def learn(state: RHTState, *parts: torch.Tensor) -> Probe:
    """A model whose scales were learned from these gradients."""
    model = Probe(*(tuple(part.shape) for part in parts))
    assert state.scales is not None
    state.scales.learn(list(model.parameters()), flat(list(parts)))
    return model


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
        with pytest.raises(ValueError, match="scales are integers from 0 to 65279"):
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
