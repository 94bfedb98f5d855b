"""Error feedback of the hook: residuals by parameter, through rebuilt buckets and checkpoints."""

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from models import Probe, wrapped
from problems import ROUNDOFF, numbers
from states import BLOCK, TIMEOUT
from torch import nn

from rhtcomm import Codec
from rhtcomm.hooks import RHTState, rht_hook
from rhtcomm.hooks.residuals import Residuals
from rhtcomm.reduce import Algorithm

STEPS = 6


SIZES = [3000, 500, 1111]


def state_of(**options: Any) -> RHTState:
    return RHTState(
        **{
            **{"bits": 1, "quantizer": "eden", "block": BLOCK, "min_numel": 600},
            **{"timeout": TIMEOUT, "error_feedback": True, "warmup_steps": 0},
            **options,
        }
    )


def gradients(rank: int, step: int) -> tuple[torch.Tensor, ...]:
    return ((rank + 1) * numbers(rank, step, shape=(sum(SIZES),))).split(SIZES)


def residual_of(state: RHTState, model: nn.Module) -> torch.Tensor:
    residuals = state.state_dict(model)["residuals"]
    assert list(residuals) == [f"weights.{i}" for i in range(len(SIZES))]
    return torch.cat(list(residuals.values())).double()


def take(model: nn.Module) -> torch.Tensor:
    """The gradients, which are then cleared."""
    taken = torch.cat([p.grad for p in model.parameters() if p.grad is not None]).double()
    for p in model.parameters():
        p.grad = None
    return taken


def follow(rank: int, world_size: int, algorithm: Algorithm) -> dict[str, Any]:
    buckets: list[int] = []

    def hook(
        state: RHTState,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        buckets.append(bucket.index())
        return rht_hook(state, bucket)

    model, total = Probe(*SIZES), torch.zeros(sum(SIZES), dtype=torch.float64)
    with state_of(algorithm=algorithm, nmse_every=1) as state:
        ddp = wrapped(model, state, hook, bucket_cap_mb=0.001)
        for step in range(STEPS):
            ddp(*gradients(rank, step)).backward()
            total += take(model)
        nmse = state.stats().nmse
        return {
            **{"total": total, "residual": residual_of(state, ddp), "buckets": buckets},
            **{"nmse": nmse, "bound": state.residuals.bound.clone()},
        }


@pytest.mark.parametrize(("world_size", "algorithm"), [(2, "all_gather"), (3, "two_shot")])
def test_residuals_survive_rebuilt_buckets(
    world_size: int, algorithm: Algorithm, ranks: Ranks
) -> None:
    results = ranks.run(follow, world_size, algorithm)
    left = torch.stack([result["residual"] for result in results])
    inputs = torch.stack(
        [
            torch.stack([torch.cat(gradients(rank, step)).double() for step in range(STEPS)])
            for rank in range(world_size)
        ]
    )
    for result in results:
        assert result["buckets"] == [0] + [0, 1, 2] * (STEPS - 1)
        bound = STEPS * 64 * ROUNDOFF * float(inputs.abs().max() + left.abs().max())
        torch.testing.assert_close(
            result["total"] + left.mean(0), inputs.mean(0).sum(0), rtol=0, atol=bound
        )
        assert torch.equal(result["total"], results[0]["total"])
        # What was left of a small parameter in the first step's one bucket went exactly later.
        first, small, last = result["residual"].split(SIZES)
        assert not small.any()
        assert bool(first.any())
        assert bool(last.any())
        assert result["residual"].abs().max() <= result["bound"] < 2**20
        # Of the codes, not of the steps: one bit, one or two hops, of what is left as well.
        assert 0.36 / world_size < result["nmse"] < 0.7


def test_a_loaded_residual_is_known_to_be_large() -> None:
    model, state = Probe(4), state_of()
    saved: dict[str, Any] = {"seed": 0, "step": 1, "rank": 0, "world_size": 1}
    saved["residuals"] = {"weights.0": torch.tensor([1.0, -3e38, 0.0, 2.0])}
    state.load_state_dict(saved, model)
    assert state.residuals.bound.item() == torch.tensor(3e38).item()
    saved["residuals"] = {}
    state.load_state_dict(saved, model)
    assert state.residuals.bound.item() == 0


def test_the_bound_stays_when_residuals_cannot_be_loaded() -> None:
    first, second = torch.zeros(3), torch.zeros(3)
    residuals = Residuals()
    residuals.replace([(first, torch.full((3,), 1e30)), (second, torch.ones(3))])
    with pytest.raises(NotImplementedError):
        residuals.replace([(first, torch.ones(3)), (second, torch.ones(3, device="meta"))])
    assert [value[0].item() for _, value in residuals.by_parameter()] == [torch.tensor(1e30), 1]
    assert residuals.bound.item() == torch.tensor(1e30)


def overflow_once(rank: int, world_size: int, algorithm: Algorithm) -> list[tuple[bool, float]]:
    model, found = Probe(*SIZES), []
    with state_of(algorithm=algorithm) as state:
        ddp = wrapped(model, state)
        for step in range(3):
            weights = gradients(rank, step)
            if (rank, step) == (1, 1):
                weights[0][5] = torch.inf
            ddp(*weights).backward()
            left = residual_of(state, model).abs().max().item()
            found.append((bool(take(model).isfinite().all()), state.residuals.bound.item() / left))
    return found


@pytest.mark.parametrize(("world_size", "algorithm"), [(2, "all_gather"), (3, "two_shot")])
def test_the_bound_forgets_a_step_that_overflowed(
    world_size: int, algorithm: Algorithm, ranks: Ranks
) -> None:
    for found in ranks.run(overflow_once, world_size, algorithm):
        finite, ratios = zip(*found, strict=True)
        assert finite == (True, False, True)
        assert all(1 <= ratio < 64 for ratio in ratios)  # NaN and infinity are not


def join_early(rank: int, world_size: int, batches: list[int]) -> dict[str, Any]:
    model, total = Probe(*SIZES), torch.zeros(sum(SIZES), dtype=torch.float64)
    with state_of(algorithm="all_gather") as state:
        ddp = wrapped(model, state, bucket_cap_mb=0.001)
        with ddp.join():
            for step in range(batches[rank]):
                ddp(*gradients(rank, step)).backward()
                total += take(model)
            at_the_end = residual_of(state, model)
        return {"total": total, "before": at_the_end, "after": residual_of(state, model)}


def test_a_rank_that_joined_sends_off_what_it_has_left(ranks: Ranks) -> None:
    batches = [3, 8]
    results = ranks.run(join_early, 2, batches)
    left = torch.stack([result["after"] for result in results])
    exact = sum(
        torch.cat(gradients(rank, step)).double() / 2
        for rank, count in enumerate(batches)
        for step in range(count)
    )
    bound = batches[1] * 64 * ROUNDOFF * 30
    torch.testing.assert_close(results[1]["total"] + left.mean(0), exact, rtol=0, atol=bound)
    # Five steps more leave 0.3634^(5/2) of it.
    before, after = (float(results[0][when].norm()) for when in ("before", "after"))
    assert 0.04 * before < after < 0.12 * before


# ---- Checkpoints ------------------------------------------------------------------------------


def resume(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Four steps at once; and two, a checkpoint, and two more in new objects."""

    def start() -> tuple[nn.Module, Any, RHTState]:
        model = Probe(*SIZES)
        state = state_of(min_numel=0)
        ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.006)  # two buckets
        ddp(*gradients(rank, 99)).backward()  # after it, buckets stay as they are
        take(model)
        ddp.register_comm_hook(state, rht_hook)
        return model, ddp, state

    def train(model: nn.Module, ddp: Any, first: int, stop: int) -> torch.Tensor:
        return torch.stack(
            [
                (ddp(*gradients(rank, step)).backward(), take(model))[1]
                for step in range(first, stop)
            ]
        )

    model, ddp, state = start()
    train(model, ddp, 0, 2)
    file = io.BytesIO()
    content = state.state_dict(ddp)
    for residual in content["residuals"].values():
        assert residual.untyped_storage().nbytes() == residual.nbytes, "a view of a whole bucket"
    torch.save(content, file)
    whole = train(model, ddp, 2, 4)
    outcome = {"whole": whole, "residual": residual_of(state, ddp)}
    state.close()

    file.seek(0)
    saved = torch.load(file)
    model, ddp, state = start()
    state.load_state_dict(saved, model)
    outcome |= {"resumed": train(model, ddp, 2, 4), "resumed residual": residual_of(state, model)}
    state.close()
    model, ddp, state = start()
    state.load_state_dict({**saved, "residuals": {}}, model)
    outcome["forgotten"] = train(model, ddp, 2, 4)
    state.close()
    return outcome


def test_a_resumed_run_with_feedback_ends_with_the_same_bits(ranks: Ranks) -> None:
    for outcome in ranks.run(resume, 2):
        assert torch.equal(outcome["resumed"], outcome["whole"])
        assert torch.equal(outcome["resumed residual"], outcome["residual"])
        assert not torch.equal(outcome["forgotten"], outcome["whole"])


def test_checkpoints_that_do_not_fit() -> None:
    model, state, plain = Probe(10), state_of(), state_of(error_feedback=False)
    good: dict[str, Any] = {"seed": 0, "step": 4, "rank": 0, "world_size": 1}
    good["residuals"] = {"weights.0": torch.ones(10)}
    state.load_state_dict(good, model)
    assert torch.equal(state.state_dict(model)["residuals"]["weights.0"], torch.ones(10))
    with pytest.raises(ValueError, match=r"call state_dict\(model\)"):
        state.state_dict()
    with pytest.raises(ValueError, match=r"call load_state_dict\(state, model\)"):
        state.load_state_dict(good)
    with pytest.raises(ValueError, match="the model has none of the 1 parameter"):
        state.state_dict(Probe(10))
    large = {"weights.0": torch.full((10,), 1e300, dtype=torch.float64)}  # infinite in float32
    with pytest.raises(ValueError, match="finite real numbers"):
        state.load_state_dict({**good, "residuals": large}, model)
    for wrong in ({"weights.1": torch.ones(10)}, {"weights.0": torch.ones(11)}):
        with pytest.raises(ValueError, match="but the model has"):
            state.load_state_dict({**good, "residuals": wrong}, model)
    with pytest.raises(ValueError, match="saved has no residuals"):
        state.load_state_dict({"seed": 0, "step": 4}, model)
    with pytest.raises(ValueError, match="saved has residuals"):
        plain.load_state_dict(good, model)
    assert plain.state_dict(model) == {"seed": 0, "step": 0, "rotations": [], "buckets": []}


# ---- Wrong use --------------------------------------------------------------------------------


def disagree(rank: int, world_size: int) -> str:
    with state_of(quantizer="quic_fl", bits=4, error_feedback=rank == 0) as state:
        ddp = wrapped(Probe(1000), state)
        try:
            ddp(torch.ones(1000)).backward()
        except RuntimeError as error:
            return str(error)
    return "no error"


def test_ranks_that_disagree_find_out(ranks: Ranks) -> None:
    for message in ranks.run(disagree, 2):
        assert "error_feedback (True on rank 0; False on rank 1)" in message


def test_the_hook_takes_the_biased_scale_only_with_feedback() -> None:
    for quantizer in ("eden", "vector"):
        for feedback in (True, False):
            codec = state_of(quantizer=quantizer, error_feedback=feedback).codec
            assert isinstance(codec, Codec)
            assert codec.configuration.get("biased", False) is feedback


@pytest.mark.parametrize(
    "arguments", [{"quantizer": "lattice", "bits": 4}, {"quantizer": "quic_fl"}]
)
def test_what_the_hook_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="error feedback"):
        state_of(**arguments)
