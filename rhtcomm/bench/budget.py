"""How the seconds of a run are divided; nothing here looks at a clock."""

import itertools
from collections.abc import Sequence

__all__ = ["LEAST", "MOST", "TURN", "admitted", "allocate", "schedule"]

TURN = 3  # timed exchanges of a contestant, one after the other, behind one that is not timed
LEAST, MOST = 1, 12  # turns of a contestant
_CHECK = 3  # exchanges that a check is expected to take
# Of the seconds, this part is for the least number of turns; more turns get the rest.
_RESERVED = 0.6


def admitted(
    guess: float, accepted: Sequence[float], spent: float, seconds: float, least: int = LEAST
) -> bool:
    """Whether one more contestant can be measured.

    Args:
        guess: seconds of one of its exchanges.
        accepted: the same of those that were checked.
        spent: seconds that are gone.
        seconds: of all.
        least: turns that each must get.
    """
    per_turn = (TURN + 1) * least
    needed = spent + _CHECK * guess + per_turn * (guess + sum(accepted))
    return needed <= seconds * (1.0 if not accepted else _RESERVED + 0.1 * (len(accepted) < 3))


def allocate(costs: Sequence[float], seconds: float) -> list[int]:
    """Turns of contestants whose turns cost so many seconds.

    All get as many seconds, and those that are quick no more than they can use; what they leave
    goes to the slower ones.
    """
    turns, left = [0] * len(costs), seconds
    by_cost = sorted(range(len(costs)), key=lambda index: costs[index])
    for done, index in enumerate(by_cost):
        share = left / (len(costs) - done)
        fitting = int(share / costs[index]) if costs[index] > 0 else MOST
        turns[index] = min(MOST, max(LEAST, fitting))
        left -= turns[index] * costs[index]
    return turns


def schedule(turns: Sequence[int]) -> list[list[int]]:
    """Who has a turn in each of max(turns) rounds; everybody in the first, then evenly spread."""
    count = max(turns, default=0)
    due: list[list[int]] = [[] for _ in range(count)]
    for index, times in enumerate(turns):
        for turn in itertools.islice(range(count), times):
            due[turn * count // times].append(index)
    return due
