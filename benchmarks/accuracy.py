"""Error against bits on the wire, of this package's quantizers and of others, in one run.

    python benchmarks/accuracy.py            all of results/accuracy.md and .png, about 5 minutes
    python benchmarks/accuracy.py --quick    the same on smaller inputs, in seconds

A point is |x^ - x|^2 / |x|^2 of one sender, averaged over seeds, against 8 * (bytes of payload) /
numel: headers, scales, exact values and padding are in it. Every unbiased method has points in the
first table; lib/baselines.py has the methods of other papers. Real gradients come from the model
of launch/demo.py, trained here on one rank; nothing is kept of it.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from lib.baselines import qsgd, qsgd_elias, terngrad, uniform
from lib.gradients import DEMO, SMALL, gradients
from lib.progress import progress
from lib.report import RESULTS, heading, table
from rhtcomm import (
    ECDQ,
    Codec,
    Eden,
    Key,
    Lattice,
    QuicFL,
    RandomizedHadamard,
    VectorQuantizer,
    codebooks,
)
from rhtcomm.codebooks import quic_fl
from rhtcomm.kernels import LatticeTask, lattice_kernel_for
from rhtcomm.quantizers import Quantizer

BLOCK = 4096

Method = Callable[[torch.Tensor, int], tuple[torch.Tensor, float]]  # (x, seed) -> (x^, bits)


@dataclass(frozen=True)
class Effort:
    numel: int  # of the synthetic inputs
    seeds: int
    model: tuple[int, int, int]  # layers, width, heads
    training: tuple[int, ...]  # steps after which gradients are taken


FULL = Effort(1 << 20, 5, DEMO, (1, 20, 100, 200))
QUICK = Effort(1 << 16, 2, SMALL, (1, 3))


# Methods ------------------------------------------------------------------------------------------


def by_codec(quantizer: Quantizer) -> Method:
    codec = Codec(quantizer, block=BLOCK)

    def method(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
        key = Key(seed=seed)
        payload = codec.encode(x, key)
        return codec.decode_mean(payload[None], key, x.numel()), 8 * payload.numel()

    return method


def by_lattice(bits: int) -> Method:
    """One rank's codes, in lanes that are as wide as a sum over 2 ranks needs."""
    lattice, kernel = Lattice(bits), lattice_kernel_for(torch.device("cpu"))

    def method(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
        key, task = Key(seed=seed), LatticeTask(lattice, x.numel(), 1)
        y, estimate = torch.empty(task.padded), torch.empty(task.numel)
        exponents, bounds = torch.empty(2, task.blocks, dtype=torch.int32)
        words = torch.empty(task.words, dtype=torch.int32)
        kernel.rotate(task, key, 0, x, y, exponents, bounds)
        kernel.encode(task, key, 0, 0, y, exponents, bounds, words)
        kernel.decode(task, key, 0, words, bounds, estimate)
        sent = LatticeTask(lattice, x.numel(), 2)
        return estimate, 32 * (sent.words + sent.blocks)

    return method


def with_generator(
    method: Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor, float]],
) -> Method:
    return lambda x, seed: method(x, torch.Generator().manual_seed(seed))


def uniform_after_one_transform(bits: int) -> Method:
    rotation = RandomizedHadamard(1, BLOCK)

    def method(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
        key = Key(seed=seed)
        y = rotation.forward(x, key)
        estimate, length = uniform(y, bits, BLOCK, torch.Generator().manual_seed(seed))
        return rotation.inverse(estimate, key, x.numel()), length

    return method


def methods() -> dict[str, dict[str, Method]]:
    """Curves by name, their points by setting."""
    bits = range(1, 9)
    return {
        "QuicFL": {f"b = {b}": by_codec(QuicFL(b)) for b in bits},
        "QuicFL, exact mode": {
            f"b = {b}": by_codec(QuicFL(b, exact_fraction=1 / 512)) for b in bits
        },
        "ECDQ": {f"b = {b:g}": by_codec(ECDQ(b)) for b in (1, 1.5, 2, 2.5, 3, 4, 5, 6)},
        "Eden": {f"b = {b}": by_codec(Eden(b)) for b in bits},
        "VectorQuantizer": {f"b = {b}": by_codec(VectorQuantizer(b)) for b in (1, 2, 4)},
        "Lattice": {f"b = {b}": by_lattice(b) for b in bits},
        "uniform, one RHT": {f"b = {b}": uniform_after_one_transform(b) for b in bits},
        "QSGD, 2-norm": {
            f"b = {b}": with_generator(lambda x, g, b=b: qsgd(x, b, 2, g)) for b in range(2, 9)
        },
        "QSGD, max norm": {
            f"b = {b}": with_generator(lambda x, g, b=b: qsgd(x, b, math.inf, g))
            for b in range(2, 9)
        },
        "QSGD, 2-norm, Elias": {
            f"s = {s}": with_generator(lambda x, g, s=s: qsgd_elias(x, s, g))
            for s in (1, 4, 16, 64, 256)
        },
        "TernGrad": {"no clipping": with_generator(lambda x, g: terngrad(x, BLOCK, math.inf, g))},
        "TernGrad, biased": {
            "clipped at 2.5": with_generator(lambda x, g: terngrad(x, BLOCK, 2.5, g))
        },
    }


# Inputs -------------------------------------------------------------------------------------------


def problems(effort: Effort) -> dict[str, torch.Tensor]:
    gaussian = torch.randn(effort.numel, generator=torch.Generator().manual_seed(1))
    other = torch.randn(effort.numel, generator=torch.Generator().manual_seed(2))
    return {
        "Gaussian": gaussian,
        "lognormal": other.exp(),
        **gradients(effort.model, effort.training),
    }


# Report -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    bits: float  # on the wire, per coordinate
    nmse: float
    standard_error: float

    def __str__(self) -> str:
        uncertain = self.standard_error > 0.02 * self.nmse
        return f"{self.nmse:.4g}" + (f" ± {self.standard_error:.1g}" if uncertain else "")


Points = dict[tuple[str, str, str], Point]  # by curve, setting, input


def measure(method: Method, x: torch.Tensor, seeds: int) -> Point:
    errors, lengths = [], []
    for seed in range(seeds):
        estimate, length = method(x, seed)
        errors.append(float((estimate - x).double().square().sum() / x.double().square().sum()))
        lengths.append(length)
    standard_error = statistics.stdev(errors) / seeds**0.5
    return Point(statistics.fmean(lengths) / x.numel(), statistics.fmean(errors), standard_error)


def simulate(effort: Effort) -> Points:
    curves, found = methods(), {}
    for problem, x in progress(problems(effort).items(), "inputs"):
        for name, settings in curves.items():
            for setting, method in settings.items():
                found[name, setting, problem] = measure(method, x, effort.seeds)
    return found


def curve_of(points: Points, name: str, problem: str) -> list[Point]:
    """The points of a method on an input, by bits."""
    curve = [point for (one, _, on), point in points.items() if (one, on) == (name, problem)]
    return sorted(curve, key=lambda point: point.bits)


def at_bits(curve: list[Point], bits: float) -> float | None:
    """NMSE at a number of bits, log-linear between the points of a curve; None outside it."""
    for left, right in itertools.pairwise(curve):
        if left.bits <= bits <= right.bits:
            share = (bits - left.bits) / (right.bits - left.bits)
            return left.nmse ** (1 - share) * right.nmse**share
    return None


def plot(points: Points, path: Path) -> None:
    names = list(dict.fromkeys(problem for _, _, problem in points))
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, math.ceil(len(names) / 2), sharex=True, sharey=True).flatten()
    for axis, problem in zip(axes, names, strict=False):
        for index, name in enumerate(dict.fromkeys(name for name, _, _ in points)):
            curve = curve_of(points, name, problem)
            x = [point.bits for point in curve]
            y = [point.nmse * 4**point.bits for point in curve]
            style = "o-" if len(curve) > 1 else "X"
            axis.plot(
                x, y, style, markersize=4, color=f"C{index}" if index < 10 else "k", label=name
            )
        axis.axhline(1, color="k", linestyle=":", label="Gaussian rate-distortion bound")
        rates = torch.linspace(1, 8, 100)
        bound = 4**rates / (4**rates - 1)
        axis.plot(rates, bound, color="k", linestyle="--", label="the same for unbiased codes")
        axis.set(yscale="log", title=problem)
        axis.set_ylim(0.8, 3000)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.supxlabel("bits on the wire per coordinate")
    figure.supylabel("4^bits |x^ - x|^2 / |x|^2 of one sender")
    figure.savefig(path, dpi=120)


def promises(points: Points) -> str:
    """What the tables give for N(0, 1), and the mean over Gaussian and lognormal input."""

    def measured(name: str, bits: int) -> float:
        pair = (points[name, f"b = {bits}", problem].nmse for problem in ("Gaussian", "lognormal"))
        return statistics.fmean(pair)

    rows = []
    for bits in range(1, 9):
        levels = codebooks.load("quic_fl_exact")[f"b{bits}"]
        expected = quic_fl.expected_vnmse(levels, (levels.size >> bits).bit_length() - 1)
        exact, eden = measured("QuicFL, exact mode", bits), measured("Eden", bits)
        row = [str(bits), f"{expected:.5g}", f"{exact:.5g}", f"{exact / expected - 1:+.1%}"]
        row += [f"{eden:.5g}"]
        if bits in (1, 2, 4):
            vector = measured("VectorQuantizer", bits)
            row += [f"{vector:.5g}", f"{vector / eden - 1:+.1%}"]
        rows.append([*row, *[""] * (7 - len(row))])
    header = [
        "b",
        "exact mode: table",
        "measured",
        "difference",
        "Eden",
        "VectorQuantizer",
        "against Eden",
    ]
    return table(header, rows)


def report(effort: Effort, folder: Path) -> str:
    points = simulate(effort)
    plot(points, folder / "accuracy.png")
    names = list(dict.fromkeys(problem for _, _, problem in points))
    curves = list(dict.fromkeys(name for name, _, _ in points))
    rows = []
    for name, settings in methods().items():
        for setting in settings:
            cells = [points[name, setting, problem] for problem in names]
            bits = [cell.bits for cell in cells]
            low, high = f"{min(bits):.3f}", f"{max(bits):.3f}"
            shown = low if low == high else f"{low} .. {high}"
            rows.append([f"{name}, {setting}", shown, *map(str, cells)])
    text = table(["", "bits on the wire", *names], rows)
    equal = ""
    for wire in (2.1, 4.0):
        rows = []
        for name in curves:
            values = [at_bits(curve_of(points, name, problem), wire) for problem in names]
            if any(values):
                cells = ["" if value is None else f"{value:.4g}" for value in values]
                rows.append([name, *cells])
        equal += f"\n{wire} bits on the wire\n\n" + table(["", *names], rows)
    numel = f"{effort.numel} coordinates (Gaussian, lognormal)"
    return f"""{heading()}
## Error of one sender against bits on the wire

Mean of |x^ - x|^2 / |x|^2 over {effort.seeds} seeds, with its standard error if that is above
2% (a few blocks hold most of a gradient's energy). Inputs: {numel},
and gradients of the demo's model (layers, width, heads = {effort.model}) on one rank. Bits are
payload bytes * 8 / numel, including headers, scales, exact values and padding; ranges are over the
inputs. The lattice's fields must hold a sum over ranks, here over 2. Uniform quantization, QSGD
and TernGrad are counted as plain fixed-width fields with float32 scales (TernGrad: 5 digits per
byte). "Elias" is the exact length of QSGD's own entropy code on these data. All methods are
unbiased except "TernGrad, biased".

{text}
![Error against bits on the wire](accuracy.png)

## At equal bits on the wire

Log-linear interpolation between a method's neighbouring points; empty outside its range.
{equal}
## Measured and expected error

vNMSE in blocks of {BLOCK}. The exact mode differs from its table since a block has limited room for
exact values.

{promises(points)}"""


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller inputs, shorter training")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(QUICK if args.quick else FULL, args.out)
    (args.out / "accuracy.md").write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    main()
