"""The lattice: codes that are added on the way, against the formulas of its docstring."""

import math

import pytest
import torch
from groups import Alone
from harness import Ranks
from lattices import Sum, magnitudes, sum_of
from libraries import variants
from problems import adversarial

import rhtcomm
from rhtcomm import Key, Lattice, PayloadError, TorchCommunicator
from rhtcomm.kernels import LatticeKernel, LatticeTask, lattice, lattice_cpu, lattice_kernel_for
from rhtcomm.kernels.lattice import pack, unpack
from rhtcomm.randomness import Stream, dither, signs
from rhtcomm.reduce.split import split_into_chunks

CPU = torch.device("cpu")


def fastest(lattice_: Lattice, xs: list[torch.Tensor], key: Key) -> Sum:
    return sum_of(lattice_, xs, key, kernel=lattice_kernel_for(CPU))


def expected_error(lattice_: Lattice, found: Sum, n: int) -> float:
    """The sum of D^2 / 12 / n over whole blocks."""
    steps = 2 * magnitudes(found.bounds) / (2**lattice_.bits - 1)
    size = lattice_.block
    return float((steps.square() / size**lattice_.rotations / 12 / n).sum()) * size


def kernels() -> dict[str, LatticeKernel]:
    found = {name: lattice_cpu.of(library) for name, library in variants().items()}
    return {"reference": lattice, **found}  # type: ignore[dict-item]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_error_is_that_of_subtractive_dither(bits: int, n: int) -> None:
    # 2^20 uniform errors: their squares have a relative standard error of 0.1%. On a grid so coarse
    # that all ranks fall into the same cell, stratified dither does better still.
    lattice_ = Lattice(bits)
    xs = [torch.randn(1 << 20, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    found = fastest(lattice_, xs, Key(bits, step=n))
    expected = expected_error(lattice_, found, n)
    error = float((found.mean.double() - torch.stack(xs).double().mean(dim=0)).square().sum())
    assert error < 1.02 * expected
    if bits > 1 or n == 1:
        assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("problem", adversarial(4096))
@pytest.mark.parametrize("bits", [1, 4])
def test_unbiased(bits: int, problem: str) -> None:
    """N NMSE(mean of N) is the one-shot error, for any input and even one rotation."""
    x, draws = adversarial(4096)[problem], 500
    for rotations in (1, 2):
        xs = [x.repeat(draws), -2 * x.repeat(draws)]
        mean = fastest(Lattice(bits, rotations), xs, Key(7)).mean
        errors = (mean.view(draws, -1) - (xs[0] + xs[1]).view(draws, -1) / 2).double()
        one_shot = float(errors.square().sum()) / draws
        averaged = draws * float(errors.mean(dim=0).square().sum())
        assert averaged == pytest.approx(one_shot, rel=0.12)


@pytest.mark.parametrize("n", [1, 3, 4, 6])
def test_the_dither_leaves_no_bias_at_all(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the 2^16 values of v once: the mean over them is y cut to whole 2^-16 of a step."""
    size, lattice_ = 1 << 16, Lattice(4, 1, 1 << 16)
    every = torch.arange(size, dtype=torch.int32)
    monkeypatch.setattr("rhtcomm.kernels.lattice._dither", lambda *_: every.view(1, -1))
    task, kernel, key = LatticeTask(lattice_, size, n), lattice, Key(3)
    bounds, exponents = torch.zeros(2, 1, dtype=torch.int32)  # M = 1
    for y in (-1.0, -0.377, 0.0, 1e-4, 0.9999):
        words, total = torch.zeros(2, task.words, dtype=torch.int32)
        for rank in range(n):
            ys = torch.full((size,), y)
            kernel.encode(task, key, 0, rank, ys, exponents, bounds, words)
            total += words
        out = torch.empty(size)
        kernel.decode(task, key, 0, total, bounds, out)
        found = float(lattice_.rotation.rotate(out.view(1, -1), key, 0).double().mean())
        assert abs(found * lattice_.per_step - int(y * lattice_.per_step)) < 0.1


def matrices(lattice_: Lattice, key: Key, offset: int, count: int) -> torch.Tensor:
    """R d^(k/2) of adjacent blocks, (count, d, d) float64, by the definition of H."""
    size = lattice_.block
    index = torch.arange(size)
    ones = torch.tensor([bin(i).count("1") for i in range(size)])
    hadamard = 1.0 - 2 * (ones[index[:, None] & index] % 2).double()
    found = torch.eye(size, dtype=torch.float64).expand(count, size, size)
    for stream in Stream.SIGNS_1, Stream.SIGNS_2, Stream.SIGNS_3:
        if stream < lattice_.rotations:
            drawn = signs(key, stream, offset, count * size, 0, CPU).double()
            found = hadamard * drawn.view(count, 1, size) @ found
    return found


@pytest.mark.parametrize(
    ("bits", "n", "rotations", "block"), [(4, 2, 2, 256), (1, 3, 1, 64), (8, 5, 3, 128)]
)
def test_codes_and_means_are_those_of_the_formulas(
    bits: int, n: int, rotations: int, block: int
) -> None:
    """In float64, with each rank's dither by itself.

    k log2 d additions, each of which rounds by 2^-24 of its result, change |y| by at most that
    fraction e, so a coordinate by at most e |y|, in steps of D at most e sqrt(d) (2^b - 1) / 2. A
    code differs only if y is that close to its edge, or within the unit of 2^-16 that y / D is cut
    to and the 2^-21 by which D is wider.
    """
    lattice_, key, count, offset = Lattice(bits, rotations, block), Key(9, step=1), 20, 7 * 256
    generator = torch.Generator().manual_seed(n)
    xs = [torch.randn(count * block, generator=generator) * 3**r for r in range(n)]
    rotate = matrices(lattice_, key, offset, count)
    ys = torch.stack([(rotate @ x.double().view(count, block, 1))[..., 0] for x in xs])
    bound = ys.abs().amax(dim=(0, 2))
    step = (2 * bound / (2**bits - 1))[:, None]
    shared = dither(key, offset, count * block, 0, CPU)[1].view(count, block).long()
    strata = torch.tensor([65536 * rank // n for rank in range(n)])
    v = (shared + strata[:, None, None]) % 65536 / 65536
    positions = (ys + bound[:, None]) / step + v
    codes = positions.floor()
    e = rotations * math.log2(block) * 2**-24
    near = e * math.sqrt(block) * 2**bits + 2 * 2**-16 + 2**bits * 2**-21
    for name, kernel in kernels().items():
        found = sum_of(lattice_, xs, key, offset, kernel)
        words = found.words.view(n * count, -1)
        theirs = unpack(words, block, lattice_, n).view(codes.shape)
        differs = theirs != codes
        assert float((theirs - codes).abs().max()) <= 1, name
        assert bool(((positions - positions.round()).abs()[differs] < near).all()), name
        assert float(differs.double().mean()) < 4 * near, name
        assert torch.allclose(magnitudes(found.bounds), bound, rtol=e * math.sqrt(block)), name
        # (2^16 - 1) / 2^17 is the mean of the v of 16 bits.
        values = (theirs - v + (1 - 2**-16) / 2).mean(dim=0) * step - bound[:, None]
        mean = (rotate.transpose(1, 2) @ values[..., None])[..., 0] / block**rotations
        size = values.norm(dim=1) * block ** (-rotations / 2)
        tolerance = (e + e * math.sqrt(block) + 2**-21 + 8 * 2**-24) * size[:, None]
        assert bool(((found.mean.view(mean.shape) - mean).abs() < tolerance).all()), name


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_the_largest_magnitude_stay_in_their_lanes(bits: int) -> None:
    """y = M and y = -M, for mantissas of all kinds: no rounding takes them out of 0 .. 2^b - 1."""
    lattice_, count = Lattice(bits, 1, 32), 1 << 12
    generator = torch.Generator().manual_seed(bits)
    mantissas = torch.randint(0, 1 << 23, (count,), generator=generator, dtype=torch.int32)
    mantissas[:4] = torch.tensor([0, 1, (1 << 23) - 2, (1 << 23) - 1])
    largest = (mantissas | 0x3F800000).view(torch.float32)
    ys = largest[:, None].repeat(1, 32)
    ys[:, ::2] *= -1
    task = LatticeTask(lattice_, ys.numel(), 1)
    words, zeros = torch.empty(task.words, dtype=torch.int32), torch.zeros_like(mantissas)
    for name, kernel in kernels().items():
        kernel.encode(task, Key(1), 0, 0, ys.flatten(), zeros, mantissas, words)
        codes = unpack(words.view(count, -1), 32, lattice_, 1)
        assert int(codes[:, ::2].max()) <= 1, name
        assert int(codes[:, 1::2].min()) >= 2**bits - 2, name
        assert torch.equal(pack(codes, lattice_, 1).flatten(), words), name


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_rounding_takes_the_largest_magnitude_beyond_its_cell(bits: int) -> None:
    """For all mantissas of M, as the kernels compute it: else one code in 2^16 would carry."""
    largest = (torch.arange(1 << 23, dtype=torch.int32) | 0x3F800000).view(torch.float32)
    z = largest * (torch.div(1.0, largest) * Lattice(bits).per_step)
    middle = (2**bits - 1) * 32768
    assert middle - 16 < float(z.min()) <= float(z.max()) <= middle


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 64, 1000, 2**20])
@pytest.mark.parametrize("bits", range(1, 9))
def test_no_lane_carries_into_the_next(bits: int, n: int) -> None:
    lattice_, largest = Lattice(bits), 2**bits - 1
    width = lattice_.lane_bits(n)
    assert n * largest < 2**width <= 2 ** (bits + 20)
    sums = torch.tensor([[n * largest, 0, n * largest, n * largest, 1, n * largest, 0]])
    words = torch.zeros(1, lattice_.words(7, n), dtype=torch.int32)
    rest = sums.clone()
    while rest.any():  # add the ranks up as the all-reduce does: by int32 words that wrap
        share = rest.clamp(max=largest) if n <= 64 else rest
        words += pack(share, lattice_, n)
        rest -= share
    assert torch.equal(unpack(words, 7, lattice_, n), sums)


def test_too_many_ranks_for_a_word() -> None:
    with pytest.raises(ValueError, match="a word has 32; use fewer bits"):
        Lattice(8).lane_bits(2**25)


def test_odd_blocks() -> None:
    """Zeros stay zeros, a block with inf is NaN, and extreme finite values survive."""
    lattice_, key = Lattice(4, block=64), Key(1)
    x = torch.randn(64 * 5, generator=torch.Generator().manual_seed(1))
    x[:64], x[64], x[65] = 0, torch.inf, torch.nan
    x[128:192] *= 1e38
    x[192:256] *= 1e-38
    x[256:] *= 1e-42
    x.clamp_(-3e38, 3e38)[64] = torch.inf
    for name, kernel in kernels().items():
        for xs in ([x, x], [x, x.nan_to_num(0) * 0], [x * 0.1]):
            mean = sum_of(lattice_, xs, key, kernel=kernel).mean
            exact = torch.stack(xs).double().mean(dim=0)
            assert bool((mean[:64] == 0).all()), name
            assert bool(mean[64:128].isnan().all()), name
            for rows in (slice(128, 192), slice(192, 256), slice(256, 320)):
                scale = exact[rows].abs().amax()
                error = float(((mean[rows] - exact[rows]) / scale).square().mean())
                assert error < (0.03 if rows.start == 256 else 0.02), name


def test_ranks_of_very_different_magnitudes() -> None:
    """The grid is that of the largest; what is 2^250 times smaller is lost, but breaks nothing."""
    lattice_, key = Lattice(8, block=64), Key(1)
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for name, kernel in kernels().items():
        mean = sum_of(lattice_, [x * 1e38, x * 1e-38, x * 1e-42], key, kernel=kernel).mean
        exact = x.double() * 1e38 / 3
        assert float((mean - exact).norm() / exact.norm()) < 0.01, name


@pytest.mark.parametrize("arguments", [{"bits": 0}, {"bits": 9}, {"block": 48}, {"rotations": 4}])
def test_arguments_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        Lattice(**arguments)


# Over a network ----------------------------------------------------------------------------------

BITS = 4
SMALL = 70_000


def numel_of(world_size: int) -> int:
    """Two chunks, and a tail."""
    return 2 * world_size * (1 << 18) + 5000


def inputs(rank: int, world_size: int) -> list[tuple[Lattice, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    whole = torch.randn(numel_of(world_size), generator=generator)
    return [
        (Lattice(BITS), whole[:SMALL]),
        (Lattice(BITS, block=512), whole),
        (Lattice(BITS), whole[: 17 * 4096].bfloat16()),
    ]


def reduce_on_rank(rank: int, world_size: int) -> tuple[list[torch.Tensor], int]:
    communicator = TorchCommunicator()
    means, sent = [], []
    for lattice_, x in inputs(rank, world_size):
        mean = x.clone()
        rhtcomm.all_reduce(mean, lattice_, Key(5), communicator, check=False)
        means.append(mean)
        sent.append(communicator.bytes_sent)
    with pytest.raises(ValueError, match="a Lattice has none"):
        rhtcomm.all_reduce(mean, Lattice(BITS), Key(5), communicator, algorithm="two_shot")
    return means, sent[0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_end_with_the_simulated_bits(world_size: int, ranks: Ranks) -> None:
    results = ranks.run(reduce_on_rank, world_size)
    of_ranks = [inputs(rank, world_size) for rank in range(world_size)]
    for i, (lattice_, x) in enumerate(of_ranks[0]):
        chunks = split_into_chunks(x.numel(), lattice_.block, world_size)
        assert len(chunks) == (1, 2, 1)[i]
        parts = [
            sum_of(
                lattice_,
                [tensors[i][1][chunk] for tensors in of_ranks],
                Key(5),
                chunk.start,
                lattice_kernel_for(CPU),
            ).mean
            for chunk in chunks
        ]
        for means, _ in results:
            assert torch.equal(means[i], torch.cat(parts))
    # 2 (n - 1) / n of the words, and of an int32 per block and four more.
    lattice_ = Lattice(BITS)
    task = LatticeTask(lattice_, SMALL, world_size)
    sent = 2 * (world_size - 1) / world_size * 4 * (task.words + task.blocks + 4)
    assert results[0][1] == pytest.approx(sent, abs=2)


def reduce_out_of_step(rank: int, world_size: int) -> torch.Tensor:
    x = torch.randn(70_000, generator=torch.Generator().manual_seed(rank))
    odd = rank == 1
    for lattice_, key in ((Lattice(4), Key(5, step=odd)), (Lattice(4 - odd), Key(5))):
        with pytest.raises(PayloadError, match="out of step or configured differently"):
            rhtcomm.all_reduce(x.clone(), lattice_, key, TorchCommunicator(), check=False)
    rhtcomm.all_reduce(x, Lattice(4), Key(5), TorchCommunicator(), check=False)
    return x


def test_a_rank_out_of_step_is_found_on_every_rank(ranks: Ranks) -> None:
    means = ranks.run(reduce_out_of_step, 3)
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_rotations_are_those_of_the_lattice() -> None:
    with pytest.raises(ValueError, match="made with rotations=2; leave out rotations"):
        rhtcomm.all_reduce(torch.ones(100), Lattice(4), Key(5), Alone(), rotations=3, check=False)
