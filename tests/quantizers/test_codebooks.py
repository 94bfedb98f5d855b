"""The shipped tables: regenerated, and checked against quadrature of the schemes themselves."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rhtcomm import codebooks
from rhtcomm.codebooks import lloyd_max, quic_fl, vector

FloatArray = npt.NDArray[np.float64]

# EDEN's vNMSE D / (1 - D), each with the digits that are certain.
EDEN_VNMSE = {
    1: "0.570796",
    2: "0.133121",
    3: "0.035784",
    4: "0.009592",
    5: "0.002511",
    6: "0.000645",
    7: "0.000164",
    8: "0.0000412",
}

# Solutions found from different starts differ by up to 8e-10 (QUIC-FL) and 4e-11 (Lloyd-Max).
SAME_SOLUTION = 1e-8

# Sums of magnitude 1 and of up to 4096 float64 terms: 4096 times the unit roundoff 2.2e-16.
ROUNDING = 1e-12


def density(z: FloatArray) -> FloatArray:
    return np.asarray(np.exp(-z * z / 2) / math.sqrt(2 * math.pi))


FAMILIES = pytest.mark.parametrize("family", [quic_fl.WIDE, quic_fl.EXACT], ids=lambda f: f.name)


def quic_fl_levels(family: quic_fl.Family, bits: int) -> tuple[FloatArray, int]:
    return codebooks.load(family.name)[f"b{bits}"], family.shared_bits[bits]


def window_means(levels: FloatArray, shared_bits: int) -> FloatArray:
    windows = np.lib.stride_tricks.sliding_window_view(levels, 2**shared_bits)
    return np.asarray(windows.mean(axis=1))


def run_script(monkeypatch: pytest.MonkeyPatch, main: str, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", [main, *args])
    {"quic_fl": quic_fl, "lloyd_max": lloyd_max}[main].main()


@pytest.mark.parametrize(("name", "args"), [("quic_fl", ["--bits", "3", "4"]), ("lloyd_max", [])])
def test_script_remakes_the_shipped_table(
    name: str, args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = codebooks.load(name)
    run_script(monkeypatch, name, *args, "--out", str(tmp_path / "table.npz"))
    with np.load(tmp_path / "table.npz") as made:
        assert set(made) == ({f"b{bits}" for bits in args[1:]} or set(shipped))
        for key in made:
            np.testing.assert_allclose(made[key], shipped[key], rtol=0, atol=SAME_SOLUTION)


def test_script_keeps_the_shipped_table_when_it_solves_a_subset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(monkeypatch, "quic_fl", "--bits", "4")
    assert "| 4 | 4 | 5 | 0.011587 | 0.011587 |" in capsys.readouterr().out
    assert len(codebooks.load("quic_fl")) == 8


@pytest.mark.parametrize("name", ["quic_fl", "quic_fl_exact", "lloyd_max"])
def test_tables_are_complete_increasing_and_odd_symmetric(name: str) -> None:
    tables = codebooks.load(name)
    assert list(tables) == [f"b{bits}" for bits in range(1, 9)]
    for bits, table in enumerate(tables.values(), start=1):
        shared_bits = {f.name: f.shared_bits[bits] for f in (quic_fl.WIDE, quic_fl.EXACT)}
        entries_per_code = 2 ** shared_bits.get(name, 0)
        assert table.dtype == np.float64
        assert table.shape == (2**bits * entries_per_code,)
        assert (np.diff(table) > 0).all()
        np.testing.assert_array_equal(table, -table[::-1])


@FAMILIES
@pytest.mark.parametrize("bits", range(1, 9))
def test_quic_fl_spans_the_bound(family: quic_fl.Family, bits: int) -> None:
    means = window_means(*quic_fl_levels(family, bits))
    assert means[[0, -1]] == pytest.approx([-family.bound, family.bound], rel=0, abs=ROUNDING)


@FAMILIES
@pytest.mark.parametrize("bits", range(1, 9))
def test_quic_fl_scheme_is_unbiased_and_has_the_expected_vnmse(
    family: quic_fl.Family, bits: int
) -> None:
    """Quadrature over z, and the mean over every h and w, of literal encoding and decoding."""
    levels, shared_bits = quic_fl_levels(family, bits)
    shared = 2**shared_bits
    knots = window_means(levels, shared_bits)
    # Between two knots the conditional error is a parabola: Gauss-Legendre with 16 nodes, exact up
    # to degree 31, leaves 29 for the density on an interval no longer than 2.
    assert np.diff(knots).max() < 2
    nodes, weights = np.polynomial.legendre.leggauss(16)
    left, width = knots[:-1, None], np.diff(knots)[:, None]
    z = left + width * (nodes + 1) / 2  # (N - H, 16)
    weight = width * weights / 2 * density(z)
    probability_up = (z - left) / width

    mean, mean_square = np.zeros_like(z), np.zeros_like(z)
    for h in range(shared):
        for up, probability in ((0, 1 - probability_up), (1, probability_up)):
            w = np.arange(len(knots) - 1)[:, None] + up
            codes = -((h - w) // shared)  # ceil((w - h) / H)
            assert ((codes >= 0) & (codes < 2**bits)).all()
            assert ((w <= codes * shared + h) & (codes * shared + h < w + shared)).all()
            decoded = levels[codes * shared + h]
            mean += probability * decoded / shared
            mean_square += probability * decoded**2 / shared

    np.testing.assert_allclose(mean, z, rtol=0, atol=ROUNDING)
    vnmse = float((weight * (mean_square - z**2)).sum())
    assert vnmse == pytest.approx(quic_fl.expected_vnmse(levels, shared_bits), rel=0, abs=ROUNDING)
    assert vnmse == pytest.approx(family.reference_vnmse[bits], rel=1e-3)


@FAMILIES
@pytest.mark.parametrize("bits", range(1, 9))
def test_quic_fl_levels_are_a_minimum(family: quic_fl.Family, bits: int) -> None:
    levels, shared_bits = quic_fl_levels(family, bits)
    minimum = quic_fl.expected_vnmse(levels, shared_bits)
    increments = np.diff(levels)
    generator = np.random.default_rng(bits)

    def rise(change: FloatArray) -> float:
        moved = np.cumsum(np.append(0.0, increments * np.exp(change)))
        moved -= (moved[0] + moved[-1]) / 2
        moved *= family.bound / window_means(moved, shared_bits)[-1]
        return quic_fl.expected_vnmse(moved, shared_bits) - minimum

    for _ in range(10):
        noise = 1e-3 * generator.standard_normal(len(increments))
        noise += noise[::-1]
        forth, back = rise(noise), rise(-noise)
        assert min(forth, back) > ROUNDING
        # Third order over second: below 0.006 here, but above 0.03 at levels misplaced by 1e-4.
        assert abs(forth - back) < 0.02 * (forth + back)


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_has_the_expected_vnmse(bits: int) -> None:
    """Midpoint quadrature of the squared distance to the nearest centroid."""
    centroids = codebooks.load("lloyd_max")[f"b{bits}"]
    points = 2**18
    spacing = 20 / points
    z = (np.arange(points, dtype=np.float64) + 0.5) * spacing - 10
    square = np.full(points, np.inf)
    for centroid in centroids:
        np.minimum(square, (z - centroid) ** 2, out=square)
    distortion = float((square * density(z)).sum() * spacing)
    expected = lloyd_max.expected_vnmse(centroids)
    # The midpoint rule errs by at most spacing^2 / 8 for each unit by which the integrand's slope
    # varies in total, which is 4 here at most. D / (1 - D) magnifies that by up to 2.5, at 1 bit.
    assert distortion / (1 - distortion) == pytest.approx(expected, rel=0, abs=1.25 * spacing**2)
    last_digit = 10.0 ** -len(EDEN_VNMSE[bits].split(".")[1])
    assert expected == pytest.approx(float(EDEN_VNMSE[bits]), rel=0, abs=0.5 * last_digit)
    # Panter and Dite's distortion of many levels is approached from below, as 1 - O(2^-bits).
    assert 1 - 4 / 2**bits < distortion / (math.pi * math.sqrt(3) / 2 / 4**bits) < 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_vnmse_is_that_of_eden(bits: int) -> None:
    centroids = codebooks.load("lloyd_max")[f"b{bits}"]
    y = np.random.default_rng(bits).standard_normal(2**18)
    decoded = centroids[np.searchsorted((centroids[:-1] + centroids[1:]) / 2, y)]
    decoded *= y @ y / (y @ decoded)
    errors = (decoded - y) ** 2
    sampling = errors.std() / math.sqrt(len(y))
    expected = lloyd_max.expected_vnmse(centroids)
    assert errors.sum() / (y @ y) == pytest.approx(expected, rel=0, abs=4 * sampling)


def test_lloyd_max_known_values() -> None:
    tables = codebooks.load("lloyd_max")
    assert tables["b1"][1] == pytest.approx(math.sqrt(2 / math.pi), rel=1e-15)
    assert lloyd_max.expected_vnmse(tables["b1"]) == pytest.approx(math.pi / 2 - 1, rel=1e-14)
    assert tables["b2"][2:] == pytest.approx([0.4528, 1.510], rel=5e-4)  # Max 1960, table I


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_centroids_are_the_means_of_their_cells(bits: int) -> None:
    centroids = codebooks.load("lloyd_max")[f"b{bits}"]
    edges = np.concatenate(([-np.inf], (centroids[:-1] + centroids[1:]) / 2, [np.inf]))
    below = np.array([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])
    # Above 0 differences of probabilities near 1 lose precision, and symmetry covers that half.
    negative = slice(0, len(centroids) // 2)
    mass, moment = np.diff(below)[negative], -np.diff(density(edges))[negative]
    # Rounding of 1/2 in the probabilities, over the least of the masses.
    np.testing.assert_allclose(centroids[negative], moment / mass, rtol=1e-16 / mass.min(), atol=0)


@pytest.mark.parametrize("bits", vector.BITS)
def test_vector_codewords_are_the_means_of_their_cells(bits: int) -> None:
    """A fixed point of Lloyd's iteration, as far as a sample can tell."""
    half, group, samples = codebooks.load("vector")[f"b{bits}"], 8 // bits, 2**18
    words = np.concatenate([half, -half])
    norms = (words**2).sum(axis=1)
    generator = np.random.default_rng(bits)
    count, square, moment = np.zeros(128), np.zeros(128), np.zeros_like(half)
    radial: list[FloatArray] = []
    for _ in range(16):
        z = generator.standard_normal((samples // 16, group))
        found = (norms - 2 * z @ words.T).argmin(axis=1)
        off = (z - words[found]) * np.where(found < 128, 1, -1)[:, None]  # by symmetry, from c_i
        count += np.bincount(found % 128, minlength=128)
        square += np.bincount(found % 128, (off**2).sum(axis=1), minlength=128)
        np.add.at(moment, found % 128, off)
        radial.append((off * half[found % 128]).sum(axis=1))
    # n_i |mean - c_i|^2 over the mean of |z - c_i|^2 is 1 on average if c_i is the cell's mean,
    # with variance at most 2: the mean over 128 cells varies by at most 0.125. The codebook's own
    # noise, that of a training sample of 300 * 2^16, adds about 0.02.
    ratio = (moment**2).sum(axis=1) / square
    assert ratio.mean() < 1.5
    assert ratio.max() < 16  # of 128 numbers that exceed x with probability exp(-x) for g = 2
    # E<z, c> = E|c|^2, which is what expected_vnmse builds on.
    along = np.concatenate(radial)
    assert abs(along.mean()) < 4 * along.std() / math.sqrt(samples)
    # Both have a standard error of at most 2 D / samples^(1/2).
    distortion = square.sum() / samples / group
    measured = vector.distortion(torch.from_numpy(half).float(), seed=10, samples=samples)
    assert measured == pytest.approx(distortion, rel=8 * math.sqrt(2 / samples))
    gain = {1: 0.16, 2: 0.18, 4: 0.10}[bits]
    assert vector.expected_vnmse(distortion) < (1 - gain) * float(EDEN_VNMSE[bits])


def test_load_names_the_missing_table_and_the_command_that_makes_it() -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz.*`python -m rhtcomm\.codebooks\.n"):
        codebooks.load("nothing")


@pytest.mark.parametrize("arguments", [(0, 4, 5.0), (4, 0, 5.0), (4, 4, 0.0), (4, 4, math.inf)])
def test_quic_fl_solver_rejects_bad_arguments(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="QUIC-FL levels need"):
        quic_fl.solve(*arguments)


def test_lloyd_max_solver_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match="needs bits >= 1"):
        lloyd_max.solve(0)


def test_solvers_are_not_imported_at_run_time() -> None:
    program = (
        "import sys, torch, rhtcomm, rhtcomm.hooks; from rhtcomm import *; "
        "x, key = torch.ones(32), Key(0); "
        "[Codec(q, block=32).encode(x, key) for q in (QuicFL(4), Eden(4), VectorQuantizer(4))]; "
        "print(*(name for name in sys.modules if name.startswith('rhtcomm.codebooks')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["rhtcomm.codebooks"], done.stderr
