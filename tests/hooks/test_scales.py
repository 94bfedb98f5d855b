"""equalize: buckets are divided by powers of two that all ranks learn from the means."""

import math
from typing import Any

import pytest
import torch
from equalized import QUIET, SHAPES, backward, exact_mean, flat, gradients, sizes, state_of
from groups import two_levels
from harness import Ranks
from models import Probe, wrapped
from problems import CANONICAL_NAN, nmse
from simulation import same_bits
from streams import in_place_of_cuda, no_look_at_numbers

from rhtcomm.hooks import RHTState
from rhtcomm.hooks.scales import RANGE

# ---- Means ------------------------------------------------------------------------------------

STEPS = 12


def follow(
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    nodes: int,
    options: dict[str, Any],
    factor: float = 1.0,
) -> tuple[torch.Tensor, str]:
    """The means of all steps (STEPS, numel), and a digest of the scales."""
    if nodes:
        options = options | {"communicator": two_levels(rank, nodes, world_size // nodes)}
    with state_of(**options) as state:
        ddp = wrapped(Probe(*SHAPES, dtype=dtype), state, bucket_cap_mb=0.01)
        means = [backward(ddp, gradients(rank, step, dtype, factor)) for step in range(STEPS)]
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


def average(rank: int, world_size: int, count: int) -> tuple[float, float, float]:
    """The error of the mean over `count` steps of one gradient, the mean error of a step, and how
    much too large that mean is along the gradient."""
    own = gradients(rank, 0)
    with state_of(bits=2) as state:
        ddp = wrapped(Probe(*SHAPES), state)
        for _ in range(8):
            backward(ddp, own)
        means = torch.stack([backward(ddp, own) for _ in range(count)]).double()
    # In units of each coordinate's size, so that a bias of small ones shows.
    size = flat(sizes()).double()
    exact, means = exact_mean(world_size, 0).double() / size, means / size
    mean = means.mean(0)
    along = float((mean - exact) @ exact / exact.square().sum())
    return nmse(mean, exact), nmse(means, exact.expand_as(means)), along


def test_it_stays_unbiased(ranks: Ranks) -> None:
    count = 256
    often, once, along = ranks.run(average, 2, count)[0]
    assert 0.8 < count * often / once < 1.25, (once, often)
    assert abs(along) < 5 * math.sqrt(often / len(flat(sizes())))  # of its standard deviation


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
    assert state.state_dict() == {"seed": 0, "step": 0, "rotations": [], "buckets": []}
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


def meet_infinity(rank: int, world_size: int, value: float, dtype: torch.dtype) -> list[Any]:
    with state_of() as state:
        ddp = wrapped(Probe(*SHAPES, dtype=dtype), state)
        for step in range(2):
            backward(ddp, gradients(rank, step, dtype))
        before = state.state_dict(ddp)["scales"]
        odd = gradients(rank, 2, dtype)
        if rank:
            odd[0][0, 0] = value
        backward(ddp, odd)
        seen = ddp.module.weights[0].grad.clone()
        after = state.state_dict(ddp)["scales"]
        return [before, seen, after, backward(ddp, gradients(rank, 3, dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_seen_and_teaches_nothing(
    value: float, dtype: torch.dtype, ranks: Ranks
) -> None:
    (before, seen, after, later), other = ranks.run(meet_infinity, 2, value, dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert seen[0, 0].isnan()
    assert (seen.view(integer)[seen.isnan()] == CANONICAL_NAN[dtype]).all()
    assert same_bits(seen, other[1])
    assert torch.equal(before["weights.0"], after["weights.0"])
    assert not torch.equal(before["weights.2"], after["weights.2"]), "it lies in other blocks"
    assert later.isfinite().all()


def travel_uncompressed(rank: int, world_size: int, options: dict[str, Any]) -> tuple[bool, bool]:
    # Of such small numbers a division would take bits.
    means, digest = follow(rank, world_size, torch.float32, 0, options, 1e-38)
    plain, _ = follow(rank, world_size, torch.float32, 0, options | {"equalize": False}, 1e-38)
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
