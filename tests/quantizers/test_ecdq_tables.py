"""ECDQ's shipped tables: made again, and checked by quadrature of the scheme itself."""

import math
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rhtcomm import ECDQ, codebooks
from rhtcomm.codebooks import ecdq

FloatArray = npt.NDArray[np.float64]
# Errors of the ideal code with C = 4, without a margin and without lanes' states.
IDEAL = {1: 0.57104, 1.5: 0.21936, 2: 0.09824, 2.5: 0.04668, 3: 0.02278, 4: 0.00559, 5: 0.00139}


def test_script_remakes_the_shipped_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ecdq", "--out", str(tmp_path / "made.npz")])
    ecdq.main()
    shipped = Path(ecdq.__file__).with_name("ecdq.npz")
    assert (tmp_path / "made.npz").read_bytes() == shipped.read_bytes()
    assert "| 2.5 | 4 | 11 | 7 |" in capsys.readouterr().out
    names = {f"b{bits:g}{end}" for bits in ecdq.BITS for end in ("", "/unit")}
    assert set(codebooks.load("ecdq")) == names


def lengths(bits: float, step: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """z (n,), weights of N(0, 1) (n,), lengths of codes (n, dithers): by counting, no formula."""
    table = ECDQ(bits).table
    z = np.linspace(-5, 5, 4001)
    weight = np.exp(-z * z / 2)
    v = (np.arange(512) + 0.5) / 512
    k = np.floor(z[:, None] / step + v).astype(int).clip(-table.largest, table.largest)
    row = (v * table.classes).astype(int)
    frequency = table.frequencies[row[None], k + table.largest]
    return z, weight / weight.sum(), table.precision - np.log2(frequency)


@pytest.mark.parametrize("bits", ecdq.BITS)
def test_codes_have_the_mean_and_deviation_that_units_are_made_for(bits: float) -> None:
    table = ECDQ(bits).table
    z, weight, length = lengths(bits, table.step / 2**16)
    mean = float((weight[:, None] * length).sum() / 512)
    assert mean * 2**16 == pytest.approx(table.rate, abs=0.0005 * 2**16)
    slope = float((weight * (z * z - 1)) @ length.mean(axis=1)) / 2
    rest = length - mean - slope * (z * z - 1)[:, None]
    deviation = math.sqrt(float((weight[:, None] * rest**2).sum() / 512))
    assert 2 * 256 * deviation == pytest.approx(table.spread, rel=0.03, abs=2)
    # All of 2^16 b bits are used: scales, states, two deviations and the codes.
    assert 512 + 1024 + table.spread + table.rate == bits * 2**16


@pytest.mark.parametrize("bits", ecdq.BITS)
def test_tables_are_those_of_a_coder(bits: float) -> None:
    table = ECDQ(bits).table
    frequencies = table.frequencies
    total = 1 << table.precision
    assert (frequencies >= 1).all()
    assert (frequencies < total).all(), "a symbol of all slots would need no bits, and 33 for x"
    assert (frequencies.sum(axis=1) == total).all()
    assert table.classes * total == 1 << 13
    # Dithers v and 1 - v are mirror images, up to how ties are broken.
    mirrored = frequencies[::-1, ::-1]
    assert np.abs(frequencies - mirrored).max() <= 1
    assert table.largest * table.step >= 5 * 2**16
    # Every slot has its symbol, and a symbol its slots.
    symbols = (table.slots >> 24).reshape(table.classes, total)
    for row in range(table.classes):
        counts = np.bincount(symbols[row], minlength=frequencies.shape[1])
        assert np.array_equal(counts, frequencies[row])
        assert (np.diff(symbols[row]) >= 0).all()


@pytest.mark.parametrize("bits", IDEAL)
def test_errors_are_close_to_those_of_the_ideal_code(bits: float) -> None:
    """Overhead: 0.0234 bits for scales and states, and two deviations; a bit is worth 6 to 8 dB."""
    assert ECDQ(bits).vnmse < 1.05 * IDEAL[bits]


def test_bits_without_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not 2\.1"):
        ecdq.solve(2.1)
