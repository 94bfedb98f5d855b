"""One sentence about what to do, from measured times; and the size at which compression begins."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from rhtcomm.bench.results import Row, Step, in_words, mebibytes

__all__ = [
    "PLAIN",
    "WORTHWHILE",
    "advise",
    "best_compressed",
    "best_plain",
    "crossover",
    "of_steps",
    "pays",
]

# What compression must gain to be worth its error and another dependency; as `plan` has it.
WORTHWHILE = 1.1
_AS_FAST = 1.05  # of two that differ by less, the one with the smaller error is taken
PLAIN = ("float32", "bf16")

One = TypeVar("One", Row, Step)


def best_plain(rows: Sequence[Row], numel: int) -> Row | None:
    """The fastest of float32 and bf16 on buckets of one length; None: neither was measured."""
    plain = [row for row in rows if row.numel == numel and row.contestant in PLAIN]
    return min(plain, key=lambda row: row.median, default=None)


def best_compressed(
    rows: Sequence[Row], numel: int, error: Callable[[Row], float], max_nmse: float
) -> Row | None:
    """Of this package's within the error allowed: the most exact of the fastest ones that pay.

    Where none pays, the fastest one.
    """
    within = [
        row
        for row in rows
        if row.numel == numel and row.quantizer is not None and error(row) <= max_nmse
    ]
    return _best(within, best_plain(rows, numel), error)


def _best(within: Sequence[One], plain: One | None, error: Callable[[One], float]) -> One | None:
    """See `best_compressed`."""
    fastest = min(within, key=lambda one: one.median, default=None)
    if fastest is None or plain is None or not pays(fastest, plain):
        return fastest
    equals = [one for one in within if one.median <= _AS_FAST * fastest.median]
    return min((one for one in equals if pays(one, plain)), key=error)


def pays(best: Row | Step, plain: Row | Step) -> bool:
    """Whether compression gains enough."""
    return best.median * WORTHWHILE <= plain.median


def _doubt(best: Row | Step, plain: Row | Step) -> str:
    """What to add where the times of both vary too much."""
    if best.low > plain.high or plain.low > best.high:
        return ""
    return "; these times overlap, so measure again with more --seconds or less other work"


def crossover(ratios: Sequence[tuple[int, float]]) -> float | None:
    """Coordinates from which on compression is the faster one, interpolated on logarithms.

    Args:
        ratios: for some lengths, how many times as fast it is.

    Returns:
        0.0: it is faster at all these lengths. None: it is not at the largest.
    """
    ratios = sorted(ratios)
    if not ratios or ratios[-1][1] < 1:
        return None
    for (small, slower), (large, faster) in reversed([*pairwise(ratios)]):
        if slower < 1:
            part = -math.log(slower) / (math.log(faster) - math.log(slower))
            return math.exp(math.log(small) + part * (math.log(large) - math.log(small)))
    return 0.0


def advise(
    rows: Sequence[Row],
    error: Callable[[Row], float],
    max_nmse: float = 0.03,
) -> str:
    """What to do, by the largest bucket that was measured.

    Args:
        error: expected for a row, relative to what is encoded, summed over hops.
        max_nmse: the largest that is allowed, as for `rhtcomm.plan`.
    """
    numel = max(
        (row.numel for row in rows if best_plain(rows, row.numel) and row.quantizer), default=0
    )
    plain = best_plain(rows, numel)
    if plain is None:
        return "No advice: float32, bf16 and compression were not all measured on one size."
    base = f"{plain.contestant} takes {_milliseconds(plain.median)} for {mebibytes(numel)}"
    best = best_compressed(rows, numel, error, max_nmse)
    if best is None:
        return f"Do not compress: {base}, and nothing within the error allowed was measured."
    if not pays(best, plain):
        return (
            f"Do not compress: {base}, and the fastest compression within the error allowed "
            f"({in_words(best)}) {_milliseconds(best.median)}{_doubt(best, plain)}."
        )
    return (
        f"Take {in_words(best)}: {plain.median / best.median:.1f} times as fast as "
        f"{plain.contestant} here ({_milliseconds(best.median)} instead of "
        f"{_milliseconds(plain.median)} for {mebibytes(numel)}); {_small(rows, best)}"
        f"{_doubt(best, plain)}."
    )


def _small(rows: Sequence[Row], best: Row) -> str:
    """What to do with small buckets."""
    ratios = []
    for row in rows:
        same = (row.contestant, row.carrier) == (best.contestant, best.carrier)
        plain = best_plain(rows, row.numel)
        if same and plain is not None:
            ratios.append((row.numel, plain.median / row.median))
    least = crossover(ratios)
    if not least:
        return f"it is faster down to {mebibytes(min(ratios)[0])}, the smallest size measured"
    digits = 1 - math.floor(math.log10(least))
    return f"below {mebibytes(least)} send uncompressed (min_numel={round(least, digits):.0f})"


def of_steps(steps: Sequence[Step], error: Callable[[Step], float], max_nmse: float = 0.03) -> str:
    """The same from training steps."""
    plain = min(
        (s for s in steps if s.contestant in PLAIN), key=lambda step: step.median, default=None
    )
    within = [s for s in steps if s.quantizer is not None and error(s) <= max_nmse]
    best = _best(within, plain, error)
    if plain is None or best is None:
        return "No advice: not enough training steps were measured."
    base = f"a step with {plain.contestant} takes {_milliseconds(plain.median)}"
    exposed = f"{_milliseconds(max(0.0, plain.exposed))} of it exposed communication"
    if not pays(best, plain):
        return (
            f"Do not compress: {base}, {exposed}, and the fastest within the error allowed "
            f"({in_words(best)}) {_milliseconds(best.median)}{_doubt(best, plain)}."
        )
    return (
        f"Take {in_words(best)}: a step takes {_milliseconds(best.median)}, "
        f"{plain.median / best.median:.1f} times as fast as with {plain.contestant} "
        f"({_milliseconds(plain.median)}, {exposed}){_doubt(best, plain)}."
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
