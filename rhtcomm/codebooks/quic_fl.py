"""Solver for QUIC-FL's levels: `python -m rhtcomm.codebooks.quic_fl [--exact]`.

QUIC-FL (Ben Basat et al., arXiv 2205.13341) quantizes z ~ N(0, 1) to b bits without bias, helped
by l bits of randomness that sender and receiver share. Here its tables take the form of a
companded dithered quantizer. With H = 2^l there are N = 2^b H levels r_0 < ... < r_(N-1), odd
symmetric, and a shared h, uniform on 0..H-1. The receiver decodes code x to r[x H + h].

    A_i = mean(r_i, ..., r_(i+H-1)),  Q_i = mean(r_i^2, ..., r_(i+H-1)^2),  i = 0..N-H,

scaled so that A_0 = -T and A_(N-H) = T. The sender of z in [A_i, A_(i+1)] draws w = i + 1 with
probability (z - A_i) / (A_(i+1) - A_i), else w = i, and sends the one x for which x H + h lies in
{w, ..., w+H-1}. The average over h is then A_w, and the average over w is z. Likewise the decoded
value's mean square is L(z), the linear interpolant of the points (A_i, Q_i), so the error is

    E[L(z) - z^2; |z| <= T],

a smooth function of the increments of r, which `solve` minimizes. Every z in [-T, T] is unbiased. T
is the largest coordinate that gets a code: WIDE if all coordinates do, EXACT if the fraction p =
1/512 beyond T is sent exactly and adds no error.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rhtcomm import codebooks

__all__ = ["EXACT", "WIDE", "Family", "expected_vnmse", "solve"]


@dataclass(frozen=True)
class Family:
    """The tables of one T, for 1 to 8 bits.

    Args:
        name: of the .npz file.
        bound: T.
        shared_bits: l by b. Each further bit doubles the table; up to b = 6 it lowers the error by
            0.4 to 1.6 percent.
    """

    name: str
    bound: float
    shared_bits: dict[int, int]

    @property
    def reference_vnmse(self) -> dict[int, float]:
        """By b, to compare with."""
        return codebooks.EXPECTED_VNMSE[self.name]

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.npz")


WIDE = Family(
    "quic_fl",
    # P(|z| > 5) is 6e-7: one block of 4096 coordinates in 400 has a coordinate beyond.
    bound=5.0,
    shared_bits={1: 6, 2: 6, 3: 5, 4: 4, 5: 4, 6: 3, 7: 3, 8: 2},
)

EXACT = Family(
    "quic_fl_exact",
    bound=NormalDist().inv_cdf(1 - 1 / 1024),  # 3.09727: P(|z| > T) = 1/512
    shared_bits={1: 6, 2: 5, 3: 4, 4: 4, 5: 4, 6: 3, 7: 3, 8: 2},
)


def _density(z: Tensor) -> Tensor:
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _upper_tail(z: Tensor) -> Tensor:
    tail: Tensor = torch.special.ndtr(-z)
    return tail


def _expected_error(positive: Tensor, shared: int) -> Tensor:
    """E[L(z) - z^2; |z| <= T] in closed form.

    L' on (A_i, A_(i+1)) is (Q_(i+1) - Q_i) / (A_(i+1) - A_i) = r_i + r_(i+H). Hence, by parts, with
    P(z) the upper tail of N(0, 1) and G(z) = density(z) - z P(z), for which G' = -P,

        E[L(z); |z| <= T] = L(0) - 2 L(T) P(T) + 2 sum_i (r_i + r_(i+H)) (G(A_i) - G(A_(i+1))),
        E[z^2; |z| <= T] = 1 - 2 P(T) - 2 T density(T),

    with the sum over A_i >= 0. Only z >= 0 is used, for which upper tails keep their relative
    precision, however small.

    Args:
        positive: The levels above 0, ascending. (N/2,) float64
        shared: H, even, so that A = 0 is one of the knots.
    """
    levels = torch.cat((-positive.flip(0), positive))
    zero = (len(levels) - shared) // 2
    windows = levels[zero:].unfold(0, shared, 1)  # (zero + 1, H)
    knots, squares = windows.mean(1), windows.square().mean(1)  # A_i and Q_i where A_i >= 0
    slopes = levels[zero:-shared] + levels[zero + shared :]
    losses = _density(knots) - knots * _upper_tail(knots)
    bound, tail = knots[-1], _upper_tail(knots[-1])
    mean_square = squares[0] - 2 * squares[-1] * tail + 2 * slopes @ (losses[:-1] - losses[1:])
    return mean_square - (1 - 2 * tail - 2 * bound * _density(bound))


def _positive_levels(log_increments: Tensor, shared: int, bound: float) -> Tensor:
    """The levels above 0 (N/2,), from the logarithms of their increments (N/2 - 1,).

    The increment across 0 is the unit of the others; T then gives the scale.
    """
    half = log_increments.new_full((1,), 0.5)
    levels = torch.cat((half, log_increments.exp())).cumsum(0)
    return levels * (bound / levels[-shared:].mean())


def expected_vnmse(levels: npt.NDArray[np.float64], shared_bits: int) -> float:
    """Error E[(decoded - z)^2] of z ~ N(0, 1) restricted to [-T, T], which the levels imply.

    It is the limit for many dimensions of E|x^ - x|^2 / |x|^2, for x rotated at random.

    Args:
        levels: Odd-symmetric, increasing. (2^(bits + shared_bits),)
        shared_bits: l, at least 1.
    """
    positive = torch.tensor(levels)[len(levels) // 2 :]
    return _expected_error(positive, 2**shared_bits).item()


def solve(bits: int, shared_bits: int, bound: float = WIDE.bound) -> npt.NDArray[np.float64]:
    """The levels r that minimize E[L(z) - z^2; |z| <= bound], to about 1e-9.

    Args:
        bits: b, at least 1.
        shared_bits: l, at least 1.
        bound: T, the largest magnitude that is quantized.

    Returns:
        (2^(bits + shared_bits),) float64, increasing, exactly odd-symmetric.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: The solution did not converge.
    """
    if bits < 1 or shared_bits < 1 or not 0 < bound < math.inf:
        raise ValueError(
            "QUIC-FL levels need bits >= 1, shared_bits >= 1 and a finite bound > 0; "
            f"got bits={bits}, shared_bits={shared_bits}, bound={bound}."
        )
    shared = 2**shared_bits
    count = shared * 2**bits

    def error(log_increments: Tensor) -> Tensor:
        return _expected_error(_positive_levels(log_increments, shared, bound), shared)

    # Many levels at a small error are optimally spaced like the quantiles of N(0, 3) (Panter and
    # Dite).
    quantiles = torch.arange(count // 2 + 0.5, count, dtype=torch.float64) / count
    start = torch.special.ndtri(quantiles)
    variables = (start.diff() / (2 * start[0])).log().requires_grad_()
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [variables],
        max_iter=10_000,
        tolerance_grad=1e-7,
        tolerance_change=0,
        history_size=100,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = error(variables).log()  # so that the tolerance is relative
        torch.autograd.backward(value)
        return value.item()

    optimizer.step(closure)
    # The error is so flat at its minimum that descent alone determines only few digits of the
    # levels.
    for _ in range(20):
        variables = variables.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(error(variables), variables, create_graph=True)
        rows = [torch.autograd.grad(g, variables, retain_graph=True)[0] for g in gradient]
        step = torch.linalg.solve(torch.stack(rows), gradient.detach())
        variables = variables.detach() - step
        if step.abs().max() < 1e-7:  # the next step, its square, would be lost in rounding
            break
    else:
        raise RuntimeError(
            f"The QUIC-FL levels for bits={bits}, shared_bits={shared_bits}, bound={bound} did not "
            f"converge: the last step of Newton's method was {step.abs().max().item():.1e}. "
            "Try a bound between 2 and 6."
        )
    positive = _positive_levels(variables, shared, bound).numpy()
    return np.concatenate((-positive[::-1], positive))


def main() -> None:
    parser = argparse.ArgumentParser(description="Solve for QUIC-FL's levels and write them.")
    parser.add_argument("--exact", action="store_true", help="the levels for T = 3.09727, not 5")
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=WIDE.shared_bits, help="default: all"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the .npz file to write (default: the shipped table, or none if --bits is given)",
    )
    args = parser.parse_args()

    family, tables = EXACT if args.exact else WIDE, {}
    print("| b | l | T | expected vNMSE | reference |\n|---|---|---|---|---|")
    for bits in args.bits or family.shared_bits:
        shared_bits = family.shared_bits[bits]
        levels = tables[f"b{bits}"] = solve(bits, shared_bits, family.bound)
        vnmse, reference = expected_vnmse(levels, shared_bits), family.reference_vnmse[bits]
        print(f"| {bits} | {shared_bits} | {family.bound:g} | {vnmse:.5g} | {reference:.5g} |")
    # A subset must not replace the shipped table.
    out = args.out or (None if args.bits else family.path)
    if out is not None:
        codebooks.save(out, tables)


if __name__ == "__main__":
    main()
