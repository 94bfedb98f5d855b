"""How many rotations an input needs, from sums of its squares and cubes."""

import numpy as np
import torch

from rhtcomm.floating_point import default_mode
from rhtcomm.rotation import RandomizedHadamard, floating_tensor, hadamard, split_into_blocks

__all__ = ["MOMENTS", "TOLERANCE", "block_moments", "choose_rotations", "rotations_for"]

BERRY_ESSEEN = 0.5606  # Shevtsova (2010), for independent summands of different distributions
TOLERANCE = 0.05
_PARTS = 8  # the largest group of coordinates that a quantizer codes together
MOMENTS = _PARTS + 2


def choose_rotations(
    x: torch.Tensor,
    *,
    block: int = 4096,
    group: int = 1,
    safe: int = 2,
    tolerance: float = TOLERANCE,
) -> int:
    """1 if one rotation suffices for x, otherwise `safe`.

    The time is linear in numel. The result depends only on x, not on the random signs.

    After one rotation a coordinate is d^(-1/2) sum_i +-x_i, so its Kolmogorov distance to a
    Gaussian is at most

        0.5606 sum_i |x_i|^3 / (sum_i x_i^2)^(3/2)        (Berry and Esseen; Shevtsova 2010),

    and the covariances of g adjacent coordinates, over |x|^2 / d, are the g-point Walsh-Hadamard
    transform of q_r = sum of x_i^2 over i = r mod g, over |x|^2. One rotation suffices if the
    averages over blocks, weighted by |x_block|^2, stay within two limits: the tolerance for the
    bound, and 4 times the tolerance for the largest covariance (which changes the error only in
    second order). In addition, no block with more than 1e-4 of |x|^2 may exceed 4 times either
    limit.

    Args:
        x: (numel,) floating point.
        block: coordinates that are rotated together, a power of two.
        group: g, the coordinates that a quantizer codes together: 1, 2, 4 or 8.
        safe: the number that suffices for every x.
        tolerance: of the Kolmogorov distance, in (0, 1).

    Raises:
        TypeError: x is not a tensor, has no memory of its own or is not floating point.
        ValueError: an argument is out of its range.
    """
    x = floating_tensor(x, "choose_rotations", "x")
    if group not in (1, 2, 4, 8) or not 0 < tolerance < 1:
        raise ValueError(
            f"choose_rotations: group={group} must be 1, 2, 4 or 8, "
            f"and tolerance={tolerance} between 0 and 1"
        )
    RandomizedHadamard(safe, block)  # checks them
    rows = []
    for blocks in split_into_blocks(x.numel(), block):
        values = blocks.rows(x.flatten()[blocks.offset : blocks.stop].double())
        peak = values.abs().amax(dim=1)
        unit = torch.where((peak > 0) & peak.isfinite(), peak, 1.0)
        rows.append(block_moments(values / unit[:, None], unit))
    return rotations_for(torch.cat(rows), group, safe, tolerance) if rows else 1


def block_moments(z: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The moments that decide the choice: blocks z (B, d), in units of `unit` (B,) -> (B, 10).

    A row holds q_0 .. q_7, sum |z|^3 and unit. Non-finite blocks count as zeros.
    """
    squares = z.square()
    cubes = (squares * z.abs()).sum(dim=1)
    sums = torch.cat(
        [squares.view(len(z), -1, _PARTS).sum(dim=1), cubes[:, None], unit[:, None]], dim=1
    )
    return torch.where(sums.isfinite().all(dim=1, keepdim=True), sums, 0.0)


@default_mode()  # payloads carry the choice
def rotations_for(
    moments: torch.Tensor, group: int, safe: int, tolerance: float = TOLERANCE
) -> int:
    """The choice of `choose_rotations`, from the `block_moments` of all blocks."""
    if not len(moments):
        return 1
    # NumPy: torch takes several times as long for so few numbers, and this runs for every bucket of
    # every step.
    rows = moments.double().cpu().numpy()
    q, cubes, unit = rows[:, :_PARTS], rows[:, _PARTS], rows[:, _PARTS + 1]
    squares = q.sum(axis=1)
    weight = squares * (unit / max(unit.max(), 1e-300)) ** 2
    weight = weight / max(weight.sum(), 1e-300)
    inverse = 1 / np.where(squares > 0, squares, np.inf)
    measures = [(BERRY_ESSEEN * cubes * inverse**1.5, tolerance)]
    if group > 1:
        spectrum = hadamard(torch.from_numpy(q.reshape(len(q), -1, group).sum(axis=1)))
        measures.append((spectrum[:, 1:].abs().amax(dim=1).numpy() * inverse, 4 * tolerance))
    for measure, limit in measures:
        if weight @ measure > limit or (measure[weight > 1e-4] > 4 * limit).any():
            return safe
    return 1
