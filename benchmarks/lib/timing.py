"""Times of several contestants in one run, so that a noisy machine disturbs all alike."""

import time
from collections.abc import Callable

from lib.progress import progress
from rhtcomm.bench.rounds import quantiles

__all__ = ["interleave", "milliseconds", "quantiles"]


def milliseconds(times: tuple[float, float, float]) -> tuple[str, str]:
    """Cells of a median and of the 10% and 90% quantiles."""
    low, median, high = (1e3 * seconds for seconds in times)
    return f"{median:.2f}", f"{low:.2f} .. {high:.2f}"


def interleave(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> dict[str, tuple[float, float, float]]:
    """Quantiles of the time of each, taken in turns; `before` is called before each, untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant()
    for _ in progress(range(rounds)):
        for name, contestant in contestants.items():
            before()
            start = clock()
            contestant()
            seconds[name].append(clock() - start)
    return {name: quantiles(values) for name, values in seconds.items()}
