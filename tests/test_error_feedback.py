"""Error feedback: what is sent and what is left add up to what there was."""

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from problems import ROUNDOFF, gaussian
from test_collectives import two_levels
from test_ddp import TIMEOUT, Probe, numbers, wrapped
from test_kernels import needs_library, run_on, variants
from test_state import Alone
from torch import nn

import rhtcomm
from rhtcomm import Codec, Eden, Key, Lattice, QuicFL, VectorQuantizer
from rhtcomm.codec import PayloadError
from rhtcomm.collectives import Algorithm
from rhtcomm.hooks import RHTState, rht_hook
from rhtcomm.kernels import reference

BLOCK = 256
KEY = Key(seed=7, step=3, bucket=1)
BIASED = (Eden(1, biased=True), Eden(3, biased=True), VectorQuantizer(1, biased=True))
CODEC = Codec(Eden(1, biased=True), block=BLOCK)


# ---- The biased scale -------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [*BIASED, VectorQuantizer(4, biased=True)])
def test_the_biased_scale_has_the_least_squared_error(quantizer: Eden | VectorQuantizer) -> None:
    y = gaussian(16 * 1024).view(16, 1024) * torch.logspace(-6, 6, 16)[:, None]
    codes, scale = quantizer.encode(y, KEY, 0, 0, 1)
    values = quantizer.decode(codes, KEY, 0, 0, 1).double()
    for row, column, found in zip(y.double(), values, scale.double(), strict=True):
        best = torch.linalg.lstsq(column[:, None], row[:, None]).solution.item()
        assert found.item() == pytest.approx(best, rel=64 * ROUNDOFF)
    # The codes are those of the unbiased scale, which does worse.
    same, unbiased = type(quantizer)(quantizer.bits).encode(y, KEY, 0, 0, 1)
    assert torch.equal(codes, same)
    assert bool((unbiased > scale).all())
    zero = quantizer.encode(torch.zeros(1, 1024), KEY, 0, 0, 1)[1]
    assert zero.item() == 0


def test_error_of_one_bit() -> None:
    """e / (1 + e) of e = pi / 2 - 1, which is 1 - 2 / pi.

    1 - (mean |z|)^2 / mean z^2 of a block has a standard deviation of 0.0053, its mean over 256
    blocks one of 0.00033.
    """
    x = gaussian(256 * 4096)
    codec = Codec(Eden(1, biased=True))
    mean = codec.decode_mean(codec.encode(x, KEY)[None], KEY, x.numel())
    vnmse = float((mean - x).double().square().sum() / x.double().square().sum())
    assert vnmse == pytest.approx(0.36338, abs=4 * 0.00033)


def test_biased_payloads_are_another_format() -> None:
    payload = CODEC.encode(gaussian(1000), KEY)
    with pytest.raises(PayloadError, match="configuration"):
        Codec(Eden(1), block=BLOCK).decode_mean(payload[None], KEY, 1000)
    assert "biased" not in Codec(Eden(1)).configuration
    assert CODEC.configuration["biased"] is True


# ---- Decoding some of the ranks ---------------------------------------------------------------

QUANTIZERS = (QuicFL(3), Eden(2), *BIASED, VectorQuantizer(2))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_ranks_decoded_apart_have_the_mean_of_all(quantizer: Any) -> None:
    codec, numel, n = Codec(quantizer, block=BLOCK), 5 * BLOCK + 77, 3
    xs = [(rank + 1) * gaussian(numel, rank) for rank in range(n)]
    payloads = torch.stack([codec.encode(x, KEY, r, n, first=BLOCK) for r, x in enumerate(xs)])
    mean = codec.decode_mean(payloads, KEY, numel, first=BLOCK)
    alone = [
        codec.decode_mean(row[None], KEY, numel, first=BLOCK, first_rank=rank, world_size=n)
        for rank, row in enumerate(payloads)
    ]
    bound = 64 * ROUNDOFF * max(float(x.abs().max()) for x in alone)
    torch.testing.assert_close(torch.stack(alone).mean(0), mean, rtol=0, atol=bound)
    pair = codec.decode_mean(payloads[1:], KEY, numel, first=BLOCK, first_rank=1, world_size=n)
    torch.testing.assert_close((alone[1] + alone[2]) / 2, pair, rtol=0, atol=bound)
    with pytest.raises(PayloadError, match="the payload of rank 2 was made for another"):
        codec.decode_mean(payloads[:1], KEY, numel, first=BLOCK, first_rank=2, world_size=n)
    with pytest.raises(ValueError, match="rank=3 must lie in"):
        codec.decode_mean(payloads, KEY, numel, first=BLOCK, first_rank=1, world_size=n)


@needs_library
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("block", [64, 4096])
def test_same_bits_as_the_reference(quantizer: Any, block: int) -> None:
    codec, numel, n = Codec(quantizer, block=block), 2 * block + 300, 5
    found: dict[str, list[torch.Tensor]] = {}
    for name, kernel in {"reference": reference, **variants()}.items():
        with run_on(kernel):
            payloads = torch.stack([codec.encode(gaussian(numel, r), KEY, r, n) for r in range(n)])
            parts = [(0, 1), (3, 1), (2, 3)]
            means = [
                codec.decode_mean(
                    payloads[rank : rank + rows], KEY, numel, first_rank=rank, world_size=n
                )
                for rank, rows in parts
            ]
            found[name] = [payloads, *means]
    for name, tensors in found.items():
        for tensor, expected in zip(tensors, found["reference"], strict=True):
            assert torch.equal(tensor, expected), name


# ---- all_reduce -------------------------------------------------------------------------------

STEPS = 6
NUMEL = 9 * BLOCK + 77
Case = tuple[Codec, Algorithm, torch.dtype]
CASES: list[Case] = [
    (CODEC, "all_gather", torch.float32),
    (CODEC, "two_shot", torch.float32),
    (CODEC, "gather", torch.float32),
    (CODEC, "all_gather", torch.bfloat16),
    (Codec(QuicFL(2), block=BLOCK), "two_shot", torch.float32),
    (Codec(VectorQuantizer(1, biased=True), block=BLOCK), "all_gather", torch.float32),
]


def gradient(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ((rank + 1) * numbers(rank, step, shape=(NUMEL,))).to(dtype)


def accumulate(rank: int, world_size: int, nodes: int) -> list[list[torch.Tensor]]:
    """Of each case the sum of the results and the residual after all steps, both (NUMEL,)."""
    communicator: Any = rhtcomm.TorchCommunicator()
    if nodes:
        communicator = two_levels(rank, nodes, world_size // nodes)
    outcomes = []
    for codec, algorithm, dtype in CASES:
        total, residual = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL)
        for step in range(STEPS):
            x = gradient(rank, step, dtype)
            rhtcomm.all_reduce(
                x,
                codec,
                Key(1, step),
                communicator,
                algorithm=algorithm,
                min_numel=0,
                check=False,
                residual=residual,
            )
            total += x
        outcomes.append([total, residual])
    return outcomes


@pytest.mark.parametrize(("world_size", "nodes"), [(2, 0), (3, 0), (4, 2)])
def test_sent_and_left_add_up_to_the_exact_means(world_size: int, nodes: int, ranks: Ranks) -> None:
    by_rank = ranks.run(accumulate, world_size, nodes)
    for number, case in enumerate(CASES):
        dtype = case[2]
        inputs = torch.stack(
            [
                torch.stack([gradient(rank, step, dtype).double() for step in range(STEPS)])
                for rank in range(world_size)
            ]
        )
        sent = by_rank[0][number][0]
        left = torch.stack([outcomes[number][1].double() for outcomes in by_rank])
        assert all(torch.equal(outcomes[number][0], sent) for outcomes in by_rank)
        # Each step rounds numbers up to the largest of the inputs and the residuals some dozens of
        # times. What bfloat16 results lose, which have 8 bits, is left as well.
        peak = float(inputs.abs().max() + left.abs().max())
        torch.testing.assert_close(
            sent + left.mean(0), inputs.mean(0).sum(0), rtol=0, atol=STEPS * 64 * ROUNDOFF * peak
        )
        assert float(left.norm()) > 0.1 * float(inputs[:, 0].norm()), "nothing was left unsent"


def meet_infinity(rank: int, world_size: int, algorithm: Algorithm) -> list[torch.Tensor]:
    communicator = rhtcomm.TorchCommunicator()
    residual = gradient(rank, 50)
    x, before = gradient(rank, 0), residual.clone()
    if rank == 1:
        x[2 * BLOCK + 5] = torch.inf
    rhtcomm.all_reduce(
        x, CODEC, KEY, communicator, algorithm=algorithm, min_numel=0, residual=residual
    )
    return [x, before, residual]


@pytest.mark.parametrize("algorithm", ["all_gather", "two_shot", "gather"])
def test_a_step_that_is_not_finite_keeps_the_residual(algorithm: Algorithm, ranks: Ranks) -> None:
    spoilt = torch.zeros(NUMEL, dtype=torch.bool)
    spoilt[2 * BLOCK : 3 * BLOCK] = True
    for mean, before, after in ranks.run(meet_infinity, 3, algorithm):
        assert torch.equal(mean.isnan(), spoilt)
        assert torch.equal(before, after)


def flush(rank: int, world_size: int) -> list[torch.Tensor]:
    x, residual = gradient(rank, 0), gradient(rank, 50)
    rhtcomm.all_reduce(
        x, CODEC, KEY, rhtcomm.TorchCommunicator(), min_numel=NUMEL + 1, residual=residual
    )
    return [x, residual]


def test_small_tensors_take_what_is_left_along(ranks: Ranks) -> None:
    exact = torch.stack([gradient(rank, 0) + gradient(rank, 50) for rank in range(3)]).mean(0)
    for mean, residual in ranks.run(flush, 3):
        torch.testing.assert_close(mean, exact)
        assert not residual.any()


def test_one_rank_alone_is_exact() -> None:
    x, residual = gradient(0, 0), gradient(0, 50)
    expected = x + residual
    rhtcomm.all_reduce(x, CODEC, KEY, Alone(), check=False, residual=residual)
    assert torch.equal(x, expected)
    assert not residual.any()


def hold_still(rank: int, world_size: int, algorithm: Algorithm) -> list[float]:
    """The residuals' norms in units of the gradient's, which stays as it is."""
    communicator = rhtcomm.TorchCommunicator()
    x, residual, norms = gradient(rank, 0), torch.zeros(NUMEL), []
    for step in range(40):
        rhtcomm.all_reduce(
            x.clone(),
            CODEC,
            Key(2, step),
            communicator,
            algorithm=algorithm,
            min_numel=0,
            check=False,
            residual=residual,
        )
        norms.append(float(residual.norm() / x.norm()))
    return norms


def test_residuals_stay_bounded(ranks: Ranks) -> None:
    """|r| <= a (|x| + |r|), a = 0.3634^(1/2) up to the spread between blocks of 256.

    Part of r is what x shrinks by, 0.3634 / (1 - 0.3634) of it, so that |x + r| > 1.5 |x|.
    """
    for norms in ranks.run(hold_still, 2, "all_gather"):
        assert 0.8 < max(norms) < 0.64 / (1 - 0.64)
    # What a rank owns holds the second hop's error too, as many times as there are ranks.
    for norms in ranks.run(hold_still, 3, "two_shot"):
        assert max(norms[20:]) < 1.5 * max(norms[:20])


# ---- Training ---------------------------------------------------------------------------------


def descend(rank: int, world_size: int, feedback: bool) -> float:
    """The squared distance from the minimum of the mean of |w - target|^2 / 2, after 200 steps."""
    spike = torch.zeros(BLOCK)
    spike[3] = 3
    noise = gaussian(BLOCK) / 4
    targets = torch.stack([spike + noise, -spike, -noise])
    codec = Codec(Eden(1, biased=True), rotations=1, block=BLOCK)
    w, residual = gaussian(BLOCK, 1), torch.zeros(BLOCK) if feedback else None
    communicator = rhtcomm.TorchCommunicator()
    for step in range(200):
        g = w - targets[rank]
        rhtcomm.all_reduce(
            g, codec, Key(3, step), communicator, min_numel=0, check=False, residual=residual
        )
        w -= 2 / (step + 10) * g
    return float((w - targets.mean(0)).square().sum())


def test_sgd_needs_feedback_to_reach_the_minimum(ranks: Ranks) -> None:
    """One transform turns a spike into numbers that one bit a coordinate holds exactly, so the
    ranks' gradients shrink differently and cancel in the wrong place."""
    without, fed_back = (ranks.run(descend, 3, feedback)[0] for feedback in (False, True))
    assert without > 0.05
    assert fed_back < 0.01 * without


# ---- The hook ---------------------------------------------------------------------------------

SIZES = [3000, 500, 1111]


def state_of(**options: Any) -> RHTState:
    return RHTState(
        **{
            **{"bits": 1, "quantizer": "eden", "block": BLOCK, "min_numel": 600},
            **{"timeout": TIMEOUT, "error_feedback": True},
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
            "nmse": nmse,
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
        # Of the codes, not of the steps: one bit, one or two hops, of what is left as well.
        assert 0.36 / world_size < result["nmse"] < 0.7


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


def test_a_resumed_run_ends_with_the_same_bits(ranks: Ranks) -> None:
    for outcome in ranks.run(resume, 2):
        assert torch.equal(outcome["resumed"], outcome["whole"])
        assert torch.equal(outcome["resumed residual"], outcome["residual"])
        assert not torch.equal(outcome["forgotten"], outcome["whole"])


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


def bring_odd_residuals(rank: int, world_size: int) -> list[str]:
    messages = []
    for odd in (None, torch.zeros(999), torch.zeros(1000, dtype=torch.float64)):
        residual = odd if rank == 1 else torch.zeros(1000)
        with pytest.raises(rhtcomm.DisagreementError) as error:
            rhtcomm.all_reduce(
                torch.ones(1000), CODEC, KEY, rhtcomm.TorchCommunicator(), residual=residual
            )
        messages.append(str(error.value))
    return messages


def test_one_odd_residual_is_named_on_every_rank(ranks: Ranks) -> None:
    first, second = ranks.run(bring_odd_residuals, 2)
    assert first == second
    for message, odd in zip(first, ("None", "(999,)", "float64"), strict=True):
        assert "differently in residual (" in message
        assert odd in message


def test_the_hook_takes_the_biased_scale_only_with_feedback() -> None:
    for quantizer in ("eden", "vector"):
        for feedback in (True, False):
            codec = state_of(quantizer=quantizer, error_feedback=feedback).codec
            assert isinstance(codec, Codec)
            assert codec.configuration.get("biased", False) is feedback


@pytest.mark.parametrize(
    ("codec", "residual", "message"),
    [
        (Lattice(4), torch.zeros(100), "another quantizer"),
        (Codec(QuicFL(1)), torch.zeros(100), "diverge"),
        (Codec(Eden(1)), torch.zeros(100), "diverge"),
        (CODEC, torch.zeros(99), "zeros_like"),
        (CODEC, torch.zeros(100, dtype=torch.float64), "zeros_like"),
        (CODEC, torch.zeros(100, device="meta"), "residual lies on the meta device"),
    ],
)
def test_what_all_reduce_refuses(codec: Any, residual: torch.Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        rhtcomm.all_reduce(torch.ones(100), codec, KEY, Alone(), check=False, residual=residual)


@pytest.mark.parametrize(
    "arguments", [{"quantizer": "lattice", "bits": 4}, {"quantizer": "quic_fl"}]
)
def test_what_the_hook_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="error feedback"):
        state_of(**arguments)


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
    for wrong in ({"weights.1": torch.ones(10)}, {"weights.0": torch.ones(11)}):
        with pytest.raises(ValueError, match="but the model has"):
            state.load_state_dict({**good, "residuals": wrong}, model)
    with pytest.raises(ValueError, match="saved has no residuals"):
        state.load_state_dict({"seed": 0, "step": 4}, model)
    with pytest.raises(ValueError, match="saved has residuals"):
        plain.load_state_dict(good, model)
    assert plain.state_dict(model) == {"seed": 0, "step": 0, "rotations": []}
