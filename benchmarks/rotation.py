"""Reproduce by simulation what two and three randomized Hadamard transforms promise.

    python benchmarks/rotation.py            all of results/rotation.md and .png, about 6 minutes
    python benchmarks/rotation.py --quick    the same on fewer and smaller samples, in seconds

R_k = (H D_k) ... (H D_1) as in rhtcomm/rotation.py, x of norm 1, z = d^(1/2) R_k x. The theorems
are those of "Quantizing With Randomized Hadamard Transforms: Efficient Heuristic Now Proven"
(arXiv 2605.06014). Every part fixes its seed, so the tables can be had again.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import accuracy
import numpy as np
import numpy.typing as npt
import torch
from kernels import interleave
from matplotlib.figure import Figure
from report import RESULTS, heading, table
from tqdm import tqdm

from rhtcomm import Codec, Eden, Key, QuicFL, RandomizedHadamard, VectorQuantizer, codebooks
from rhtcomm.codebooks.lloyd_max import expected_vnmse
from rhtcomm.quantizers import Quantizer
from rhtcomm.rotation import TOLERANCE, choose_rotations

Array = npt.NDArray[np.float64]
ROTATIONS = (1, 2, 3)
GROUP = 8  # adjacent coordinates that vector quantization at one bit takes together
MARGIN = 3  # a distance counts where it is so many times the sampling floor


@dataclass(frozen=True)
class Effort:
    powers: range  # d = 2^power
    samples: int  # coordinates a distance is estimated from
    keys: int  # of the check that coordinates may be pooled
    size: int  # d of the errors of quantizers
    batches: int  # groups of draws that a bias is estimated from
    draws: int  # keys whose estimates are averaged: N


FULL = Effort(range(4, 17), 1 << 22, 1 << 13, 1024, 16, 1024)
QUICK = Effort(range(4, 10), 1 << 17, 1 << 10, 256, 2, 256)


# Inputs and rotations -----------------------------------------------------------------------------


def inputs(size: int) -> dict[str, torch.Tensor]:
    """Vectors of norm 1 in R^size, most of them hard: (size,) float32 by name."""
    generator = np.random.default_rng(7)
    few = np.zeros((3, size))
    few[0, 0] = 1
    few[1, :2] = 1
    few[2, :3] = 1, 0.6, 0.3
    sparse = np.zeros(size)
    places = generator.choice(size, max(4, size // 100), replace=False)
    sparse[places] = generator.standard_normal(len(places))
    row = np.array([(-1.0) ** (size // 3 & column).bit_count() for column in range(size)])
    found = {
        "one-hot": few[0],
        "two-hot": few[1],
        "(1, .6, .3, 0, ...)": few[2],
        "half constant": np.arange(size) < size // 2,
        "Walsh row": row,
        "sparse": sparse,
        "lognormal": np.exp(generator.standard_normal(size)),
        "Gaussian": generator.standard_normal(size),
    }
    return {name: torch.from_numpy(x / np.linalg.norm(x)).float() for name, x in found.items()}


@cache
def sylvester(size: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix, (size, size) float32."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], dim=1)
    return matrix * size**-0.5


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """H of each row, x (n, d) float32, by one or two matrix products.

    H_d is the Kronecker product of two smaller ones. On samples this is several times faster than
    butterflies, whose roundings the codec needs and a distribution does not.
    """
    low = min(x.shape[1], 256)
    y = x.reshape(-1, low) @ sylvester(low)
    if low < x.shape[1]:
        y = sylvester(x.shape[1] // low) @ y.view(len(x), -1, low)
    return y.view(x.shape)


def rotated(x: torch.Tensor, count: int, seed: int) -> Iterator[torch.Tensor]:
    """R_1 x, R_2 x, R_3 x of `count` independent keys, x (d,): (count, d) each."""
    generator = np.random.default_rng(seed)
    y = x.expand(count, -1)
    for _ in ROTATIONS:
        octets = np.frombuffer(generator.bytes(-(-y.numel() // 8)), dtype=np.uint8)
        bits = torch.from_numpy(np.unpackbits(octets)[: y.numel()]).view(y.shape)
        y = hadamard(y * (1 - 2 * bits.float()))
        yield y


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
    places = np.arange(GROUP)
    return float(max(abs(products[places, places ^ c].mean()) for c in range(1, GROUP)))


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
    for power in tqdm(effort.powers, "laws", leave=False, disable=None):
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

    None where fewer than 3 distances lie clear of it.
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
    file's. Returned beside the level that chance exceeds once in 1000 such checks (Dvoretzky,
    Kiefer, Wolfowitz and Massart, with a union bound).
    """
    places, largest, count = (0, 1, 7, size - 1), 0.0, 0
    for index, (_, x) in enumerate(inputs(size).items()):
        pools = rotated(x, 2 * keys, 500 + index)
        for k, pool in zip(ROTATIONS, pools, strict=True):
            rows = x.expand(keys, -1).clone()
            y = RandomizedHadamard(k).rotate(rows, Key(seed=index, step=k), 0) * size ** (-k / 2)
            # Rounded, so that both place the atoms of a law with atoms alike.
            reference = np.sort(pool.double().numpy().round(5), axis=None)
            for place in places:
                sample = np.sort(y[:, place].double().numpy().round(5))
                shares = np.searchsorted(reference, sample, side="right") / len(reference)
                own = np.searchsorted(sample, sample, side="right") / keys
                largest = max(largest, keys**0.5 * float(np.abs(own - shares).max()))
                count += 1
    return largest, math.sqrt(math.log(2 * count / 1e-3) / 2)


# Errors of quantizers -----------------------------------------------------------------------------


QUANTIZERS: tuple[Quantizer, ...] = (
    *(QuicFL(bits) for bits in (1, 2, 4)),
    *(QuicFL(bits, exact_fraction=1 / 512) for bits in (1, 2, 4)),
    *(Eden(bits) for bits in (1, 2, 4)),
    *(VectorQuantizer(bits) for bits in (1, 2, 4)),
)


def label(quantizer: Quantizer) -> str:
    if quantizer == Eden(1):
        return "DRIVE"
    exact = " exact" if getattr(quantizer, "exact_fraction", 0) else ""
    return f"{type(quantizer).__name__}{exact}, b = {quantizer.bits}"


@dataclass(frozen=True)
class Error:
    """vNMSE E|x^ - x|^2 / |x|^2, and N NMSE(N), N times that of the mean of N estimates."""

    one_shot: float
    averaged: float


def measure(estimates: Iterator[torch.Tensor], x: torch.Tensor) -> Error:
    """Of batches of estimates (N, d), independent within a batch, of one x (d,) of norm 1."""
    one_shot, averaged = [], []
    for batch in estimates:
        one_shot.append(float((batch - x).square().sum(dim=1).double().mean()))
        mean = batch.double().mean(dim=0)
        averaged.append(len(batch) * float((mean - x).square().sum()))
    return Error(float(np.mean(one_shot)), float(np.mean(averaged)))


def after_transforms(
    quantizer: Quantizer, k: int, x: torch.Tensor, draws: int, batches: int
) -> Iterator[torch.Tensor]:
    """Round trips through the codec: blocks of one tensor have independent randomness."""
    codec, copies = Codec(quantizer, rotations=k, block=len(x)), x.repeat(draws)
    for step in range(batches):
        key = Key(seed=5, step=step)
        payload = codec.encode(copies, key)
        yield codec.decode_mean(payload[None], key, copies.numel()).view(draws, -1)


class DenseRotations:
    """Q_a Q_b, a < b, of uniform random rotations Q_1 .. Q_m of R^d.

    Q_a is the orthogonal factor of a Gaussian matrix whose triangular factor has a positive
    diagonal. The products are uniform and any two of them independent, and NMSE(N) depends on no
    more than pairs. The error does not depend on x, as Q x is uniform on the sphere for every x.
    """

    def __init__(self, size: int, count: int) -> None:
        matrices = math.ceil((1 + math.sqrt(1 + 8 * count)) / 2)
        generator = torch.Generator().manual_seed(11)
        self.rotations = torch.empty(matrices, size, size)
        for rotation in tqdm(self.rotations, "dense rotations", leave=False, disable=None):
            q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
            rotation.copy_(q * r.diagonal().sign())
        self.first, self.second = torch.triu_indices(matrices, matrices, 1)[:, :count]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (d,) -> (count, d)."""
        inner = self.rotations @ x
        return torch.cat([inner[a + 1 :] @ q.t() for a, q in enumerate(self.rotations)])[
            : len(self.first)
        ]

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Row by row, y (count, d) -> (count, d)."""
        x = torch.empty_like(y)
        for a, q in enumerate(self.rotations):
            x[self.first == a] = y[self.first == a] @ q
        for b, q in enumerate(self.rotations):
            x[self.second == b] = x[self.second == b] @ q
        return x


def after_dense(
    quantizer: Quantizer, dense: DenseRotations, x: torch.Tensor, draws: int
) -> Iterator[torch.Tensor]:
    y, key = dense.forward(x), Key(seed=6)
    codes, scale = quantizer.encode(y, key, 0, 0, 1)
    decoded = quantizer.decode(codes, key, 0, 0, 1)
    if isinstance(quantizer, QuicFL) and quantizer.exact_fraction:
        quantizer.decode_exact(decoded, quantizer.encode_exact(y, scale, key, 0, 0, 1))
    return iter(dense.inverse(decoded * scale[:, None]).split(draws))


@dataclass(frozen=True)
class Errors:
    dense: dict[str, Error]  # by quantizer
    transforms: dict[tuple[str, int, str], Error]  # by quantizer, k, input


def measure_errors(effort: Effort) -> Errors:
    """Of all quantizers on all inputs."""
    problems = inputs(effort.size)
    dense = DenseRotations(effort.size, effort.draws * effort.batches)
    found = Errors({}, {})
    for quantizer in tqdm(QUANTIZERS, "errors", leave=False, disable=None):
        name, x = label(quantizer), problems["(1, .6, .3, 0, ...)"]
        found.dense[name] = measure(after_dense(quantizer, dense, x, effort.draws), x)
        for k in ROTATIONS:
            for problem, x in problems.items():
                estimates = after_transforms(quantizer, k, x, effort.draws, effort.batches)
                found.transforms[name, k, problem] = measure(estimates, x)
    return found


def drive_on_three(draws: int) -> dict[int, Error]:
    """DRIVE on (1, .6, .3, 0, ...) in blocks of 4096, by k."""
    x = inputs(4096)["(1, .6, .3, 0, ...)"]
    return {k: measure(after_transforms(Eden(1), k, x, draws, 1), x) for k in ROTATIONS}


# The moment check ---------------------------------------------------------------------------------


def moments(x: torch.Tensor) -> tuple[float, float]:
    """What the choice of k looks at, of one block x (d,), in float64.

    The Berry-Esseen bound 0.5606 sum |x_i|^3 / |x|^3 on the Kolmogorov distance after one
    transform, and the largest covariance inside groups of 8 after it.
    """
    x = x.double()
    bound = 0.5606 * float(x.abs().pow(3).sum() / x.square().sum() ** 1.5)
    return bound, given_covariance((x / x.norm())[None].float())


def borderline(size: int) -> dict[str, torch.Tensor]:
    """Inputs about as bad as a bound of 0.05 lets through, of norm 1."""
    generator = np.random.default_rng(8)
    count = math.ceil((0.5606 / TOLERANCE) ** 2)  # alike, their bound is 0.5606 / count^(1/2)
    together, apart, peak = np.zeros((3, size))
    together[:count] = 1
    apart[generator.choice(size, count, replace=False)] = 1
    peak[:] = generator.standard_normal(size)
    peak[0] = 0
    share = (0.7 * TOLERANCE / 0.5606) ** (1 / 3)  # of the norm; the others add a little
    peak *= math.sqrt(1 - share**2) / np.linalg.norm(peak)
    peak[0] = share
    found = {f"{count} alike, together": together, f"{count} alike, apart": apart}
    found[f"one with {share**2:.0%} of the energy"] = peak
    return {name: torch.from_numpy(x / np.linalg.norm(x)).float() for name, x in found.items()}


def check_cost(rounds: int, numel: int) -> str:
    """Time of an encode by one transform with the check in it, over one without."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    contestants: dict[str, Callable[[], object]] = {}
    quantizers = (QuicFL(4), Eden(4), VectorQuantizer(4))
    for quantizer in quantizers:
        fixed, auto = Codec(quantizer, rotations=1), Codec(quantizer, rotations="auto")
        key, name = Key(seed=1), label(quantizer)
        payload, same = fixed.encode(x, key), auto.encode(x, key, rotations=1)
        if not torch.equal(payload[16:], same[16:]):
            raise AssertionError(f"the check changes what {name} encodes")
        contestants[f"{name} plain"] = functools.partial(fixed.encode, x, key)
        contestants[f"{name} auto"] = functools.partial(auto.encode, x, key, rotations=1)
    times = interleave(contestants, rounds)
    rows = []
    for name in map(label, quantizers):
        (low, plain, high), auto = times[f"{name} plain"], times[f"{name} auto"][1]
        spread = f"{1e3 * low:.2f} .. {1e3 * high:.2f}"
        rows.append(
            [name, f"{1e3 * plain:.2f}", spread, f"{1e3 * auto:.2f}", f"{auto / plain - 1:+.1%}"]
        )
    return table(["", "plain, ms", "10% .. 90%", "with the check, ms", "cost"], rows)


def moment_check(effort: Effort, size: int = 4096) -> str:
    """Its choice on every input, and what one transform does there."""
    quantizers = (QuicFL(4), Eden(1), Eden(4), VectorQuantizer(1), VectorQuantizer(4))
    rows = []
    for name, x in tqdm((inputs(size) | borderline(size)).items(), "moment check", disable=None):
        cells = [f"{moment:.3f}" for moment in moments(x)]
        for quantizer in quantizers:
            choice = choose_rotations(x, group=quantizer.group, safe=quantizer.rotations)
            codec = Codec(quantizer, rotations="auto", block=size)
            asked = codec.wanted_rotations(codec.encode(x, Key(seed=2))[None])
            if asked != choice:
                raise AssertionError(f"{name}: the payload asks for {asked}, not {choice}")
            draws, batches = effort.draws, effort.batches // 2
            one = measure(after_transforms(quantizer, 1, x, draws, batches), x)
            safe = measure(after_transforms(quantizer, quantizer.rotations, x, draws, batches), x)
            ratios = (one.one_shot / safe.one_shot, one.averaged / safe.one_shot)
            shown = " / ".join(f"{r:.3g}" if r > 10 else f"{r:.3f}" for r in ratios)
            cells.append(f"**{choice}**: {shown}")
        rows.append([name, *cells])
    columns = (f"{label(quantizer)} ({quantizer.rotations})" for quantizer in quantizers)
    training = (1, 20, 50) if effort is FULL else (1,)
    model = dataclasses.replace(
        accuracy.FULL if effort is FULL else accuracy.QUICK, training=training
    )
    choices = "; ".join(
        f"{name} k = {choose_rotations(x)}, {choose_rotations(x, group=2, safe=3)}, "
        f"{choose_rotations(x, group=8, safe=3)}"
        for name, x in accuracy.gradients(model).items()
    )
    numel = 25 << 18 if effort is FULL else 1 << 18
    cost = check_cost(50 if effort is FULL else 10, numel)
    return f"""{heading()}
## What the moment check chooses, and what it lets through, d = {size}

"bound" is 0.5606 sum |x_i|^3 / |x|^3, "covariance" the largest inside groups of 8 after one
transform; `choose_rotations` has a tolerance of {TOLERANCE}. In the columns of the
quantizers (with the count that is safe for every input): the choice in bold, and then what k = 1
does, chosen or not: vNMSE over that of the safe count, and N NMSE(N), N = {effort.draws}, over the
same. A code without bias has both alike; else the squared bias over |x|^2 is their difference times
vNMSE / N. The last three inputs are about as bad as the bound lets through.

{table(["", "bound", "covariance", *columns], rows)}
On gradients of the demo's model (scalar; groups of 2; groups of 8): {choices}.

Cost: encode of {numel} coordinates by one transform, in turns within one run, medians.

{cost}"""


_EDEN_SIZES = (256, 1024, 4096, 16384, 65536)


def eden_on_two_hot(effort: Effort) -> str:
    """vNMSE of EDEN after k transforms over that for N(0, 1), by d: two-hot is what k = 2 has most
    trouble with, as coordinates then lie on a lattice of step 2 (2 / d)^(1/2)."""
    rows = []
    for k, bits in ((2, 1), (2, 2), (2, 4), (2, 6), (2, 8), (3, 8)):
        reference = expected_vnmse(codebooks.load("lloyd_max")[f"b{bits}"])
        cells = []
        for d in _EDEN_SIZES:
            x = inputs(d)["two-hot"]
            draws = max(1, effort.samples // d)
            error = measure(after_transforms(Eden(bits), k, x, draws, 1), x)
            cells.append(f"{error.one_shot / reference:.3f}")
        rows.append([f"k = {k}, b = {bits}", *cells])
    return table(["d", *map(str, _EDEN_SIZES)], rows)


# Report -------------------------------------------------------------------------------------------


def distance_tables(laws: Laws, effort: Effort) -> str:
    """Both distances for each k, with slopes; what lies below MARGIN floors in parentheses."""
    text, sizes = "", [1 << power for power in effort.powers]
    for attribute, title in (("kolmogorov", "Kolmogorov"), ("wasserstein", "1-Wasserstein")):
        for k in ROTATIONS:
            rows = []
            for name in inputs(16):
                points = [(d, getattr(laws[name, k, d], attribute)) for d in sizes]
                found = slope(points)
                cells = [
                    f"{distance.value:.2g}"
                    if distance.value >= MARGIN * distance.floor
                    else f"({distance.value:.2g})"
                    for _, distance in points
                ]
                rows.append([name, *cells, "" if found is None else f"{found:.2f}"])
            text += f"\n{title} distance, k = {k}\n\n"
            text += table(["d", *map(str, sizes), "slope"], rows)
    return text


def median_floor(laws: Laws, attribute: str) -> float:
    floors = [getattr(law, attribute).floor for law in laws.values()]
    return float(np.median([floor for floor in floors if floor]))


def covariance_tables(laws: Laws, effort: Effort) -> str:
    text, sizes = "", [1 << power for power in effort.powers]
    for k in ROTATIONS:
        rows = []
        for name in inputs(16):
            values = [laws[name, k, d].given for d in sizes]
            found = slope([(d, Distance(value)) for d, value in zip(sizes, values, strict=True)])
            shown = f"{found:.2f}" if found is not None and min(values) > 1e-6 else ""
            rows.append([name, *(f"{value:.3f}" for value in values), shown])
        text += f"\nGiven all but the last transform, k = {k}\n\n"
        text += table(["d", *map(str, sizes), "slope"], rows)
    d = 256  # small, for many keys
    rows = [
        [
            name,
            *(f"{laws[name, k, d].plain:.3f}" for k in ROTATIONS),
            *(f"{laws[name, k, d].squares:.3f}" for k in ROTATIONS),
        ]
        for name in inputs(16)
    ]
    text += f"\nWithout condition, from whole rotations, d = {d}\n\n"
    header = [f"{what}, k = {k}" for what in ("coordinates", "squares") for k in ROTATIONS]
    return text + table(["", *header], rows)


def error_tables(errors: Errors, effort: Effort) -> str:
    """vNMSE over that of the dense rotation, and N NMSE(N) over the same."""
    names = list(inputs(16))
    text = ""
    for attribute, title in (
        ("one_shot", "vNMSE / vNMSE with a dense rotation"),
        ("averaged", f"N NMSE(N) / vNMSE with a dense rotation, N = {effort.draws}"),
    ):
        rows = []
        for quantizer in QUANTIZERS:
            name = label(quantizer)
            reference = errors.dense[name].one_shot
            own = getattr(errors.dense[name], attribute)
            rows.append([name, "dense", f"{own:.4g}", *[""] * len(names), ""])
            for k in ROTATIONS:
                ratios = [
                    getattr(errors.transforms[name, k, x], attribute) / reference for x in names
                ]
                worst = max(ratios, key=lambda ratio: abs(ratio - 1))
                promised = f"**{k}**" if k == quantizer.rotations else str(k)
                cells = [f"{ratio:.3g}" if ratio > 10 else f"{ratio:.3f}" for ratio in ratios]
                farthest = f"{worst - 1:+.1%}" if worst < 10 else f"{worst:.0f} times"
                rows.append([name, promised, "", *cells, farthest])
        text += f"\n{title}\n\n" + table(["", "k", "value", *names, "farthest"], rows)
    return text


def plot(laws: Laws, effort: Effort, path: Path) -> None:
    sizes = [1 << power for power in effort.powers]
    figure = Figure(figsize=(13, 11), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True, sharey="row")
    for row, (attribute, title) in enumerate(
        (
            ("kolmogorov", "Kolmogorov distance from N(0, 1)"),
            ("wasserstein", "1-Wasserstein distance from N(0, 1)"),
            ("given", "largest covariance in groups of 8,\ngiven all but the last transform"),
        )
    ):
        for column, k in enumerate(ROTATIONS):
            axis = axes[row, column]
            for name in inputs(16):
                values = [getattr(laws[name, k, d], attribute) for d in sizes]
                if attribute != "given":
                    values = [distance.value for distance in values]
                axis.plot(sizes, np.maximum(values, 1e-9), "o-", markersize=3, label=name)
            axis.plot(sizes, [2 * d**-0.5 for d in sizes], "k:", label="slope -1/2")
            if attribute != "given":
                axis.axhspan(0, median_floor(laws, attribute), color="0.85", label="sampling floor")
            axis.set(xscale="log", yscale="log", title=f"k = {k}" if row == 0 else None)
            axis.set_xscale("log", base=2)
            axis.set_ylim(1e-3 if attribute == "given" else 1e-4, 2)
        axes[row, 0].set_ylabel(title)
    for axis in axes[-1]:
        axis.set_xlabel("d")
    axes[0, 2].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def report(effort: Effort, folder: Path) -> str:
    """Run all parts, plot, and return the Markdown."""
    statistic, level = pooling_check(effort.keys)
    laws = simulate(effort)
    errors = measure_errors(effort)
    drive = drive_on_three(1000)
    plot(laws, effort, folder / "rotation.png")
    listed, sampled = exact_check(effort)
    covariance_floor = (effort.samples / 256) ** -0.5
    standard_error = math.sqrt(2 / effort.size / effort.batches)
    return f"""{heading()}
## Distance of a fixed coordinate of d^(1/2) R_k x from N(0, 1)

Given R_(k-1) x = u, coordinate i is sum_j +-s_j u_j with independent random signs s of D_k, and the
signs of row i of H are absorbed by s: its law does not depend on i. So all coordinates of one
rotation are draws of that law, though not independent ones, and {effort.samples} of them, of
{effort.samples} / d keys, are pooled; by the same argument the law is symmetric, and each counts
with both signs. Checked with `rhtcomm.RandomizedHadamard` at d = 256: samples of one coordinate
over {effort.keys} keys differ from the pool by at most {statistic:.2f} / {
        effort.keys
    }^(1/2), where chance exceeds
{level:.2f} once in 1000 checks. Signs are NumPy's (PCG64), the transform is one or two products
with Hadamard matrices. Where the law can be listed (at most 16 nonzeros, or all alike, for k = 1;
one-hot and two-hot for k = 2) the distances are exact.

The sampling floor is half the distance between the samples of two halves of the keys, which has
the size of the pooled sample's own deviation; its median is {median_floor(laws, "kolmogorov"):.1e}
(Kolmogorov) and {median_floor(laws, "wasserstein"):.1e} (Wasserstein). In parentheses: less than
{MARGIN} times the cell's own floor. The slope is that of log distance against log d, from the left
up to the first such cell. As a check of the sampling, two-hot after k = 2 at d = 1024 is a scaled
binomial, with distances {listed[0].value:.6f} and {listed[1].value:.6f}; sampled they are
{sampled[0].value:.6f} (floor {sampled[0].floor:.6f}) and {sampled[1].value:.6f} (floor
{sampled[1].floor:.6f}).
{distance_tables(laws, effort)}
![Distances and covariances](rotation.png)

## Covariances inside groups of 8 adjacent coordinates

Given all but the last transform, coordinates i and j have the covariance
sum_l (-1)^popcount((i^j) & l) u_l^2, u = R_(k-1) x. The first tables show its largest magnitude
inside a group, averaged over keys; three transforms make it decay for every input, which is what
carries the expected error of a vector quantizer over. The last table has no condition and comes
from whole rotations: from k = 2 on two coordinates are uncorrelated, since E u_l^2 = 1/d, but after
two transforms their squares need not be (two-hot has pairs z_j = +-z_i). Its sampling error is
about {covariance_floor:.3f}.
{covariance_tables(laws, effort)}
## Errors of quantizers, d = {effort.size}

{effort.batches} groups of N = {effort.draws} keys; k in bold is what the quantizer promises. The
dense rotations are products of two out of many orthogonal factors of Gaussian matrices (with the
signs fixed), pairwise independent; their error is the same for every input. The relative standard
error of N NMSE(N) is about (2 / d / {effort.batches})^(1/2) = {standard_error:.1%}, as the mean's
d errors are close to independent Gaussians; "farthest" is the ratio that is farthest from 1.
{error_tables(errors, effort)}
What k = 2 leaves at finite d shows most where it leaves a lattice: EDEN on two-hot, vNMSE over that
of its codebook for N(0, 1).

{eden_on_two_hot(effort)}
DRIVE on (1, .6, .3, 0, ...), d = 4096, 1000 seeds (an unbiased code at vNMSE 0.571 has
N NMSE(N) = 0.571):

{
        table(
            ["k", "vNMSE", "N NMSE(N)"],
            [[str(k), f"{e.one_shot:.4f}", f"{e.averaged:.4g}"] for k, e in drive.items()],
        )
    }"""


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller samples")
    parser.add_argument("--check", action="store_true", help="only the moment check")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    effort = QUICK if args.quick else FULL
    text = moment_check(effort) if args.check else report(effort, args.out)
    (args.out / ("moment-check.md" if args.check else "rotation.md")).write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    main()
