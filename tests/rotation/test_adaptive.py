"""How many transforms: the moment check, against brute force, and the agreement over ranks."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from groups import two_levels
from harness import Ranks
from libraries import needs_library, variants
from problems import adversarial, gaussian, lognormal, sylvester
from torch.nn.parallel import DistributedDataParallel

import rhtcomm
from rhtcomm import Codec, Eden, Key, PayloadError, QuicFL, VectorQuantizer, choose_rotations
from rhtcomm.hooks import RHTState, rht_hook
from rhtcomm.kernels import Kernel, reference
from rhtcomm.reduce import Algorithm

KEY = Key(seed=3, step=1, bucket=4)
NEEDS_TWO = torch.zeros(4096).index_copy_(0, torch.arange(3), torch.tensor([1.0, 0.6, 0.3]))


# ---- The check --------------------------------------------------------------------------------


def measures(x: np.ndarray, block: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, bound and largest covariance of each block, from their definitions in float64."""
    weight, bound, covariance = [], [], []
    signs = sylvester(block) * math.sqrt(block)
    for row in x.reshape(-1, block):
        energy = (row**2).sum()
        weight.append(energy / (x**2).sum())
        bound.append(0.5606 * (np.abs(row) ** 3).sum() / energy**1.5)
        # E y_i y_j d = sum_l H_il H_jl x_l^2, over the signs of one transform.
        first = (signs * row**2) @ signs[:, :group] / energy
        covariance.append(np.abs(first[:group] - np.eye(group)).max())
    return np.array(weight), np.array(bound), np.array(covariance)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_choice_flips_where_the_definition_says(group: int, scale: float) -> None:
    block = 256
    x = torch.cat([2.0**i * gaussian(block, i) for i in range(4)]).double() * scale
    weight, bound, covariance = measures(x.numpy() / scale, block, group)
    limits = [weight @ bound, bound.max() / 4]  # all blocks have more than 1e-4 of the energy
    if group > 1:
        limits += [weight @ covariance / 4, covariance.max() / 16]
    tolerance = max(limits)
    for factor, expected in ((1 + 1e-9, 1), (1 - 1e-9, 3)):
        options: dict[str, Any] = {"group": group, "safe": 3, "tolerance": tolerance * factor}
        assert choose_rotations(x, block=block, **options) == expected


def test_one_bad_block_counts_unless_it_holds_next_to_nothing() -> None:
    x = gaussian(256 * 4096).view(256, 4096)
    x[7] = NEEDS_TWO * 40
    assert choose_rotations(x.flatten()) == 2
    x[7] = NEEDS_TWO * 4  # 8e-5 of 2^20
    assert choose_rotations(x.flatten()) == 1


def test_the_bound_holds() -> None:
    """Kolmogorov distances to the Gaussian by all 2^m sign patterns."""
    for values in ([1.0], [1.0, 1.0], [1.0, 0.6, 0.3], [1.0] * 12, list(range(1, 13))):
        x = np.array(values)
        sums = np.sort(np.array(list(itertools.product((-1, 1), repeat=len(x)))) @ x)
        normal = np.array([0.5 * math.erfc(-s / math.sqrt(2 * (x**2).sum())) for s in sums])
        steps = np.arange(len(sums) + 1) / len(sums)
        distance = max(np.abs(normal - steps[1:]).max(), np.abs(normal - steps[:-1]).max())
        bound = 0.5606 * (x**3).sum() / (x**2).sum() ** 1.5
        assert distance <= bound
        padded = torch.zeros(4096).index_copy_(
            0, torch.arange(len(x)), torch.tensor(values, dtype=torch.float32)
        )
        assert choose_rotations(padded) == (1 if bound <= 0.05 else 2)


def test_ordinary_inputs_settle_at_one_and_adversarial_ones_at_the_safe_count() -> None:
    one = {"half_zeros", "constant", "walsh_row", "lognormal"}  # thousands of like summands
    for name, x in adversarial(4096).items():
        assert choose_rotations(x) == (1 if name in one else 2), name
    for x in (gaussian(1 << 20), lognormal(1 << 20), torch.zeros(5000), torch.zeros(0)):
        assert choose_rotations(x) == 1
    # Every other coordinate: one transform leaves pairs of a group the same up to signs.
    assert choose_rotations(adversarial(4096)["half_zeros"], group=8, safe=3) == 3
    assert choose_rotations(gaussian(1 << 20), group=8, safe=3) == 1


def test_blocks_that_are_not_finite_do_not_count() -> None:
    x = torch.cat([gaussian(4096), NEEDS_TWO * 1e6])
    x[4096 + 9] = torch.nan
    assert choose_rotations(x) == 1
    x[4096 + 9] = 0
    assert choose_rotations(x) == 2


def test_bad_arguments() -> None:
    for bad in ({"group": 3}, {"tolerance": 0.0}, {"tolerance": 1.0}, {"safe": 4}, {"block": 100}):
        with pytest.raises(ValueError, match=r"choose_rotations|RandomizedHadamard"):
            choose_rotations(torch.ones(10), **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rotations='often' must be"):
        Codec(QuicFL(4), "often")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='the number can be chosen only with rotations="auto"'):
        Codec(QuicFL(4)).encode(torch.ones(10), KEY, rotations=1)
    with pytest.raises(ValueError, match="is not for quantizer"):
        RHTState(quantizer="lattice", rotations="auto")


# ---- Kernels ----------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("quantizer", [QuicFL(4), Eden(2), VectorQuantizer(2)])
def test_the_kernels_find_the_moments_of_the_reference(quantizer: Any) -> None:
    x = lognormal(3 * 4096 + 300)
    x[4096 + 5] = torch.inf
    x[2 * 4096 : 3 * 4096] *= 1e35
    task = Codec(quantizer, 1).task(len(x))
    payload = torch.empty(1, task.sections[-1].stop, dtype=torch.uint8)
    kernels: list[Kernel] = [reference, *variants().values()]
    found = []
    for kernel in kernels:
        moments = torch.full((task.blocks, 10), -1.0)
        kernel.encode(task, KEY, 0, 0, 1, x, payload, moments)
        found.append(moments)
    assert len(found) > 1
    assert len(found[0]) == 4
    for other in found[1:]:
        torch.testing.assert_close(other[:, :9], found[0][:, :9], rtol=1e-4, atol=0)
        finite = found[0][:, 8] > 0
        assert torch.equal(other[finite, 9], found[0][finite, 9])


# ---- Codec ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_s_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    codec = Codec(QuicFL(4), "auto")
    expected = [codec.encode(x, KEY) for x in (gaussian(9000), NEEDS_TWO)]
    inputs = [gaussian(9000), NEEDS_TWO]
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, (codec.encode(x, KEY) for x in inputs), expected))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("quantizer", [QuicFL(4), Eden(1), VectorQuantizer(1)])
def test_payloads_say_what_they_took_and_what_they_want(quantizer: Any) -> None:
    codec = Codec(quantizer, "auto")
    safe = quantizer.rotations
    cases = (("ordinary", gaussian(9000), 1), ("adversarial", NEEDS_TWO, safe))
    for _, x, wanted in cases:
        for taken in (None, 1, 2, 3):
            payload = codec.encode(x, KEY, rotations=taken)
            assert payload[3] == (taken or safe) + 16 * wanted
            assert codec.wanted_rotations(payload[None]) == wanted
            mean = codec.decode_mean(payload[None], KEY, len(x))
            fixed = Codec(quantizer, taken or safe)
            expected = fixed.decode_mean(fixed.encode(x, KEY)[None], KEY, len(x))
            assert torch.equal(mean, expected)
    assert codec.encode(gaussian(9000), KEY, wanted=3)[3] >> 4 == 3


def test_payloads_that_took_different_numbers_are_refused() -> None:
    codec = Codec(QuicFL(4), "auto")
    x = gaussian(9000)
    payloads = torch.stack([codec.encode(x, KEY, r, 2, rotations=1 + r) for r in range(2)])
    with pytest.raises(PayloadError, match="rank 1 has 2 rotations, another payload 1:"):
        codec.decode_mean(payloads, KEY, len(x))
    payloads[:, 3] = 16
    with pytest.raises(PayloadError, match="has 0 rotations"):
        codec.decode_mean(payloads, KEY, len(x))
    with pytest.raises(PayloadError, match="a configuration other than"):
        Codec(QuicFL(4), 2).decode_mean(codec.encode(x, KEY)[None], KEY, len(x))


# ---- Ranks ------------------------------------------------------------------------------------


def reduce_auto(rank: int, world_size: int) -> list[tuple[int | None, torch.Tensor]]:
    communicator = rhtcomm.TorchCommunicator()
    codec, results = Codec(QuicFL(4), "auto"), []
    algorithms: tuple[Algorithm, ...] = ("all_gather", "two_shot", "gather")
    # Two odd ones cancel in the mean, which then looks ordinary.
    odd_ones: tuple[tuple[int, ...], ...] = ((), (1,), (0, 1))
    for algorithm, odd, taken in itertools.product(algorithms, odd_ones, (None, 1)):
        x = gaussian(9 * 4096 + 99, rank)
        if rank in odd:
            x[4096 : 2 * 4096] = 100 * (-1) ** rank * NEEDS_TWO
        wanted = rhtcomm.all_reduce(
            x, codec, KEY, communicator, algorithm=algorithm, min_numel=0, rotations=taken
        ).wanted_rotations
        assert wanted == (2 if odd else 1), (algorithm, odd)
        x = gaussian(9 * 4096 + 99, rank)
        fixed = Codec(QuicFL(4), taken or 2)
        y = x.clone()
        rhtcomm.all_reduce(
            x, codec, KEY, communicator, algorithm=algorithm, min_numel=0, rotations=taken
        )
        report = rhtcomm.all_reduce(y, fixed, KEY, communicator, algorithm=algorithm)
        assert (report.rotations, report.wanted_rotations) == (taken or 2, None)
        assert torch.equal(x, y)
        results.append((wanted, x))
    with pytest.raises(rhtcomm.DisagreementError, match="rotations now"):
        rhtcomm.all_reduce(x, codec, KEY, communicator, rotations=1 + rank % 2)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_rank_that_needs_more_is_heard_by_all(world_size: int, ranks: Ranks) -> None:
    first, *others = ranks.run(reduce_auto, world_size)
    for other in others:
        for (wanted, x), (other_wanted, y) in zip(first, other, strict=True):
            assert wanted == other_wanted
            assert torch.equal(x, y)


def reduce_auto_by_nodes(rank: int, world_size: int) -> list[int | None]:
    """Two calls for each of three tensors over 2 nodes x 2 ranks, the second as the first wants."""
    communicator = two_levels(rank, 2, 2)
    codec, wanted = Codec(QuicFL(4), "auto"), []
    spiky = gaussian(8 * 4096, rank)
    spiky[:4096] = 100 * NEEDS_TWO  # in the shard of place 0 alone
    for x in (spiky, gaussian(8 * 4096, rank), gaussian(4096, rank)):  # of one block: none for 0
        rotations = None
        for step in range(2):
            rotations = rhtcomm.all_reduce(
                x.clone(), codec, Key(0, step), communicator, min_numel=0, rotations=rotations
            ).wanted_rotations
            wanted.append(rotations)
    return wanted


def test_all_places_of_a_node_want_alike(ranks: Ranks) -> None:
    assert ranks.run(reduce_auto_by_nodes, 4) == [[2, 2, 1, 1, 1, 1]] * 4


class Table(torch.nn.Module):
    """Parameters whose gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(5, 4096))
        self.other = torch.nn.Parameter(torch.zeros(5, 4096))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum() + (self.other * x.flip(0)).sum()


def train_auto(rank: int, world_size: int) -> None:
    state = RHTState(bits=4, rotations="auto", min_numel=0, warmup_steps=0)
    model = DistributedDataParallel(Table(), bucket_cap_mb=0.01)
    model.register_comm_hook(state, rht_hook)

    def step(x: torch.Tensor) -> None:
        model.zero_grad()
        model(x).backward()

    ordinary = gaussian(5 * 4096, rank).view(5, 4096)
    for _ in range(5):
        step(ordinary)
    # Step 1 has its buckets as DDP first makes them, step 2 as they stay; then the wish counts.
    taken = state.stats().rotations
    assert taken[1] == 3 * 2
    assert taken[2] in (3, 4)
    assert taken[3] == 0
    # One rank is enough, from the next step on; and it can be over again.
    odd = torch.stack([NEEDS_TWO] * 5) if rank == 1 else ordinary
    for x, ones, twos in ((odd, 2, 0), (odd, 0, 2), (ordinary, 0, 2), (ordinary, 2, 0)):
        before = state.stats().rotations
        step(x)
        after = state.stats().rotations
        assert (after[1] - before[1], after[2] - before[2]) == (ones, twos)
    saved = state.state_dict()
    # Besides, the bucket of the first step, which held the whole model.
    assert [bucket for bucket in saved["rotations"] if bucket[1] == 20480] == [
        [0, 20480, 1],
        [1, 20480, 1],
    ]
    step(ordinary)
    expected = model.module.weight.grad
    state.load_state_dict(saved)
    step(ordinary)
    assert torch.equal(model.module.weight.grad, expected)
    assert state.stats().rotations[1] == after[1] + 4
    state.close()
    # A fixed number goes on from a state that "auto" saved.
    fixed = RHTState(bits=4, rotations=2, min_numel=0, warmup_steps=0)
    model = DistributedDataParallel(Table(), bucket_cap_mb=0.01)
    model.register_comm_hook(fixed, rht_hook)
    fixed.load_state_dict({**saved, "rotations": [[0, 40960, 1]]})  # as the first step's bucket is
    step(ordinary)
    assert fixed.stats().rotations[1] == 0
    fixed.close()


def test_the_hook_settles_and_follows(ranks: Ranks) -> None:
    ranks.run(train_auto, 2)
