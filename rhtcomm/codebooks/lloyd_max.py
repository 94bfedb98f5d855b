"""Lloyd-Max codebooks of N(0, 1): `python -m rhtcomm.codebooks.lloyd_max`.

The codebook c of 2^b centroids that minimizes D = E[(z - c(z))^2], z ~ N(0, 1), where c(z) is the
centroid nearest to z (Lloyd, IEEE Trans. Inf. Theory 1982; Max, IRE Trans. Inf. Theory 1960).
EDEN (Vargaftik et al., ICML 2022) quantizes rotated coordinates y with it, and makes the decoded
s c(y) unbiased over the rotation by the scale s = |y|^2 / <y, c(y)>.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from rhtcomm import codebooks

__all__ = ["BITS", "expected_vnmse", "solve"]

BITS = range(1, 9)


def _cells(centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cells of the positive centroids: each extends halfway to its neighbours, the last to
    infinity.

    Args:
        centroids: The centroids above 0, ascending. (n,) float64

    Returns:
        The cells' edges t (n + 1,), the normal density at the edges (n + 1,), and the mass of each
        cell, P(t_i <= z < t_(i+1)) (n,).
    """
    halfway = (centroids[:-1] + centroids[1:]) / 2
    edges = torch.cat((centroids.new_zeros(1), halfway, centroids.new_full((1,), math.inf)))
    density = torch.exp(-edges * edges / 2) / math.sqrt(2 * math.pi)
    upper_tail = torch.special.ndtr(-edges)  # differences of upper tails are precise far out too
    return edges, density, upper_tail[:-1] - upper_tail[1:]


def expected_vnmse(centroids: npt.NDArray[np.float64]) -> float:
    """EDEN's error E[|x^ - x|^2] / |x|^2 for many dimensions, with an odd-symmetric codebook.

    With s = 1 / E[z c(z)] it is E[(s c(z) - z)^2] = E[c(z)^2] / E[z c(z)]^2 - 1. A Lloyd-Max
    codebook has E[c(z)^2] = E[z c(z)] = 1 - D, which makes it D / (1 - D).

    Args:
        centroids: Odd-symmetric, increasing. (2^bits,)
    """
    positive = torch.tensor(centroids)[len(centroids) // 2 :]
    _, density, mass = _cells(positive)
    moment = density[:-1] - density[1:]  # E[z; z in cell]
    return (positive.square() @ mass / (2 * (positive @ moment).square()) - 1).item()


def solve(bits: int) -> npt.NDArray[np.float64]:
    """The Lloyd-Max codebook of N(0, 1), by Newton's method.

    Each centroid is the mean of its cell, c_i = m_i with

        m_i = E[z | t_i <= z < t_(i+1)] = (density(t_i) - density(t_(i+1))) / mass_i,
        dm_i/dt_i = density(t_i) (m_i - t_i) / mass_i,
        dm_i/dt_(i+1) = density(t_(i+1)) (t_(i+1) - m_i) / mass_i,

    where t_i = (c_(i-1) + c_i) / 2. So the Jacobian of c - m is tridiagonal. In this form, unlike
    in c_i mass_i - moment_i, the equations are nearly linear, and any reasonable start converges.

    Args:
        bits: b, at least 1.

    Returns:
        (2^bits,) float64, increasing, exactly odd-symmetric, precise up to rounding, which the
        condition of the equations amplifies: 1e-15 for 1 bit, 1e-10 for 8.

    Raises:
        ValueError: bits is less than 1.
        RuntimeError: Newton's method did not converge.
    """
    if bits < 1:
        raise ValueError(f"A Lloyd-Max codebook needs bits >= 1; got bits={bits}.")
    count = 2**bits
    # Many centroids are optimally spaced like the quantiles of N(0, 3) (Panter and Dite).
    quantiles = torch.arange(count // 2 + 0.5, count, dtype=torch.float64) / count
    centroids = math.sqrt(3) * torch.special.ndtri(quantiles)
    for _ in range(20):
        edges, density, mass = _cells(centroids)
        mean = (density[:-1] - density[1:]) / mass
        # The first edge, 0, and the last, inf, do not move.
        lower = (density[:-1] * (mean - edges[:-1]) / mass)[1:] / 2
        upper = density[1:-1] * (edges[1:-1] - mean[:-1]) / mass[:-1] / 2
        jacobian = torch.eye(len(centroids), dtype=torch.float64)
        jacobian -= lower.diag(-1) + pad(lower, (1, 0)).diag()
        jacobian -= upper.diag(1) + pad(upper, (0, 1)).diag()
        step = torch.linalg.solve(jacobian, centroids - mean)
        centroids = centroids - step
        if step.abs().max() < 1e-8:  # the next step, its square, would be lost in rounding
            break
    else:
        raise RuntimeError(
            f"The Lloyd-Max codebook for bits={bits} did not converge: the last step of Newton's "
            f"method was {step.abs().max().item():.1e}. Use at most 8 bits."
        )
    positive = centroids.numpy()
    return np.concatenate((-positive[::-1], positive))


def main() -> None:
    parser = argparse.ArgumentParser(description="Solve for Lloyd-Max codebooks and write them.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_suffix(".npz"),
        help="the .npz file to write (default: the shipped table)",
    )
    args = parser.parse_args()

    tables = {}
    print("| b | distortion D | EDEN's expected vNMSE D / (1 - D) |\n|---|---|---|")
    for bits in BITS:
        centroids = tables[f"b{bits}"] = solve(bits)
        vnmse = expected_vnmse(centroids)
        print(f"| {bits} | {vnmse / (1 + vnmse):.6g} | {vnmse:.6g} |")
    codebooks.save(args.out, tables)


if __name__ == "__main__":
    main()
