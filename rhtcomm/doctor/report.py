"""The report on a terminal, or as JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from rhtcomm.doctor.finding import GRADES, Finding, Grade, merged
from rhtcomm.doctor.launcher import Launch

__all__ = ["printed"]


def printed(
    by_rank: Mapping[int, Sequence[Finding]],
    launch: Launch,
    as_json: bool,
    silent: Sequence[int] = (),
) -> int:
    """Print the findings, and return the exit status.

    Args:
        by_rank: of the ranks that came, or of this rank alone.
        silent: ranks that did not come.
    """
    lines = merged(by_rank)
    here = tuple(sorted(by_rank))
    texts = {finding.fact for _, finding in lines if finding.topic == "versions"}
    if len(texts) > 1 and len(here) > 1:
        fact = "ranks differ in their versions, see above"
        lines.append((here, Finding("remark", "ranks", fact, "install the same on all machines")))
    if silent:
        fact = "no word from them in time: they did not start, hang, or cannot reach rank 0"
        remedy = "see what they print, and whether they reach MASTER_ADDR and MASTER_PORT"
        lines.append((tuple(silent), Finding("problem", "ranks", fact, remedy)))
    counts = {grade: sum(one.grade == grade for _, one in lines) for grade in GRADES}
    if as_json:
        findings = [dataclasses.asdict(one) | {"ranks": list(ranks)} for ranks, one in lines]
        for finding in findings:
            del finding["key"]
        head = {"launcher": launch.name, "world_size": launch.world_size, "counts": counts}
        print(json.dumps(head | {"findings": findings}, indent=2), flush=True)
    else:
        print(_text(lines, launch, here, counts), flush=True)
    return 1 if counts["problem"] else 0


def _text(
    lines: Sequence[tuple[tuple[int, ...], Finding]],
    launch: Launch,
    here: tuple[int, ...],
    counts: Mapping[Grade, int],
) -> str:
    width = max(len(finding.topic) for _, finding in lines)
    whole = launch.world_size == len(here)
    rows = []
    for ranks, finding in lines:
        whose = "" if whole and ranks == here else f"{name_of(ranks)}: "
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        rows.append(f"{finding.grade:<7}  {finding.topic:<{width}}  {whose}{finding.fact}{remedy}")
    whose = f" on {name_of(here)}" if not whole else ""
    if launch.world_size > 1 and whole:
        whose = f" on {launch.world_size} ranks"
    problems, remarks = counts["problem"], counts["remark"]
    rows.append(
        f"{problems or 'no'} problem{'s' * (problems != 1)}, "
        f"{remarks or 'no'} remark{'s' * (remarks != 1)}{whose}"
    )
    return "\n".join(rows)


def name_of(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0 to 2, 5" """
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [str(a) if a == b else f"{a}{' to ' if b > a + 1 else ', '}{b}" for a, b in spans]
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(words)}"
