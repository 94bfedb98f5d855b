"""Reproduce by simulation what two and three randomized Hadamard transforms promise.

    python benchmarks/rotation.py            all of results/rotation.md and .png, about 6 minutes
    python benchmarks/rotation.py --quick    the same on fewer and smaller samples, in seconds

R_k = (H D_k) ... (H D_1) as in rhtcomm/rotation.py, x of norm 1, z = d^(1/2) R_k x. The theorems
are those of "Quantizing With Randomized Hadamard Transforms: Efficient Heuristic Now Proven"
(arXiv 2605.06014). Every part fixes its seed, so the tables can be reproduced.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lib.report import RESULTS, heading, table
from theory.errors import QUANTIZERS, Errors, drive_on_three, eden_on_two_hot, label, measure_errors
from theory.inputs import FULL, QUICK, ROTATIONS, Effort, inputs
from theory.laws import MARGIN, Distance, Laws, exact_check, pooling_check, simulate, slope
from theory.moment_check import moment_check


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


def distances(effort: Effort, laws: Laws) -> str:
    """The section on distances from the Gaussian."""
    statistic, level = pooling_check(effort.keys)
    listed, sampled = exact_check(effort)
    return f"""## Distance of a fixed coordinate of d^(1/2) R_k x from N(0, 1)

Given R_(k-1) x = u, coordinate i is sum_j +-s_j u_j with independent random signs s of D_k. The
signs of row i of H do not change the distribution of s, so the distribution of the coordinate does
not depend on i. All coordinates of one rotation are (dependent) draws from it, and
{effort.samples} of them, from {effort.samples} / d keys, are pooled. For the same reason the
distribution is symmetric, and each draw counts with both signs. Checked with
`rhtcomm.RandomizedHadamard` at d = 256: samples of one coordinate over {effort.keys} keys
differ from the pool by at most {statistic:.2f} / {effort.keys}^(1/2); chance exceeds
{level:.2f} once in 1000 checks. Signs come from NumPy (PCG64), the transform is one or two
products with Hadamard matrices. If the distribution can be enumerated (k = 1: at most 16 nonzeros,
or all equal; k = 2: one-hot and two-hot), the distances are exact.

The sampling floor is half the distance between the samples of two halves of the keys, which
estimates the sampling error of the pool; its median is {median_floor(laws, "kolmogorov"):.1e}
(Kolmogorov) and {median_floor(laws, "wasserstein"):.1e} (Wasserstein). In parentheses: less than
{MARGIN} times the cell's own floor. The slope is that of log distance against log d, from the left
up to the first such cell. To check the sampling: two-hot after k = 2 at d = 1024 is a scaled
binomial, with distances {listed[0].value:.6f} and {listed[1].value:.6f}; the sampled ones are
{sampled[0].value:.6f} (floor {sampled[0].floor:.6f}) and {sampled[1].value:.6f} (floor
{sampled[1].floor:.6f}).
{distance_tables(laws, effort)}
![Distances and covariances](rotation.png)
"""


def covariances(effort: Effort, laws: Laws) -> str:
    """The section on groups of coordinates."""
    covariance_floor = (effort.samples / 256) ** -0.5
    return f"""## Covariances inside groups of 8 adjacent coordinates

Given all but the last rotation, coordinates i and j have the covariance
sum_l (-1)^popcount((i^j) & l) u_l^2, u = R_(k-1) x. The first tables show its largest magnitude
inside a group, averaged over keys. After three rotations it decays for every input; therefore a
vector quantizer then has its expected error. The last table is unconditional: all rotations are
random. From k = 2 on, two coordinates are uncorrelated, since E u_l^2 = 1/d. But after two
rotations their squares may be correlated (two-hot has pairs z_j = +-z_i). Its sampling error is
about {covariance_floor:.3f}.
{covariance_tables(laws, effort)}"""


def quantizers(effort: Effort) -> str:
    """The section on errors of quantizers."""
    standard_error = math.sqrt(2 / effort.size / effort.batches)
    drive = [
        [str(k), f"{error.one_shot:.4f}", f"{error.averaged:.4g}"]
        for k, error in drive_on_three(1000).items()
    ]
    return f"""## Errors of quantizers, d = {effort.size}

{effort.batches} groups of N = {effort.draws} keys; the quantizer's default k is bold. The dense
rotations are products of two out of many orthogonal factors of Gaussian matrices (with the
signs fixed), pairwise independent; their error is the same for every input. The relative standard
error of N NMSE(N) is about (2 / d / {effort.batches})^(1/2) = {standard_error:.1%}, as the mean's
d errors are close to independent Gaussians; "farthest" is the ratio that is farthest from 1.
{error_tables(measure_errors(effort), effort)}
At finite d, two rotations differ most from a Gaussian if they give a lattice. The table shows this
case: EDEN on two-hot, vNMSE over that of its codebook for N(0, 1).

{eden_on_two_hot(effort)}
DRIVE on (1, .6, .3, 0, ...), d = 4096, 1000 seeds (an unbiased code at vNMSE 0.571 has
N NMSE(N) = 0.571):

{table(["k", "vNMSE", "N NMSE(N)"], drive)}"""


def report(effort: Effort, folder: Path) -> str:
    """Run all parts, plot, and return the Markdown."""
    laws = simulate(effort)
    plot(laws, effort, folder / "rotation.png")
    sections = (distances(effort, laws), covariances(effort, laws), quantizers(effort))
    return "\n".join((heading(), *sections))


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
