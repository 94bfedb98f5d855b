"""What `choose_rotations` chooses and costs, and the error that it lets through."""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch

from lib.gradients import DEMO, SMALL, gradients
from lib.progress import progress
from lib.report import heading, table
from lib.timing import interleave, milliseconds
from rhtcomm import Codec, Eden, Key, QuicFL, VectorQuantizer
from rhtcomm.moments import TOLERANCE, choose_rotations
from theory.errors import after_transforms, label, measure
from theory.inputs import FULL, Effort, inputs
from theory.laws import given_covariance


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
        plain, auto = times[f"{name} plain"], times[f"{name} auto"]
        cost = f"{auto[1] / plain[1] - 1:+.1%}"
        rows.append([name, *milliseconds(plain), milliseconds(auto)[0], cost])
    return table(["", "plain, ms", "10% .. 90%", "with the check, ms", "cost"], rows)


def choices_and_errors(effort: Effort, size: int) -> str:
    """A row per input: the choice for each quantizer, and what one transform does there."""
    quantizers = (QuicFL(4), Eden(1), Eden(4), VectorQuantizer(1), VectorQuantizer(4))
    problems = inputs(size) | borderline(size)
    draws, batches = effort.draws, effort.batches // 2
    rows = []
    for name, x in progress(problems.items(), "moment check", keep=True):
        cells = [f"{moment:.3f}" for moment in moments(x)]
        for quantizer in quantizers:
            choice = choose_rotations(x, group=quantizer.group, safe=quantizer.rotations)
            codec = Codec(quantizer, rotations="auto", block=size)
            asked = codec.wanted_rotations(codec.encode(x, Key(seed=2))[None])
            if asked != choice:
                raise AssertionError(f"{name}: the payload asks for {asked}, not {choice}")
            one = measure(after_transforms(quantizer, 1, x, draws, batches), x)
            safe = measure(after_transforms(quantizer, quantizer.rotations, x, draws, batches), x)
            ratios = (one.one_shot / safe.one_shot, one.averaged / safe.one_shot)
            shown = " / ".join(f"{r:.3g}" if r > 10 else f"{r:.3f}" for r in ratios)
            cells.append(f"**{choice}**: {shown}")
        rows.append([name, *cells])
    columns = (f"{label(quantizer)} ({quantizer.rotations})" for quantizer in quantizers)
    return table(["", "bound", "covariance", *columns], rows)


def moment_check(effort: Effort, size: int = 4096) -> str:
    """Its choice on every input, and what one transform does there."""
    full = effort is FULL
    model, steps = (DEMO, (1, 20, 50)) if full else (SMALL, (1,))
    choices = "; ".join(
        f"{name} k = {choose_rotations(x)}, {choose_rotations(x, group=2, safe=3)}, "
        f"{choose_rotations(x, group=8, safe=3)}"
        for name, x in gradients(model, steps).items()
    )
    numel = 25 << 18 if full else 1 << 18
    return f"""{heading()}
## What the moment check chooses, and what it lets through, d = {size}

"bound" is 0.5606 sum |x_i|^3 / |x|^3. "covariance" is the largest one inside groups of 8 after
one rotation. `choose_rotations` has a tolerance of {TOLERANCE}. A column per quantizer (in its
title: the k that is safe for every input) shows the chosen k in bold, then two ratios for k = 1,
chosen or not: its vNMSE, and its N NMSE(N), N = {effort.draws}, each over the vNMSE of the safe k.
For an unbiased code the ratios are equal; otherwise the squared bias over |x|^2 is their difference
times vNMSE / N. The last three inputs are about the worst that the bound accepts.

{choices_and_errors(effort, size)}
On gradients of the demo's model (scalar; groups of 2; groups of 8): {choices}.

Cost: encode of {numel} coordinates with one rotation, in turns within one run, medians.

{check_cost(50 if full else 10, numel)}"""
