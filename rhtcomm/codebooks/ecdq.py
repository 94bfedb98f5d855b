"""Solver for ECDQ's tables: `python -m rhtcomm.codebooks.ecdq`.

ECDQ (Ziv, IEEE Trans. Inf. Theory 31, 1985; Zamir and Feder, 38, 1992) quantizes z ~ N(0, 1) on a
grid of step D with a dither v, uniform on [0, 1), that sender and receiver share:

    k = floor(z / D + v),    z' = D (k - v + 1/2).

z' - z is uniform on [-D/2, D/2) and independent of z, so the error is D^2 / 12 for every z. k is
entropy-coded by static tables, one for each of C equal classes of v. With G(x) = x Phi(x) + phi(x),
whose derivative is the distribution function Phi of N(0, 1), and G_c(k) = G((k - c / C) D),

    P(k | class c) = C / D (G_c(k + 1) - G_(c+1)(k + 1) - G_c(k) + G_(c+1)(k)).

Probabilities become integers with sum 2^P, at least 1 for each of -K .. K, the k of |z| <= K D.

A unit of 2^16 coordinates has 2^16 b bits. The scales of its 16 blocks take 512 and the last states
of its 32 lanes 1024. A margin of two standard deviations, 2 2^8 sigma, is subtracted as well. D is
the finest step whose mean code length L fits into the rest. sigma^2 is the variance of the length
l(z, v) of a coordinate's code around L + beta (z^2 - 1), beta = Cov(l, z^2) / 2, since the sum of
z^2 over a block is fixed.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rhtcomm import codebooks

__all__ = ["BITS", "Table", "solve"]

BITS = tuple(quarters / 4 for quarters in range(4, 25))
UNIT = 1 << 16
_RANGE = 5.0  # least K D. P(|z| > 5) is 6e-7: one block of 4096 in 400
_OVERHEAD = 16 * 32 + 32 * 32
_DEVIATIONS = 2

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """The parameters of the code for one number of bits.

    Args:
        frequencies: (C, 2 K + 1) integers, with sum 2^P in each row; column k + K belongs to k.
        step: 2^16 D.
        rate: bits of a unit of 2^16 coordinates, less the spread and the lanes' states.
        spread: bits in addition, for a unit of that length.
    """

    frequencies: npt.NDArray[np.int64]
    step: int
    rate: int
    spread: int

    @property
    def vnmse(self) -> float:
        """D^2 / 12."""
        return (self.step / 2**16) ** 2 / 12


def classes_for(bits: float) -> tuple[int, int]:
    """C and P. All tables have 2^13 slots: with coarse steps, more classes reduce the error more
    than precision does."""
    if bits < 2:
        return 8, 10
    if bits < 3:
        return 4, 11
    return (2, 12) if bits < 5 else (1, 13)


def solve(bits: float) -> Table:
    """The finest step for which units fit.

    Args:
        bits: one of `BITS`.

    Raises:
        ValueError: bits is not one of them.
    """
    if bits not in BITS:
        raise ValueError(f"ECDQ tables are for bits 1, 1.25, ..., 6, not {bits}")
    classes, precision = classes_for(bits)
    low, high = 1 << 11, 1 << 18
    while high - low > 1:
        middle = (low + high) // 2
        _, rate, _, length = _candidate(bits, middle, classes, precision)
        low, high = (low, middle) if UNIT * length <= rate else (middle, high)
    frequencies, rate, spread, _ = _candidate(bits, high, classes, precision)
    return Table(frequencies, high, rate, spread)


def _candidate(
    bits: float, step: int, classes: int, precision: int
) -> tuple[npt.NDArray[np.int64], int, int, float]:
    """Frequencies, rate, spread and mean length of a code at a step."""
    p, squares = probabilities(step / 2**16, classes)
    frequencies = np.stack([_frequencies(row, 1 << precision) for row in p])
    lengths = precision - np.log2(frequencies)
    mean, mean_square = (p * lengths).sum() / classes, (p * lengths**2).sum() / classes
    covariance = (squares * lengths).sum() / classes - mean
    deviation = math.sqrt(mean_square - mean**2 - covariance**2 / 2)
    spread = math.ceil(_DEVIATIONS * deviation * math.isqrt(UNIT))
    return frequencies, round(UNIT * bits) - _OVERHEAD - spread, spread, float(mean)


def probabilities(step: float, classes: int) -> tuple[FloatArray, FloatArray]:
    """P(k | class) and E[z^2; k | class], each (C, 2 K + 1), of z ~ N(0, 1); step is D.

    The latter as the former, with G(x) + phi(x), the integral of Phi(x) - x phi(x), for G.
    """
    largest = math.ceil(_RANGE / step)
    k = np.arange(-largest, largest + 2)
    x = (k - np.arange(classes + 1)[:, None] / classes) * step
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    integral = x * torch.special.ndtr(torch.from_numpy(x)).numpy() + density

    def differences(of: FloatArray) -> FloatArray:
        return -np.diff(np.diff(of, axis=0), axis=1) * (classes / step)

    return differences(integral), differences(integral + density)


def _frequencies(p: FloatArray, total: int) -> npt.NDArray[np.int64]:
    """The positive integers with sum `total` that minimize the mean length -sum p log2(f / total).

    Found greedily, by single steps from the rounded numbers.
    """
    f = np.maximum(1, np.floor(p * total)).astype(np.int64)
    while f.sum() < total:
        f[np.argmax(p * np.log((f + 1) / f))] += 1
    while f.sum() > total:
        loss = np.where(f > 1, p * np.log(f / np.maximum(f - 1, 1)), math.inf)
        f[np.argmin(loss)] -= 1
    return f


def arrays_of(bits: float, table: Table) -> dict[str, npt.NDArray[np.int32]]:
    """The entries of the .npz file."""
    return {
        f"b{bits:g}": table.frequencies.astype(np.int32),
        f"b{bits:g}/unit": np.array([table.step, table.rate, table.spread], np.int32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Solve for ECDQ's tables and write them.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("ecdq.npz"),
        help="the .npz file to write (default: the shipped one)",
    )
    args = parser.parse_args()
    arrays: dict[str, npt.NDArray[np.int32]] = {}
    print("| b | C | P | K | D | expected vNMSE |\n|---|---|---|---|---|---|")
    for bits in BITS:
        table = solve(bits)
        arrays |= arrays_of(bits, table)
        classes, precision = classes_for(bits)
        largest = table.frequencies.shape[1] // 2
        step = table.step / 2**16
        print(
            f"| {bits:g} | {classes} | {precision} | {largest} | {step:.5g} | {table.vnmse:.5g} |"
        )
    codebooks.save(args.out, arrays)


if __name__ == "__main__":
    main()
