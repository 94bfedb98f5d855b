"""The law of a rotated coordinate: how far from N(0, 1) it is, and what coordinates share."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from lib.progress import progress
from rhtcomm import Key, RandomizedHadamard
from theory.inputs import GROUP, ROTATIONS, Effort, hadamard, inputs, rotated, sylvester

Array = npt.NDArray[np.float64]
MARGIN = 3  # a distance counts where it is this many times the sampling floor


# Marginal distributions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """From N(0, 1); `floor` is what sampling alone leaves of it, zero for an exact value."""

    value: float
    floor: float = 0.0


def normal_cdf(z: Array) -> Array:
    return torch.special.ndtr(torch.from_numpy(z)).numpy()


def normal_density(z: Array) -> Array:
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def density_at_quantile(q: Array) -> Array:
    """phi(Phi^-1(q)), which is 0 at q = 0 and 1."""
    return normal_density(torch.special.ndtri(torch.from_numpy(q)).numpy())


@cache
def even_steps(count: int) -> tuple[Array, Array]:
    steps = np.arange(count + 1) / count
    return steps, density_at_quantile(steps)


def distance_from_normal(atoms: Array, masses: Array | None = None) -> tuple[float, float]:
    """Kolmogorov and 1-Wasserstein distance of the law with these atoms, sorted (n,), from N(0, 1).

    Masses are 1 / n by default. The first distance is sup |F - Phi|. The second, the integral of
    |F^-1(q) - Phi^-1(q)| over q, is summed in closed form over the atoms' intervals of q, as Phi^-1
    has the primitive -phi(Phi^-1(q)) and crosses the constant z at q = Phi(z).
    """
    steps, edges = even_steps(len(atoms)) if masses is None else (np.empty(0), np.empty(0))
    if masses is not None:
        steps = np.concatenate([[0.0], np.cumsum(masses) / masses.sum()]).clip(max=1)
        edges = density_at_quantile(steps)
    p, low, high = normal_cdf(atoms), steps[:-1], steps[1:]
    kolmogorov = max((high - p).max(), (p - low).max())
    crossing = np.clip(p, low, high)
    at_crossing = np.where(
        p < low, edges[:-1], np.where(p > high, edges[1:], normal_density(atoms))
    )
    areas = atoms * (2 * crossing - low - high) + 2 * at_crossing - edges[:-1] - edges[1:]
    return float(kolmogorov), float(areas.sum())


def two_sample_distance(a: Array, b: Array) -> tuple[float, float]:
    """Kolmogorov and 1-Wasserstein distance of two sorted samples of one length."""
    points = np.concatenate([a[:: max(1, len(a) >> 14)], b[:: max(1, len(b) >> 14)]])
    shares = [np.searchsorted(sample, points, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max()), float(np.abs(a - b).mean())


def sampled_distances(y: torch.Tensor) -> tuple[Distance, Distance]:
    """Of the pooled coordinates of many rotations, y (keys, d) of unit rows.

    The law is symmetric, so each coordinate counts with both signs. Floor: halves a and b of the
    keys are independent, so F_a - F_b has mean zero and the covariances of 2 (F_n - F), F_n the
    pooled sample and F its law. Half the distance of a and b is thus a draw of the size of F_n - F,
    whatever the dependence within a rotation.
    """
    z = y.abs().double().numpy() * y.shape[1] ** 0.5
    a, b = (both_signs(np.sort(half, axis=None)) for half in np.split(z, 2))
    pooled = distance_from_normal(both_signs(np.sort(z, axis=None)))
    floors = two_sample_distance(a, b)
    kolmogorov, wasserstein = map(Distance, pooled, (floor / 2 for floor in floors))
    return kolmogorov, wasserstein


def both_signs(magnitudes: Array) -> Array:
    return np.concatenate([-magnitudes[::-1], magnitudes])


def exact_distances(x: torch.Tensor, k: int) -> tuple[Distance, Distance] | None:
    """Where the atoms of the law can be listed.

    After one transform it is that of sum_j +-x_j: 2^m atoms for m nonzeros, or a binomial where
    these are alike. After two it is sum_j +-u_j given u = R_1 x; for one or two nonzeros the signs
    D_1 only permute the magnitudes of u, and where the nonzero ones are alike it is binomial too.
    """
    if k == 3 or (k == 2 and int((x != 0).sum()) > 2):
        return None
    u = x.double() if k == 1 else hadamard(x[None])[0].double()
    values = u[u.abs() > 1e-6].abs()
    count, masses = len(values), None
    if float(values.max() - values.min()) < 1e-5 * float(values.max()):
        signs = torch.arange(-count, count + 1, 2).double()
        # The logarithm of C(m, i) / 2^m, i = 0 .. m.
        logs = torch.lgamma(torch.arange(1, count + 2).double())
        masses = (logs[-1] - logs - logs.flip(0) - count * math.log(2)).exp().numpy()
        atoms = (signs * count**-0.5).numpy()
    elif count <= 16:
        choices = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * count)
        atoms = np.sort((choices @ values).numpy())
    else:
        return None
    kolmogorov, wasserstein = map(Distance, distance_from_normal(atoms, masses))
    return kolmogorov, wasserstein


# Covariances --------------------------------------------------------------------------------------


def given_covariance(u: torch.Tensor) -> float:
    """Largest |covariance| inside groups, given u = R_(k-1) x of some keys, u (keys, d).

    Given u the covariance of coordinates i and j of d^(1/2) H D_k u is sum_l (-1)^<i^j, l> u_l^2.
    For i, j in one group i^j < 8, and the sum is the Walsh-Hadamard transform of the 8 sums of
    u_l^2 over l = r mod 8. The largest magnitude of its entries 1 .. 7, averaged over keys.
    """
    sums = u.square().view(len(u), -1, GROUP).sum(dim=1)
    covariances = sums @ sylvester(GROUP) * GROUP**0.5
    return float(covariances[:, 1:].abs().amax(dim=1).mean())


def group_covariance(values: torch.Tensor) -> float:
    """Largest |mean of v_i v_j| over i^j = 1 .. 7 in groups of 8; values (keys, d) of mean zero."""
    groups = values.reshape(-1, GROUP)
    products = (groups.t() @ groups / len(groups)).numpy()
    i = np.arange(GROUP)
    return float(max(abs(products[i, i ^ c].mean()) for c in range(1, GROUP)))


# Both by simulation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """Of the coordinates of d^(1/2) R_k x."""

    kolmogorov: Distance
    wasserstein: Distance
    given: float  # covariance given all but the last transform
    plain: float  # covariance
    squares: float  # covariance of squares


Laws = dict[tuple[str, int, int], Law]  # by input, k, d


def simulate(effort: Effort) -> Laws:
    found: Laws = {}
    for power in progress(effort.powers, "laws"):
        d = 1 << power
        for index, (name, x) in enumerate(inputs(d).items()):
            before = x[None]
            for k, y in enumerate(rotated(x, effort.samples // d, 100 + index), 1):
                distances = exact_distances(x, k) or sampled_distances(y)
                z = y * d**0.5
                squares = group_covariance(z.square() - 1)
                found[name, k, d] = Law(
                    *distances, given_covariance(before), group_covariance(z), squares
                )
                before = y
    return found


def exact_check(effort: Effort, size: int = 1024) -> list[tuple[Distance, Distance]]:
    """Both distances of two-hot after two transforms: listed, and sampled."""
    x = inputs(size)["two-hot"]
    _, y, _ = rotated(x, effort.samples // size, 300)
    listed = exact_distances(x, 2)
    assert listed is not None
    return [listed, sampled_distances(y)]


def slope(points: list[tuple[int, Distance]]) -> float | None:
    """Of log distance against log d, by least squares, from the smallest d to the sampling floor.

    None where fewer than 3 distances are clearly above it.
    """
    clear: list[tuple[float, float]] = []
    for d, distance in points:
        if distance.value < MARGIN * distance.floor:
            break
        clear.append((math.log(d), math.log(distance.value)))
    return float(np.polyfit(*zip(*clear, strict=True), 1)[0]) if len(clear) >= 3 else None


def pooling_check(keys: int, size: int = 256) -> tuple[float, float]:
    """Largest n^(1/2) * Kolmogorov distance of one coordinate's sample from the pooled one.

    The coordinates are of the package's own rotation, one of each of n keys; the pool is of this
    file's. Returned with the level that chance exceeds once in 1000 such checks (Dvoretzky,
    Kiefer, Wolfowitz and Massart, with a union bound).
    """
    coordinates, largest, count = (0, 1, 7, size - 1), 0.0, 0
    for index, (_, x) in enumerate(inputs(size).items()):
        pools = rotated(x, 2 * keys, 500 + index)
        for k, pool in zip(ROTATIONS, pools, strict=True):
            rows = x.expand(keys, -1).clone()
            y = RandomizedHadamard(k).rotate(rows, Key(seed=index, step=k), 0) * size ** (-k / 2)
            # Rounded, so that both have the atoms of a law with atoms at the same values.
            reference = np.sort(pool.double().numpy().round(5), axis=None)
            for coordinate in coordinates:
                sample = np.sort(y[:, coordinate].double().numpy().round(5))
                shares = np.searchsorted(reference, sample, side="right") / len(reference)
                own = np.searchsorted(sample, sample, side="right") / keys
                largest = max(largest, keys**0.5 * float(np.abs(own - shares).max()))
                count += 1
    return largest, math.sqrt(math.log(2 * count / 1e-3) / 2)
