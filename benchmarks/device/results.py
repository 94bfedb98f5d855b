"""What the parts find out: written down line by line, and rendered as Markdown.

A part appends to a file of its own, so that nothing is lost when its process ends before its time.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.report import table

__all__ = ["Part", "Results", "markdown", "summary"]

DRY = "DRY RUN on a CPU: the clock is made up, nothing here is a measurement"


class Results:
    """What one part writes.

    Args:
        path: of the file, a JSON object a line.
        seconds: that the part has.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def row(self, table: str, **cells: object) -> None:
        """A row of the table of this title; numbers may be of any precision."""
        self._write({"row": cells, "table": table})

    def say(self, text: str) -> None:
        self._write({"say": text})

    def fact(self, **facts: object) -> None:
        """Of the machine, for the head of the report."""
        self._write({"facts": facts})

    def failure(self, text: str) -> None:
        """Something that should be right is not; the part goes on."""
        self._write({"failure": text})

    def target(
        self,
        what: str,
        found: float,
        goal: float,
        unit: str,
        *,
        must: float | None = None,
        least: bool = False,
    ) -> None:
        """What was found, to compare with a goal that it must not exceed, or must reach.

        Args:
            unit: "%" takes shares of one.
            must: what would do.
            least: whether the goal is the least that is wanted, and not the most.
        """
        self._write(
            {"target": what, "found": found, "goal": goal}
            | {"unit": unit, "must": must, "least": least}
        )

    def _write(self, what: dict[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(what) + "\n")


@dataclass
class Part:
    """What the parent knows of a part."""

    name: str
    status: str = "waits"
    seconds: float = 0.0
    found: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""
    """The end of what it printed, where it failed."""

    def read(self, path: Path) -> bool:
        """Take in the file of its `Results`; whether there was news."""
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        news = len(whole) > len(self.found)
        self.found = whole
        return news

    @property
    def failures(self) -> list[str]:
        return [entry["failure"] for entry in self.found if "failure" in entry]

    @property
    def targets(self) -> list[dict[str, Any]]:
        return [entry for entry in self.found if "target" in entry]

    @property
    def tables(self) -> dict[str, list[dict[str, Any]]]:
        tables: dict[str, list[dict[str, Any]]] = {}
        for entry in self.found:
            if "row" in entry:
                tables.setdefault(entry["table"], []).append(entry["row"])
        return tables

    @property
    def outcome(self) -> str:
        """In a few words."""
        if self.failures:
            return f"{self.status}, {len(self.failures)} failures"
        return self.status


def sentence(target: dict[str, Any], dry: bool) -> str:
    """Whether a target was met."""
    found, goal, must = (_number(target[key], target["unit"]) for key in ("found", "goal", "must"))
    least = target["least"]

    def reached(limit: float) -> bool:
        return bool(target["found"] >= limit if least else target["found"] <= limit)

    if dry:
        return f"(dry run) {target['target']}: {found}"
    verdict = "met" if reached(target["goal"]) else "missed"
    if verdict == "missed" and target["must"] is not None:
        verdict += f", and the {must} that would do " + (
            "reached" if reached(target["must"]) else "missed too"
        )
    return f"{target['target']}: {found} ({'at least' if least else 'at most'} {goal}): {verdict}."


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if unit == "%" else f"{_cell(value)} {unit}".rstrip()


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


def rows_as_table(rows: Sequence[dict[str, Any]]) -> str:
    header = list(dict.fromkeys(name for row in rows for name in row))
    words = [
        i for i, name in enumerate(header) if any(isinstance(row.get(name), str) for row in rows)
    ]
    cells = [[_cell(row.get(name)) for name in header] for row in rows]
    return table(header, cells, words)


def markdown(command: str, date: str, dry: bool, parts: Sequence[Part]) -> str:
    """The whole report."""
    facts: dict[str, Any] = {}
    for entry in (entry for part in parts for entry in part.found):
        facts |= entry.get("facts", {})
    device = facts.get("device", "an unknown device")
    lines = [f"# {DRY}" if dry else f"# The Triton kernels on {device}", ""]
    lines += [f"`{command}`, {date}.", ""]
    lines += ["; ".join(f"{name} {value}" for name, value in facts.items()) + ".", ""]
    lines += [
        "A time is the median of several, by CUDA events. The roofline is the time that the bytes "
        "of a call (each input read once, each output written once) take at the rate of a "
        "device-to-device copy of 1 GiB in the same run.",
        "",
        "## Targets",
        "",
        *(f"* {sentence(target, dry)}" for part in parts for target in part.targets),
        "",
        "## Parts",
        "",
        rows_as_table(
            [{"part": p.name, "outcome": p.outcome, "seconds": round(p.seconds)} for p in parts]
        ),
    ]
    for part in parts:
        lines += [f"## {part.name}", ""]
        lines += [f"* FAILED: {failure}" for failure in part.failures]
        lines += [f"* {entry['say']}" for entry in part.found if "say" in entry]
        lines += [""]
        for title, rows in part.tables.items():
            lines += [f"{title}:", "", rows_as_table(rows)]
        if part.log:
            lines += ["```", part.log.replace("```", "'''"), "```", ""]
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip("\n") + "\n"


def summary(dry: bool, parts: Sequence[Part], most: int = 40) -> str:
    """The end of what is printed, of at most so many lines."""
    lines = [DRY if dry else "The run in short:"]
    of_parts = [f"{p.name}: {p.outcome} ({p.seconds:.0f} s)" for p in parts]
    lines += ["; ".join(of_parts[i : i + 4]) for i in range(0, len(of_parts), 4)]
    targets = [f"* {sentence(target, dry)}" for part in parts for target in part.targets]
    failures = [f"! {part.name}: {failure}" for part in parts for failure in part.failures]
    room = max(3, most - len(lines) - len(targets) - 1)
    lines += [failure.replace("\n", " ")[:250] for failure in failures[:room]]
    if len(failures) > room:
        lines.append(f"! and {len(failures) - room} failures more, in gpu.md")
    lines += targets
    return "\n".join(lines[:most])
