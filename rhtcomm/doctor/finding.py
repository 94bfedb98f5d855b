"""What a check says."""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

__all__ = ["GRADES", "Check", "Finding", "Grade", "guarded", "merged"]

Grade = Literal["ok", "remark", "problem"]
GRADES: tuple[Grade, ...] = get_args(Grade)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        grade: "ok"; "remark": it works, but slower than it could, or not everywhere; "problem": it
            fails, hangs or gives wrong results, or it makes compression useless.
        topic: what was checked, in a word or two.
        fact: what was found.
        remedy: what to do about it; empty where nothing is to be done.
        key: what ranks are compared by, as facts with measured numbers differ between all of them;
            the fact, if empty.
    """

    grade: Grade
    topic: str
    fact: str
    remedy: str = ""
    key: str = ""

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.grade, self.topic, self.key or self.fact


Check = Callable[[], Sequence[Finding]]


def guarded(topic: str, check: Check, seconds: float) -> list[Finding]:
    """What the check finds: a problem if it raises, or does not end in time."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(check())
        except Exception as error:
            fact = f"the check failed: {type(error).__name__}: {' '.join(str(error).split())}"
            found.append(Finding("problem", topic, fact, "see the message; reinstall rhtcomm"))

    thread = threading.Thread(target=run, daemon=True)  # which Python does not wait for at its end
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        remedy = "something waits for ever: see what this check asks, in docs/doctor.md"
        return [Finding("problem", topic, f"the check did not end within {seconds:g} s", remedy)]
    return found


def merged(by_rank: Mapping[int, Sequence[Finding]]) -> list[tuple[tuple[int, ...], Finding]]:
    """Each finding once, with the ranks that have it, in the order of the checks."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    first: dict[tuple[str, str, str], Finding] = {}
    for rank, findings in sorted(by_rank.items()):
        for finding in findings:
            ranks.setdefault(finding.kind, []).append(rank)
            first.setdefault(finding.kind, finding)
    topics = list(dict.fromkeys(topic for _, topic, _ in first))
    order = sorted(first, key=lambda kind: (topics.index(kind[1]), ranks[kind]))
    return [(tuple(ranks[kind]), first[kind]) for kind in order]
