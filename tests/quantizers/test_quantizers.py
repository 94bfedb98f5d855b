"""QUIC-FL and EDEN against literal float64 versions of what their docstrings say."""

import math
from dataclasses import FrozenInstanceError
from typing import NamedTuple

import numpy as np
import pytest
import torch
from problems import BITS, QUANTIZERS, ROUNDOFF, FloatArray, gaussian

from rhtcomm import Eden, Key, QuicFL, codebooks
from rhtcomm.quantizers import quic_fl
from rhtcomm.quantizers.base import root_mean_square, tree_sum
from rhtcomm.randomness import dither, stratum

KEY = Key(seed=21, step=22, bucket=23)
CPU = torch.device("cpu")
BLOCKS, SIZE = 16, 2048


class Levels(NamedTuple):
    """QUIC-FL's levels r as receivers see them, and what follows from them."""

    r: FloatArray  # (N,)
    share: int  # H
    averages: FloatArray  # A_i (N - H + 1,)

    @property
    def bound(self) -> float:
        return float(self.averages[-1])

    @property
    def spans(self) -> FloatArray:
        """r_(i+H) - r_i = H (A_(i+1) - A_i), the step of the code between A_i and A_(i+1)."""
        return self.r[self.share :] - self.r[: -self.share]

    def cell(self, z: FloatArray) -> tuple[np.ndarray, FloatArray]:
        """i with A_i <= z <= A_(i+1), and (z - A_i) / (A_(i+1) - A_i)."""
        i = np.searchsorted(self.averages, z, side="right") - 1
        i = np.clip(i, 0, len(self.averages) - 2)
        return i, (z - self.averages[i]) / (self.averages[i + 1] - self.averages[i])


def levels_of(bits: int) -> Levels:
    r = codebooks.load("quic_fl")[f"b{bits}"].astype(np.float32).astype(np.float64)
    share = len(r) >> bits
    windows = np.lib.stride_tricks.sliding_window_view(r, share)
    return Levels(r, share, windows.mean(axis=1))


def rotated_blocks() -> torch.Tensor:
    """Gaussian blocks of many scales; two have a coordinate beyond 5 sigma."""
    y = gaussian(BLOCKS * SIZE).view(BLOCKS, SIZE)
    y[0, 7], y[1, 9] = 80.0, -6.5 * float(y[1].square().mean().sqrt())
    return y * torch.exp2(torch.linspace(-20, 20, BLOCKS))[:, None]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3)])
def test_quic_fl_encodes_by_its_scheme(bits: int, rank: int, world_size: int) -> None:
    offset, y = 3 * SIZE, rotated_blocks()
    quantizer, levels = QuicFL(bits), levels_of(bits)
    codes, scale = quantizer.encode(y, KEY, offset, rank, world_size)
    assert codes.dtype == torch.uint8
    assert scale.dtype == torch.float32
    rows = y.double().numpy()
    magnitudes = np.abs(rows).max(axis=1)
    exact_scale = np.maximum(np.sqrt((rows**2).mean(axis=1)), magnitudes / levels.bound)
    # The square sum of d positive terms rounds log2(d) + 2 times; 2^-20 is the documented hair.
    np.testing.assert_allclose(scale.numpy(), exact_scale, rtol=16 * ROUNDOFF + 2**-20)
    assert (magnitudes <= levels.bound * scale.double().numpy()).all()

    z = (rows / scale.double().numpy()[:, None]).ravel()
    u, v = (
        part.double().numpy() / 65536
        for part in dither(KEY, offset, y.numel(), stratum(rank, world_size), CPU)
    )
    nodes = quantizer.table.nodes
    place = (z + levels.bound) / (2 * levels.bound) * nodes
    # y times a rounded factor, cut to 2^-16 of a node.
    blur = 2**-16 + 4 * ROUNDOFF * np.abs(place - nodes / 2)
    node = np.floor(place + u)
    i, fraction = levels.cell((2 * node / nodes - 1) * levels.bound)
    g = np.floor(levels.share * v)
    private = levels.share * v - g  # the randomness that the receiver does not see
    w = i + (private >= 1 - fraction)
    h = levels.share - 1 - g
    # The x with w <= x H + h < w + H is unique.
    candidates = np.arange(1 << bits)[:, None] * levels.share + h
    fits = (w <= candidates) & (candidates < w + levels.share)
    assert (fits.sum(axis=0) == 1).all()
    x = fits.argmax(axis=0)

    # Only those may differ that lie on an edge, as far as the table's 16 bits and float32 can tell.
    fractional = (place + u) % 1
    edge = (np.minimum(fractional, 1 - fractional) <= blur) | (
        np.abs(private - (1 - fraction)) <= levels.share * 2**-17 * 1.01
    )
    assert edge.mean() < 0.02
    found = codes.long().numpy().ravel()
    np.testing.assert_array_equal(found[~edge], x[~edge])
    assert np.abs(found - x).max() <= 1

    values = quantizer.decode(codes, KEY, offset, rank, world_size)
    assert values.shape == y.shape
    level = levels.r[(found * levels.share + h).astype(int)]
    np.testing.assert_array_equal(values.double().numpy().ravel(), level)


@pytest.mark.parametrize("bits", BITS)
def test_quic_fl_is_unbiased_given_z(bits: int) -> None:
    """All 65536 v and all 65536 u of each z, by the integer arithmetic of encode and decode."""
    table, levels = QuicFL(bits).table, levels_of(bits)
    everything = torch.arange(65536, dtype=torch.int32)
    z = torch.cat([gaussian(24, bits), torch.linspace(-1, 1, 17) * levels.bound * (1 - 2**-20)])
    for value, scaled in zip(z.tolist(), (z * table.nodes_per_sigma).int().tolist(), strict=True):
        node, times = ((scaled + everything + table.middle) >> 16).unique(return_counts=True)
        assert len(node) <= 2
        mean = 0.0
        for position, share in zip(table.position_of(node).tolist(), times / 65536, strict=True):
            codes = (position + everything) >> 16
            assert 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits
            index = (codes << table.shared_bits) | (everything >> (16 - table.shared_bits))
            mean += float(share) * float(table.level_of(index).double().mean())
        # The positions are rounded to 2^-17 of a code's step, z to 2^-16 of a node, in float32.
        i, _ = levels.cell(np.array(value))
        step = levels.spans[max(0, i - 2) : i + 3].max()
        distance = 2 * levels.bound / table.nodes
        tolerance = 2**-17 * step + 2**-16 * distance + 2 * ROUNDOFF * abs(value)
        assert abs(mean - value) <= tolerance


@pytest.mark.parametrize("bits", BITS)
def test_quic_fl_table_is_odd_and_within_reach(bits: int) -> None:
    """The last node must give the last code and no index may leave its table."""
    table, levels = QuicFL(bits).table, levels_of(bits)
    last = 65536 * ((1 << bits) - 1)
    positions = torch.from_numpy(table.positions)
    assert positions[0] == 0
    assert positions[-1] == last
    assert torch.equal(positions.flip(0), last - positions)
    assert bool((positions.diff() > 0).all())
    assert table.levels.shape == (1 << bits + table.shared_bits,)
    assert table.inverse_bound * levels.bound > 1
    assert levels.bound == pytest.approx(5, abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_quic_fl_carries_the_largest_coordinates(bits: int) -> None:
    """z at the very ends, whatever the dither: codes must not wrap around."""
    quantizer, levels = QuicFL(bits), levels_of(bits)
    y = gaussian(64 * SIZE, 5).view(64, SIZE)
    y[:, ::2], y[:, 1::2] = 1.0, -1.0
    y[:, 4:] *= 1e-4  # so the first four lie far beyond 5 sigma and decide the scale
    y *= torch.exp2(gaussian(64, 6))[:, None]  # so that the reciprocals round in many ways
    codes, scale = quantizer.encode(y, KEY, 0, 0, 1)
    assert torch.allclose(scale * levels.bound, y[:, 0], rtol=2**-19)
    ends = quantizer.decode(codes, KEY, 0, 0, 1)[:, :4] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert float((ends - levels.bound).abs().max()) <= levels.spans[-2:].max() * 1.001


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("spikes", [[1.0], [1.0, -0.9], [-1.0, 0.3, 0.01]])
def test_quic_fl_overflow_is_scaled_down_and_unbiased(bits: int, spikes: list[float]) -> None:
    blocks, size = 2000, 1024
    row = torch.zeros(size)
    row[: len(spikes)] = torch.tensor(spikes)
    y = row.expand(blocks, size).contiguous()
    quantizer = QuicFL(bits)
    codes, scale = quantizer.encode(y, KEY, 0, 0, 1)
    assert torch.allclose(scale, torch.tensor(0.2), rtol=2**-19)
    decoded = quantizer.decode(codes, KEY, 0, 0, 1).double() * scale.double()[:, None]
    mean, variance = decoded.mean(dim=0), decoded.var(dim=0)
    # chi^2 of the coordinates' errors, and no single one far off.
    statistic = (mean - row).square() / (variance / blocks)
    assert abs(float(statistic.sum()) - size) < 5 * math.sqrt(2 * size)
    assert float(statistic.max()) < 6**2


def test_quic_fl_decodes_by_what_receivers_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and the top byte of v; not u, nor the rest of v."""
    codes = torch.randint(0, 256, (4, 256), dtype=torch.uint8)
    for bits in BITS:
        few = codes >> (8 - bits)
        quantizer = QuicFL(bits)
        expected = quantizer.decode(few, KEY, 512, 1, 3)

        def scrambled(
            key: Key, offset: int, count: int, stratum: int, device: torch.device
        ) -> tuple[torch.Tensor, torch.Tensor]:
            _, v = dither(key, offset, count, stratum, device)
            noise = torch.randint_like(v, 256)
            return torch.randint_like(v, 65536), (v & 0xFF00) | noise

        with monkeypatch.context() as patch:
            patch.setattr(quic_fl, "dither", scrambled)
            assert torch.equal(quantizer.decode(few, KEY, 512, 1, 3), expected)


@pytest.mark.parametrize("bits", BITS)
def test_eden_takes_the_nearest_centroid_and_its_scale(bits: int) -> None:
    y = rotated_blocks()
    quantizer = Eden(bits)
    codes, scale = quantizer.encode(y, KEY, 0, 0, 1)
    assert codes.dtype == torch.uint8
    assert scale.dtype == torch.float32
    centroids = codebooks.load("lloyd_max")[f"b{bits}"]
    rows = y.double().numpy()
    z = rows / np.sqrt((rows**2).mean(axis=1))[:, None]
    distances = np.abs(z[..., None] - centroids)
    nearest = distances.argmin(axis=-1)
    best = np.partition(distances, 1, axis=-1)[..., :2]
    # z is rounded log2(d) / 2 + 4 times on its way, the boundaries once.
    edge = best[..., 1] - best[..., 0] <= 24 * ROUNDOFF * (1 + np.abs(z))
    assert edge.mean() < 1e-3
    np.testing.assert_array_equal(codes.numpy()[~edge], nearest[~edge])

    values = quantizer.decode(codes, KEY, 0, 0, 1).double().numpy()
    np.testing.assert_array_equal(values, centroids.astype(np.float32)[codes.numpy()])
    # Sums of d terms of one sign round log2(d) + 2 times.
    exact = (rows**2).sum(axis=1) / (rows * values).sum(axis=1)
    np.testing.assert_allclose(scale.numpy(), exact, rtol=64 * ROUNDOFF)


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_zero_blocks_have_zero_scale(method: type[QuicFL] | type[Eden], bits: int) -> None:
    y = gaussian(3 * 256).view(3, 256)
    y[1] = 0
    quantizer = method(bits)
    codes, scale = quantizer.encode(y, KEY, 0, 0, 1)
    assert scale[1] == 0
    assert bool((scale[[0, 2]] > 0).all())
    # And nothing in the neighbours changes.
    alone, alone_scale = quantizer.encode(y[2:], KEY, 512, 0, 1)
    assert torch.equal(alone[0], codes[2])
    assert alone_scale[0] == scale[2]
    assert bool(quantizer.decode(codes, KEY, 0, 0, 1).isfinite().all())


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("exponent", [-40, -1, 3, 40])
def test_codes_do_not_depend_on_powers_of_two(
    method: type[QuicFL] | type[Eden], bits: int, exponent: int
) -> None:
    y = gaussian(4 * 256).view(4, 256)
    quantizer = method(bits)
    codes, scale = quantizer.encode(y, KEY, 0, 0, 1)
    other_codes, other_scale = quantizer.encode(y * 2.0**exponent, KEY, 0, 0, 1)
    assert torch.equal(codes, other_codes)
    assert torch.equal(scale * 2.0**exponent, other_scale)


def test_sums_run_as_a_halving_tree() -> None:
    x = gaussian(3 * 64).view(3, 64) * torch.exp2(6 * gaussian(64, 1))
    rows = []
    for row in x.numpy():
        values = list(row)
        while len(values) > 1:
            half = len(values) // 2
            values = [values[j] + values[j + half] for j in range(half)]
        rows.append(values[0])
    assert tree_sum(x).numpy().tobytes() == np.array(rows, dtype=np.float32).tobytes()
    exact = x.double().square().mean(dim=1).sqrt()
    assert torch.allclose(root_mean_square(x).double(), exact, rtol=8 * ROUNDOFF, atol=0)


@pytest.mark.parametrize("method", QUANTIZERS)
def test_quantizers_are_values(method: type[QuicFL] | type[Eden]) -> None:
    assert method(3) == method(bits=3)
    assert len({method(3), method(3), method(4)}) == 2
    with pytest.raises(FrozenInstanceError):
        method(3).bits = 4  # type: ignore[misc]


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("bits", [0, 9, -1, 100])
def test_bad_bits_raise(method: type[QuicFL] | type[Eden], bits: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{method.__name__}: bits={bits} must be 1, 2, \.\.\., 8"
    ):
        method(bits)


def test_promises_of_the_quantizers() -> None:
    assert (QuicFL.rotation, QuicFL.rotations) == ("shared", 2)
    assert (Eden.rotation, Eden.rotations) == ("per_rank", 2)
