"""Times of exchanges, taken in turns, so that a noisy machine disturbs all contestants alike."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

import rhtcomm.hooks
from rhtcomm.bench.budget import MOST, TURN, admitted, allocate, schedule
from rhtcomm.bench.checks import CheckError, Problem, check
from rhtcomm.bench.contestants import Bucket, Contestant
from rhtcomm.bench.ranks import Ranks

__all__ = ["Budget", "Entry", "bar", "measure", "quantiles", "take_turn"]

# Seconds of encode, exchange, decode; bytes sent.
Spent = tuple[float, float, float, float]


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 10%, 50% and 90% quantiles."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], statistics.median(seconds), tenths[-1]


@dataclass
class Entry:
    """A contestant on buckets of one length, and what was measured of it."""

    contestant: Contestant
    problem: Problem
    nmse: float = math.nan
    failure: str = ""
    estimate: float = math.nan  # seconds of an exchange, from its check
    seconds: list[float] = field(default_factory=list)  # of the slowest rank, one each
    costs: list[Spent] = field(default_factory=list)  # of this rank

    @property
    def numel(self) -> int:
        return self.problem.numel

    @property
    def measured(self) -> bool:
        return bool(self.seconds)


def spent(contestant: Contestant) -> Spent:
    """By this rank until now; NaN for other hooks."""
    if not isinstance(contestant.state, rhtcomm.hooks.RHTState):
        return math.nan, math.nan, math.nan, math.nan
    stats = contestant.state.stats()
    return stats.encode_seconds, stats.exchange_seconds, stats.decode_seconds, stats.bytes_sent


def take_turn(entry: Entry, bucket: Bucket) -> list[float]:
    """Seconds of the exchanges of a turn, on this rank.

    The first one is not timed: a connection that was idle is slow at first, which does not happen
    within a step of training.
    """
    contestant, seconds = entry.contestant, []
    for exchange in range(TURN + 1):
        bucket.tensor.copy_(entry.problem.data)
        before = spent(contestant)
        elapsed = contestant.seconds(bucket)
        if exchange:
            after = spent(contestant)
            a, b, c, d = (y - x for x, y in zip(before, after, strict=True))
            entry.costs.append((a, b, c, d))
            seconds.append(elapsed)
    return seconds


class Budget:
    """Seconds that are left by the clock of rank 0; `parts` says what took how many."""

    def __init__(
        self, seconds: float, ranks: Ranks, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self._ranks, self._clock = seconds, ranks, clock
        self._start = self._last = clock()
        self.parts: dict[str, float] = {}

    def gone(self) -> float:
        """Seconds since the beginning; of rank 0, and only to be used for what it tells."""
        return self._clock() - self._start

    def end(self, part: str) -> None:
        """What was done since the last call belongs to this part."""
        now = self._clock()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now


def bar(total: int, what: str, ranks: Ranks) -> "tqdm[object]":
    """Progress on stderr of rank 0, where that is a terminal."""
    return tqdm(total=total, desc=what, leave=False, disable=None if ranks.first else True)


def measure(
    entries: Sequence[Entry], until: float, budget: Budget, ranks: Ranks, what: str
) -> list[Entry]:
    """Check entries, then time them in turns; all ranks call it alike.

    Args:
        entries: the more interesting ones first.
        until: seconds of the budget that may be gone at the end.

    Returns:
        Those for which there was no time. Of the others, `seconds` or `failure` is filled in.
    """
    checked, dropped = _check(entries, until, budget, ranks, f"{what}: checks")
    budget.end("checks")
    if not checked:
        return dropped
    costs = [(TURN + 1) * entry.estimate for entry in checked]
    due = ranks.tell(schedule(allocate(costs, until - budget.gone())))
    buckets: dict[int, Bucket] = {}
    local: list[list[float]] = [[] for _ in checked]
    with bar(sum(map(len, due)), what, ranks) as progress:
        for number, turn in enumerate(due):
            cost = sum(costs[index] for index in turn)
            if not ranks.tell(number == 0 or budget.gone() + cost <= until):
                break
            for index in turn:
                entry = checked[index]
                if entry.numel not in buckets:
                    buckets[entry.numel] = Bucket.of(entry.problem.data, entry.problem.number)
                progress.set_postfix_str(entry.contestant.name, refresh=False)
                local[index] += take_turn(entry, buckets[entry.numel])
                progress.update()
    for entry, seconds in zip(checked, local, strict=True):
        entry.seconds += ranks.largest(*seconds)
    budget.end(what)
    return dropped


def _check(
    entries: Sequence[Entry], until: float, budget: Budget, ranks: Ranks, what: str
) -> tuple[list[Entry], list[Entry]]:
    """Those that are right, and those for which there is no time."""
    start, checked, dropped = budget.gone(), list[Entry](), list[Entry]()
    with bar(len(entries), what, ranks) as progress:
        for entry in entries:
            progress.update()
            progress.set_postfix_str(entry.contestant.name, refresh=False)
            accepted = [one.estimate for one in checked]
            guess = _guess(entry, checked)
            fits = admitted(guess, accepted, budget.gone() - start, until - start)
            if not ranks.tell(fits):
                dropped.append(entry)
                continue
            try:
                entry.nmse, entry.estimate = check(entry.contestant, entry.problem)
            except CheckError as error:
                entry.failure = str(error)
            else:
                checked.append(entry)
    return checked, dropped


def _guess(entry: Entry, checked: Sequence[Entry]) -> float:
    """Seconds of an exchange that was not tried: those of the nearest in length and kind."""
    alike = [one for one in checked if one.contestant.compresses == entry.contestant.compresses]
    if not alike:
        alike = list(checked)
    if not alike:
        return 0.0
    nearest = min(alike, key=lambda one: abs(math.log(one.numel / entry.numel)))
    level = [one.estimate for one in alike if one.numel == nearest.numel]
    return statistics.median(level) * max(1.0, entry.numel / nearest.numel)


assert MOST * TURN >= 10  # enough for quantiles
