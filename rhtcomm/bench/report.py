"""What `python -m rhtcomm bench` prints."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rhtcomm.bench.advice import best_plain
from rhtcomm.bench.results import Result, Row, Step, mebibytes
from rhtcomm.markdown import table

__all__ = ["printed"]

_HEADER = (
    *("MiB", "", "bits", "algorithm", "over", "median, ms", "10% .. 90%", "speed"),
    *("encode", "exchange", "decode", "MB sent", "NMSE"),
)


def printed(result: Result, seconds: float, file: Path | None = None) -> str:
    """All of it; the advice is the last line. `file`: where --json wrote."""
    parts = [_heading(result.facts), _EXPLANATION, _exchanges(result.rows)]
    if result.steps:
        parts.append(_of_steps(result.steps))
    parts += [f"Failed, and so not timed: {_who(one)}: {one['reason']}." for one in result.failed]
    if result.dropped:
        parts.append(_left_out(result, seconds))
    parts.append(_times(result.parts, seconds))
    if result.facts["nodes"] == 1 and result.advice.startswith("Do not compress"):
        parts.append(_other_links(file))
    return "\n\n".join([*parts, result.advice])


def _other_links(file: Path | None) -> str:
    written = "" if file else "`--json bench.json` and then "
    return (
        f"This is one machine: for other links, use {written}"
        f"`python -m rhtcomm plan --from {file or 'bench.json'} --link-gbps 1`."
    )


_EXPLANATION = (
    "Milliseconds until the slowest rank has the mean of a bucket, medians of some rounds. Speed: "
    "how many times\nas fast as the faster one of float32 and bf16. Encode, exchange (what it "
    "waited for) and decode: rank 0.\nNMSE: squared error of the mean, checked before. Each "
    "quantizer by its fastest algorithm; --csv and --json have all."
)


def _heading(facts: Mapping[str, Any]) -> str:
    ranks, nodes, threads = facts["world_size"], facts["nodes"], facts["threads"]
    load = f"; load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    text = (
        f"{_count(ranks, 'rank')} on {_count(nodes, 'node')}, {facts['backend']}, "
        f"{facts['device']}; {_count(threads, 'thread')} per rank, {_count(facts['cores'], 'core')}"
        f" per node; kernels: {facts['kernels']}\n"
        f"{facts['processor']}; torch {facts['torch']}, rhtcomm {facts['rhtcomm']}{load}"
    )
    link = facts.get("link")
    if link:
        text += (
            f"\nLink: {link['gbps']:.3g} Gbit/s, {1e6 * link['latency']:.0f} us latency, "
            f"{1e6 * link['posting']:.0f} us to post a message"
        )
    return text


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _exchanges(rows: Sequence[Row]) -> str:
    """Larger buckets first, and of each size the fastest first.

    Of each quantizer and number of bits only the fastest way, to keep it short.
    """
    ordered = sorted(rows, key=lambda row: (-row.numel, row.median))
    shown: dict[tuple[object, ...], Row] = {}
    for row in ordered:
        shown.setdefault((row.numel, row.quantizer or row, row.bits), row)
    lines = [_cells(row, best_plain(rows, row.numel)) for row in shown.values()]
    return table(_HEADER, lines, left=5)


def _cells(row: Row, plain: Row | None) -> list[str]:
    name = row.quantizer or row.contestant
    sent = "" if row.bytes_sent is None else f"{row.bytes_sent / 1e6:.3g}"
    parts = [_milliseconds(value) for value in (row.encode, row.exchange, row.decode)]
    return [
        f"{row.numel / 2**18:.3g}",
        name,
        f"{row.bits:g}" if row.quantizer else "",
        row.algorithm or "",
        row.carrier,
        _milliseconds(row.median),
        f"{_milliseconds(row.low)} .. {_milliseconds(row.high)}",
        f"{plain.median / row.median:.2f}" if plain else "",
        *parts,
        sent,
        f"{row.nmse:.2g}",
    ]


def _of_steps(steps: Sequence[Step]) -> str:
    plain = min(
        (step.median for step in steps if step.contestant in ("float32", "bf16")), default=math.nan
    )
    lines = [
        [
            step.quantizer or step.contestant,
            f"{step.bits:g}" if step.quantizer else "",
            step.algorithm or "",
            _milliseconds(step.median),
            f"{_milliseconds(step.low)} .. {_milliseconds(step.high)}",
            f"{plain / step.median:.2f}",
            "" if index == 0 else _milliseconds(step.exposed),
        ]
        for index, step in enumerate(steps)
    ]
    header = ["", "bits", "algorithm", "median, ms", "10% .. 90%", "speed", "exposed"]
    return (
        f"Training steps, {steps[0].rounds} rounds. Exposed: what a step takes longer than one "
        f"without communication.\n\n{table(header, lines, left=3)}"
    )


def _milliseconds(seconds: float | None) -> str:
    if seconds is None or math.isnan(seconds):
        return ""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _who(one: Mapping[str, Any]) -> str:
    where = "training steps" if one["numel"] is None else mebibytes(one["numel"])
    name = re.sub(r"^rht1 ", "1 bit, ", one["contestant"])
    name = re.sub(r"^rht(\S+)", r"\1 bits,", name)
    return f"{name} over {one['carrier']}, {where}"


def _left_out(result: Result, seconds: float) -> str:
    names = [_who(one) for one in result.dropped]
    all_of_them = len(names) + len(result.rows) + len(result.steps)
    shown = "; ".join(names[:3]) + ("; ..." if len(names) > 3 else "")
    return (
        f"Left out, since --seconds {seconds:g} does not hold all: {len(names)} of {all_of_them} "
        f"({shown}). --seconds gives more; --quantizers, --bits and --algorithms choose."
    )


def _times(parts: Mapping[str, float], seconds: float) -> str:
    told = ", ".join(f"{what} {took:.1f} s" for what, took in parts.items())
    return f"Time: {told}; {sum(parts.values()):.1f} of {seconds:g} s."
