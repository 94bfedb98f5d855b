"""QUIC-FL's exact mode: few large coordinates travel as they are, in addition to the codes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from harness import Ranks
from problems import BITS, ROUNDOFF, adversarial, gaussian, generator, lognormal

import rhtcomm
from rhtcomm import Codec, Key, QuicFL, codebooks
from rhtcomm.codebooks import quic_fl as solver
from rhtcomm.hooks import RHTState
from rhtcomm.quantizers import quic_fl
from rhtcomm.reduce import DisagreementError
from rhtcomm.wire import HEADER_BYTES, PayloadError

FRACTION = 1 / 512
BOUND = 3.0972690781987844  # P(|z| > BOUND) = 1/512 for z ~ N(0, 1)
KEY = Key(seed=31, step=32, bucket=33)
BLOCK = 4096

# As expected of the levels, 1 to 8 bits, in the limit of many dimensions.
VNMSE = (1.4654, 0.21350, 0.042638, 0.0095131, 0.0022460, 0.00055218, 0.00013602, 0.000035320)


def exact(bits: int) -> QuicFL:
    return QuicFL(bits, exact_fraction=FRACTION)


def round_trip(codec: Codec, x: torch.Tensor, key: Key = KEY) -> torch.Tensor:
    return codec.decode_mean(codec.encode(x, key)[None], key, x.numel())


# ---- Levels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_levels_end_at_the_bound_and_have_the_expected_error(bits: int) -> None:
    levels = codebooks.load("quic_fl_exact")[f"b{bits}"]
    shared_bits = (6, 5, 4, 4, 4, 3, 3, 2)[bits - 1]
    assert levels.shape == (2 ** (bits + shared_bits),)
    assert (np.diff(levels) > 0).all()
    np.testing.assert_array_equal(levels, -levels[::-1])
    assert levels[-(2**shared_bits) :].mean() == pytest.approx(BOUND, rel=0, abs=1e-12)
    # The digits that the reference has.
    assert solver.expected_vnmse(levels, shared_bits) == pytest.approx(VNMSE[bits - 1], rel=5e-5)
    assert exact(bits).table.bound == pytest.approx(BOUND, rel=1e-7)


def test_script_remakes_the_shipped_table(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "table.npz"
    arguments = ["quic_fl", "--exact", "--bits", "3", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    solver.main()
    with np.load(out) as made:
        assert list(made) == ["b3"]
        # Solutions found from different starts differ by up to 8e-10.
        shipped = codebooks.load("quic_fl_exact")["b3"]
        np.testing.assert_allclose(made["b3"], shipped, rtol=0, atol=1e-8)


# ---- One block --------------------------------------------------------------------------------


def entries(section: torch.Tensor, size: int) -> list[list[tuple[int, float]]]:
    """(index, value) of each block's entries, read by another library from the format's words."""
    kind = np.dtype("<i2" if size <= 2**15 else "<i4")
    rows = []
    for row in section.numpy():
        capacity = len(row) // (kind.itemsize + 2)
        indices = np.frombuffer(row.tobytes(), kind, capacity)
        values = np.frombuffer(row.tobytes(), "<f2", capacity, capacity * kind.itemsize)
        rows.append(list(zip(indices.tolist(), values.tolist(), strict=True)))
    return rows


@pytest.mark.parametrize("size", [32, 256, 4096, 1 << 16])
@pytest.mark.parametrize("outliers", [0, 1, 10, 11, 300])
def test_section_holds_what_lies_beyond_the_bound(size: int, outliers: int) -> None:
    outliers = min(outliers, size // 16)
    y = gaussian(4 * size, size + outliers).clamp(-2, 2).view(4, size)
    for row in y:
        places = torch.randperm(size, generator=generator(size))[:outliers]
        row[places] = (4 + gaussian(outliers, 7).abs()) * gaussian(outliers, 8).sign()
    y *= torch.tensor([1e-6, 1.0, -3.0, 1e6])[:, None]
    quantizer, capacity = exact(2), exact(2).exact_capacity(size)
    codes, scale = quantizer.encode(y, KEY, 0, 1, 3)
    section = quantizer.encode_exact(y, scale, KEY, 0, 1, 3)
    assert section.shape == (4, quantizer.exact_bytes(size))
    assert quantizer.exact_bytes(size) % 4 == 0

    rows = y.double().numpy()
    magnitudes = np.abs(rows)
    largest_coded = np.sort(magnitudes, axis=1)[:, -1 - capacity]
    expected = np.maximum(np.sqrt((rows**2).mean(axis=1)), largest_coded / BOUND)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=32 * ROUNDOFF + 2**-20)

    values = quantizer.decode(codes, KEY, 0, 1, 3)
    coded = values.clone()
    quantizer.decode_exact(values, section)
    for i, row in enumerate(entries(section, size)):
        z = rows[i] / float(scale[i])
        beyond = np.flatnonzero(np.abs(z) > BOUND * (1 - 2**-22))
        assert len(beyond) <= capacity
        assert [index for index, _ in row] == [*beyond, *[-1] * (capacity - len(beyond))]
        assert row[len(beyond) :] == [(-1, 0.0)] * (capacity - len(beyond))
        for index, value in row[: len(beyond)]:
            # One of the two neighbours among the numbers of 11 significant bits.
            step = 2.0 ** (math.floor(math.log2(abs(z[index]))) - 10)
            assert abs(value - z[index]) < step * (1 + 2**-12)
            assert values[i, index] == value
        others = np.setdiff1d(np.arange(size), beyond)
        assert torch.equal(values[i, others], coded[i, others])


def test_values_are_rounded_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 13 bits of randomness, for values around the middle and the edges of float16's steps."""
    size, rows = 256, 1 << 13
    every = torch.zeros(rows, size, dtype=torch.int32)
    every[:, 5] = torch.arange(rows, dtype=torch.int32) << 3
    monkeypatch.setattr(quic_fl, "dither", lambda *_: (every.flatten(), every.flatten()))
    for value in (3.1, -3.1, 3.999, 4.0, 7.77777, 15.99999, 60.123):
        y = torch.zeros(rows, size)
        y[:, 5] = value
        scale = torch.ones(rows)
        section = exact(4).encode_exact(y, scale, KEY, 0, 0, 1)
        decoded = torch.zeros(rows, size)
        exact(4).decode_exact(decoded, section)
        mean = float(decoded[:, 5].double().mean())
        assert mean == float(y[0, 5].double())  # sums of few bits: no rounding
        assert 1 <= len(decoded[:, 5].unique()) <= 2


# ---- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("problem", [gaussian, lognormal])
def test_error_of_one_rank_is_as_tabulated(
    bits: int, problem: Callable[[int, int], torch.Tensor]
) -> None:
    codec, numel = Codec(exact(bits)), 1 << 20
    ratios = []
    for step in range({1: 8, 2: 3}.get(bits, 1)):
        x = problem(numel, 10 * bits + step)
        error = round_trip(codec, x, Key(seed=1, step=step)) - x
        norms = [part.double().square().view(-1, BLOCK).sum(dim=1) for part in (error, x)]
        ratios.append(norms[0] / norms[1])
    ratio = torch.cat(ratios)
    standard_error = float(ratio.std()) / math.sqrt(len(ratio))
    assert standard_error < 0.004 * VNMSE[bits - 1]
    # 0.5% is what blocks that overflow their capacity add, 0.15% what the nodes do.
    assert abs(float(ratio.mean()) - VNMSE[bits - 1]) < 0.015 * VNMSE[bits - 1]


@pytest.mark.parametrize("rotations", [1, 2])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize(
    "problem", ["one_hot", "two_hot", "three_unequal", "sparse", "lognormal", "walsh_row"]
)
def test_estimates_are_unbiased(problem: str, bits: int, rotations: int) -> None:
    """The NMSE of the mean of N estimates is that of one over N."""
    size, draws = 1024, 1000
    x = adversarial(size)[problem]
    codec = Codec(exact(bits), rotations, block=size)
    estimates = round_trip(codec, x.repeat(draws)).view(draws, size).double()
    norm = float(x.double().square().sum())
    one_shot = float((estimates - x).square().sum()) / draws / norm
    averaged = float((estimates.mean(dim=0) - x).square().sum()) / norm
    # The sum of squares of 1024 nearly Gaussian errors: 4.4% standard error.
    assert draws * averaged == pytest.approx(one_shot, rel=0.2)


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("outliers", [1, 2, 5, 20])
def test_quantizer_is_unbiased_given_its_input(bits: int, outliers: int) -> None:
    """No rotation, so the outliers are in known places; those beyond 2 overflow the capacity."""
    size, draws = 1024, 4000
    row = 0.1 * gaussian(size, 3)
    row[torch.arange(outliers) * 7] = torch.linspace(20, 37.7, outliers)
    quantizer, y = exact(bits), row.repeat(draws, 1)
    codes, scale = quantizer.encode(y, KEY, 0, 0, 1)
    overflows = scale[0] > 1.01 * row.square().mean().sqrt()
    assert quantizer.exact_capacity(size) == 2
    assert bool(overflows) == (outliers > 2)
    values = quantizer.decode(codes, KEY, 0, 0, 1)
    quantizer.decode_exact(values, quantizer.encode_exact(y, scale, KEY, 0, 0, 1))
    decoded = values.double() * scale.double()[:, None]
    variance = decoded.var(dim=0)
    difference = (decoded.mean(dim=0) - row).abs()
    # A value that float16 holds has no variance; the scale and z round three times in float32.
    tolerance = 6 * (variance / draws).sqrt() + 8 * ROUNDOFF * row.abs()
    assert bool((difference <= tolerance).all())
    coded = variance > 1e-4 * scale[0] ** 2
    statistic = (difference.square() * draws / variance)[coded]
    assert abs(float(statistic.mean()) - 1) < 5 * math.sqrt(2 / len(statistic))
    # The exact ones are: half a step of 11 bits.
    assert float((decoded - row).abs().amax(dim=0).sort().values[0]) <= 37.7 * 2**-10


# ---- Payloads ---------------------------------------------------------------------------------


def test_payload_is_as_long_as_documented() -> None:
    # 10 entries of 4 bytes in a block of 4096, 1 in the tail block of 256.
    numel = 2 * 4096 + 100
    assert Codec(exact(4)).nbytes(numel) - Codec(QuicFL(4)).nbytes(numel) == 2 * 40 + 4
    # 36 of 4 bytes in 2^14; from 2^16 on of 6.
    for block, length in ((1 << 14, 36 * 4), (1 << 15, 68 * 4), (1 << 16, 136 * 6)):
        assert exact(1).exact_bytes(block) == length
    for block in (32, 512, 1 << 17, 1 << 19, 1 << 24):
        assert exact(1).exact_capacity(block) >= block / 512
        assert exact(1).exact_bytes(block) % 4 == 0
    assert QuicFL(1).exact_bytes(4096) == 0
    for bits, block, numel in ((1, 32, 77), (3, 64, 1), (5, 4096, 9000), (8, 1 << 16, 70_000)):
        codec = Codec(exact(bits), block=block)
        assert codec.encode(gaussian(numel), KEY).numel() == codec.nbytes(numel)


@pytest.mark.parametrize("block", [32, 256, 4096, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_block_makes_a_round_trip(block: int, dtype: torch.dtype) -> None:
    x = gaussian(block + block // 3, block).to(dtype)
    codec = Codec(exact(8), block=block)
    assert torch.equal(codec.encode(x, KEY), codec.encode(x, KEY))
    error = round_trip(codec, x) - x.float()
    assert float(error.norm() / x.float().norm()) < 0.02


@pytest.mark.parametrize("magnitude", [1e-38, 1e-3, 1e38])
@pytest.mark.parametrize("problem", ["one_hot", "lognormal"])
def test_any_magnitude_makes_the_round_trip(problem: str, magnitude: float) -> None:
    x = adversarial(256)[problem]
    x = x / x.abs().max()
    codec = Codec(exact(8), block=256)
    error = round_trip(codec, x * magnitude).double() / magnitude - x
    assert float(error.norm() / x.norm()) < 0.03


def test_blocks_of_zeros_and_blocks_with_nan_or_inf() -> None:
    x = gaussian(4 * 256)
    x[256:512], x[600], x[900] = 0, math.nan, -math.inf
    codec = Codec(exact(4), block=256)
    payload = codec.encode(x, KEY)
    found = codec.decode_mean(payload[None], KEY, x.numel()).view(4, 256)
    assert bool(found[0].isfinite().all())
    assert bool((found[1] == 0).all())
    assert bool(found[2:].isnan().all())
    # Other non-finite values make the same bytes: what is not there has no influence.
    x[600], x[601], x[900] = math.inf, 5.0, math.nan
    assert torch.equal(codec.encode(x, KEY), payload)


@pytest.mark.parametrize("block", [32, 256, 4096, 1 << 16])
def test_any_bytes_behind_a_right_header_decode(block: int) -> None:
    codec, numel = Codec(exact(3), block=block), block + 5
    headers = torch.stack([codec.encode(gaussian(numel), KEY, rank, 2) for rank in range(2)])
    headers = headers[:, :HEADER_BYTES]
    length = codec.nbytes(numel) - HEADER_BYTES
    bodies = [
        torch.randint(0, 256, (2, length), dtype=torch.uint8, generator=generator(seed))
        for seed in range(20)
    ]
    bodies += [torch.full((2, length), value, dtype=torch.uint8) for value in (0, 0x7F, 0x80, 0xFF)]
    for body in bodies:
        found = codec.decode_mean(torch.cat([headers, body], dim=1), KEY, numel)
        assert found.shape == (numel,)
    with pytest.raises(PayloadError, match="cut short"):
        codec.decode_mean(headers, KEY, numel)


def test_entries_count_only_inside_the_block_and_in_ascending_order() -> None:
    quantizer, size = exact(4), 4096
    indices = np.array([3, 2, 3, 7, -1, 4096, 9, 32767, -5, 12], "<i2")
    counts = {3: 1.0, 7: 4.0}  # 4096 is out of the block, and larger than all after it
    values = np.arange(1, 11).astype("<f2")
    section = torch.tensor([*indices.tobytes(), *values.tobytes()], dtype=torch.uint8)[None]
    decoded = torch.full((1, size), -1.0)
    quantizer.decode_exact(decoded, section)
    expected = torch.full((1, size), -1.0)
    for index, value in counts.items():
        expected[0, index] = value
    assert torch.equal(decoded, expected)


def test_exact_fraction_is_part_of_the_configuration() -> None:
    narrow, wide = Codec(exact(4)), Codec(QuicFL(4))
    assert narrow != wide
    assert narrow.fingerprint != wide.fingerprint
    assert narrow.configuration["exact_fraction"] == FRACTION
    assert "exact_fraction" not in wide.configuration  # whose payloads stay as they were
    assert QuicFL(4, exact_fraction=0) == QuicFL(4)
    with pytest.raises(PayloadError, match="configuration or length"):
        wide.decode_mean(narrow.encode(gaussian(5000), KEY)[None], KEY, 5000)


@pytest.mark.parametrize("fraction", [0.01, 1.0, -FRACTION, math.nan])
def test_other_fractions_raise(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"exact_fraction=.* must be 0 or 1/512"):
        QuicFL(4, exact_fraction=fraction)


def test_state_passes_the_fraction_on() -> None:
    with RHTState(bits=3, exact_fraction=FRACTION) as state:
        assert state.codec.quantizer == exact(3)  # type: ignore[union-attr]
    with RHTState(bits=3) as state:
        assert state.codec.quantizer == QuicFL(3)  # type: ignore[union-attr]
    for quantizer in ("eden", "lattice"):
        with pytest.raises(ValueError, match=f"exact_fraction=.* not '{quantizer}'"):
            RHTState(quantizer=quantizer, exact_fraction=FRACTION)  # type: ignore[arg-type]


# ---- Ranks ------------------------------------------------------------------------------------


def data(rank: int) -> torch.Tensor:
    return lognormal(20_000, rank) * (1 + rank)


def test_mean_over_ranks_is_that_of_literal_receivers() -> None:
    """In float64, from each rank's payload decoded alone."""
    codec, world_size = Codec(exact(4), block=1024), 3
    payloads = torch.stack([codec.encode(data(r), KEY, r, world_size) for r in range(world_size)])
    mean = codec.decode_mean(payloads, KEY, 20_000)
    rotation = rhtcomm.RandomizedHadamard(codec.quantizer.rotations, codec.block)
    for section in codec.layout(20_000):
        blocks, (scales, rows) = section.blocks, section.views(payloads)
        total = torch.zeros(blocks.count, blocks.size, dtype=torch.float64)
        edge = blocks.size // 2
        for rank in range(world_size):
            codes = rhtcomm.bitpack.unpack(rows[rank, :, :edge], 4, blocks.size)
            values = codec.quantizer.decode(codes, KEY, blocks.offset, rank, world_size).double()
            for row, found in enumerate(entries(rows[rank, :, edge:], blocks.size)):
                for index, value in found:
                    if index >= 0:
                        values[row, index] = value
            total += values * scales[rank].double()[:, None]
        # `unrotate` leaves out the normalization.
        rotated = (total / world_size * blocks.size ** (-rotation.rotations / 2)).float()
        undone = rotation.unrotate(rotated, KEY, blocks.offset)
        part = mean[blocks.offset : blocks.stop]
        expected = undone.flatten()[: part.numel()]
        assert float((part - expected).norm()) <= 1e-5 * float(expected.norm())


def reduce(rank: int, world_size: int) -> tuple[dict[str, torch.Tensor], str]:
    communicator, codec = rhtcomm.TorchCommunicator(), Codec(exact(4))
    means = {}
    for algorithm in ("all_gather", "two_shot"):
        x = data(rank)
        rhtcomm.all_reduce(x, codec, KEY, communicator, algorithm=algorithm, min_numel=0)  # type: ignore[arg-type]
        means[algorithm] = x
    odd = Codec(QuicFL(4)) if rank else codec
    with pytest.raises(DisagreementError) as error:
        rhtcomm.all_reduce(data(rank), odd, KEY, communicator, min_numel=0)
    return means, str(error.value)


def test_ranks_end_with_the_same_bits_and_find_out_other_fractions(ranks: Ranks) -> None:
    results = ranks.run(reduce, 2)
    exact_mean = (data(0).double() + data(1).double()) / 2
    for algorithm in ("all_gather", "two_shot"):
        first, second = (means[algorithm] for means, _ in results)
        assert torch.equal(first, second)
        nmse = float((first - exact_mean).square().sum() / exact_mean.square().sum())
        assert nmse < 3 * VNMSE[3]
    codec = Codec(exact(4))
    payloads = torch.stack([codec.encode(data(rank), KEY, rank, 2) for rank in range(2)])
    assert torch.equal(results[0][0]["all_gather"], codec.decode_mean(payloads, KEY, 20_000))
    for _, message in results:
        assert "differently in exact_fraction (0.001953125 on rank 0; absent on rank 1)" in message
