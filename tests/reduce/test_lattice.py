"""The lattice: codes that are added on the way, against the formulas of its docstring."""

import pytest
import torch
from groups import Alone
from harness import Ranks
from problems import adversarial

import rhtcomm
from rhtcomm import Key, Lattice, PayloadError, TorchCommunicator


def simulate(lattice: Lattice, xs: list[torch.Tensor], key: Key) -> tuple[torch.Tensor, float]:
    """Mean over ranks in one process, and the squared error that D^2 / 12 / n predicts."""
    means, expected = [], 0.0
    n = len(xs)
    for part in lattice.blocks(xs[0].numel()):
        ys = [lattice.rotate(x[part.offset : part.stop], key, part) for x in xs]
        bound = torch.stack([y.abs().amax(dim=1) for y in ys]).amax(dim=0)
        total = sum(lattice.codes(y, bound, key, part.offset, rank, n) for rank, y in enumerate(ys))
        assert isinstance(total, torch.Tensor)
        means.append(lattice.mean(total, bound, key, part, n).flatten())
        step = 2 * bound / (2**lattice.bits - 1)
        expected += float((step**2 / 12 / n).sum()) * part.size
    return torch.cat(means)[: xs[0].numel()], expected


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_error_is_that_of_subtractive_dither(bits: int, n: int) -> None:
    # 2^20 uniform errors: their squares have a relative standard error of 0.1%. On a grid so coarse
    # that all ranks fall into the same cell, stratified dither does better still.
    lattice = Lattice(bits)
    xs = [torch.randn(1 << 20, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    mean, expected = simulate(lattice, xs, Key(bits, step=n))
    error = float((mean.double() - torch.stack(xs).double().mean(dim=0)).square().sum())
    assert error < 1.02 * expected
    if bits > 1 or n == 1:
        assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("problem", adversarial(4096))
@pytest.mark.parametrize("bits", [1, 4])
def test_unbiased(bits: int, problem: str) -> None:
    """N NMSE(mean of N) is the one-shot error, for any input and even one rotation."""
    x, draws = adversarial(4096)[problem], 500
    for rotations in (1, 2):
        lattice = Lattice(bits, rotations)
        xs = [x.repeat(draws), -2 * x.repeat(draws)]
        mean, _ = simulate(lattice, xs, Key(7))
        errors = (mean.view(draws, -1) - (xs[0] + xs[1]).view(draws, -1) / 2).double()
        one_shot = float(errors.square().sum()) / draws
        averaged = draws * float(errors.mean(dim=0).square().sum())
        assert averaged == pytest.approx(one_shot, rel=0.12)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 64, 1000, 2**20])
@pytest.mark.parametrize("bits", range(1, 9))
def test_no_lane_carries_into_the_next(bits: int, n: int) -> None:
    lattice, largest = Lattice(bits), 2**bits - 1
    width = lattice.lane_bits(n)
    assert n * largest < 2**width <= 2 ** (bits + 20)
    sums = torch.tensor([n * largest, 0, n * largest, n * largest, 1, n * largest, 0])
    words = torch.zeros(-(-sums.numel() // (32 // width)), dtype=torch.int32)
    rest = sums.clone()
    while rest.any():  # add the ranks up as the all-reduce does: by int32 words that wrap
        share = rest.clamp(max=largest) if n <= 64 else rest
        words += lattice.pack(share, n)
        rest -= share
    assert torch.equal(lattice.unpack(words, sums.numel(), n), sums)


def test_too_many_ranks_for_a_word() -> None:
    with pytest.raises(ValueError, match="a word has 32; use fewer bits"):
        Lattice(8).lane_bits(2**25)


def test_odd_blocks() -> None:
    """Zeros stay zeros, a block with inf is NaN, and extreme finite values survive."""
    lattice, key = Lattice(4, block=64), Key(1)
    x = torch.randn(64 * 4)
    x[:64], x[64] = 0, torch.inf
    x[128:192] *= 1e38
    x[192:] *= 1e-38
    x.clamp_(-3e38, 3e38)[64] = torch.inf
    mean, _ = simulate(lattice, [x, x], key)
    assert bool((mean[:64] == 0).all())
    assert bool(mean[64:128].isnan().all())
    for rows in (slice(128, 192), slice(192, 256)):
        scale = x[rows].abs().amax()
        assert float(((mean[rows] - x[rows]) / scale).square().mean()) < 0.02


@pytest.mark.parametrize("arguments", [{"bits": 0}, {"bits": 9}, {"block": 48}, {"rotations": 4}])
def test_arguments_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        Lattice(**arguments)


def reduce_on_rank(rank: int, world_size: int, bits: int) -> tuple[torch.Tensor, int]:
    communicator = TorchCommunicator()
    x = torch.randn(70_000, generator=torch.Generator().manual_seed(rank))
    rhtcomm.all_reduce(x, Lattice(bits), Key(5), communicator, check=False)
    sent = communicator.bytes_sent
    with pytest.raises(ValueError, match="a Lattice has none"):
        rhtcomm.all_reduce(x, Lattice(bits), Key(5), communicator, algorithm="two_shot")
    return x, sent


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_end_with_the_simulated_bits(world_size: int, ranks: Ranks) -> None:
    bits = 4
    results = ranks.run(reduce_on_rank, world_size, bits)
    xs = [
        torch.randn(70_000, generator=torch.Generator().manual_seed(r)) for r in range(world_size)
    ]
    expected, _ = simulate(Lattice(bits), xs, Key(5))
    for mean, _ in results:
        assert torch.equal(mean, expected)
    # 2 (n - 1) / n of the words, and of one float64 per block and two more.
    lattice = Lattice(bits)
    coordinates = sum(part.count * part.size for part in lattice.blocks(70_000))
    blocks = sum(part.count for part in lattice.blocks(70_000))
    words = -(-coordinates // (32 // lattice.lane_bits(world_size)))
    sent = 2 * (world_size - 1) / world_size * (4 * words + 8 * blocks + 16)
    assert results[0][1] == pytest.approx(sent, rel=0.01)


def reduce_out_of_step(rank: int, world_size: int) -> torch.Tensor:
    x = torch.randn(70_000, generator=torch.Generator().manual_seed(rank))
    odd = rank == 1
    for lattice, key in ((Lattice(4), Key(5, step=odd)), (Lattice(4 - odd), Key(5))):
        with pytest.raises(PayloadError, match="out of step or configured differently"):
            rhtcomm.all_reduce(x.clone(), lattice, key, TorchCommunicator(), check=False)
    rhtcomm.all_reduce(x, Lattice(4), Key(5), TorchCommunicator(), check=False)
    return x


def test_a_rank_out_of_step_is_found_on_every_rank(ranks: Ranks) -> None:
    means = ranks.run(reduce_out_of_step, 3)
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_rotations_are_those_of_the_lattice() -> None:
    with pytest.raises(ValueError, match="made with rotations=2; leave out rotations"):
        rhtcomm.all_reduce(torch.ones(100), Lattice(4), Key(5), Alone(), rotations=3, check=False)
