"""What the cost model says where this machine cannot go: `python benchmarks/scaling.py`.

Writes benchmarks/scaling.md: the model checked against results/throughput.csv, then its predictions
for many ranks and fast links, from the codec's speed on this machine.
"""

import csv
import os
import statistics
from pathlib import Path

import torch
from kernels import machine

from rhtcomm.cost import CodecSpeed, Prediction, measure_codec, plan

HERE = Path(__file__).parent
NUMEL = 25 * 2**18
GBPS = {"100mbit": 0.1, "1gbit": 1.0}
ALLOWED = 0.25


def check(speeds: dict[int, CodecSpeed]) -> list[str]:
    """Predicted over measured, for what was measured over Gloo on links that two cores can fill."""
    lines = [
        "| link | ranks | | measured, ms | predicted, ms | predicted / measured |",
        "|---|---:|---|---:|---:|---:|",
    ]
    ratios = []
    with (HERE / "results" / "throughput.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["link"] not in GBPS or row["carrier"] != "gloo" or float(row["mebibytes"]) != 25:
            continue
        n = int(row["world_size"])
        crowded = max(1.0, 2 * n / (os.cpu_count() or 1))
        found = plan(
            NUMEL, n, GBPS[row["link"]], speeds=speeds, bits=(1, 2, 4, 8), slowdown=crowded
        )
        names = {_name(p): p for p in found.predictions}
        if row["contestant"] in names:
            measured = float(row["median_ms"])
            predicted = 1e3 * names[row["contestant"]].seconds
            ratios.append(predicted / measured)
            lines.append(
                f"| {row['link']} | {n} | {row['contestant']} | {measured:.1f} | {predicted:.1f} "
                f"| {ratios[-1]:.2f} |"
            )
    within = sum(abs(ratio - 1) <= ALLOWED for ratio in ratios)
    summary = (
        f"{within} of {len(ratios)} predictions are within {ALLOWED:.0%} of the measurement; the "
        f"median ratio is {statistics.median(ratios):.2f}."
    )
    return [summary, "", *lines]


def _name(p: Prediction) -> str:
    return f"rht{p.bits} {p.algorithm}" if p.bits <= 8 else p.algorithm


def scaling(speeds: dict[int, CodecSpeed], cores: int) -> list[str]:
    lines = [
        "| ranks | Gbit/s | float32, ms | bf16, ms | best compressed | ms | faster than bf16 "
        "| pays |",
        "|---:|---:|---:|---:|---|---:|---:|---|",
    ]
    for n in (8, 64, 512):
        for gbps in (10, 25, 100, 400):
            found = plan(NUMEL, n, gbps, speeds=speeds, slowdown=1 / cores)
            float32, bf16 = (1e3 * p.seconds for p in found.predictions[:2])
            allowed = (p for p in found.predictions if p.bits <= 8 and p.nmse <= 0.03)
            best = min(allowed, key=lambda p: p.seconds)
            lines.append(
                f"| {n} | {gbps} | {float32:.1f} | {bf16:.1f} | {best.name} "
                f"| {1e3 * best.seconds:.1f} | {bf16 / (1e3 * best.seconds):.2f}x "
                f"| {'yes' if found.pays else 'no'} |"
            )
    return lines


def main() -> None:
    where = machine()
    torch.set_num_threads(1)
    speeds = {bits: measure_codec(bits) for bits in range(1, 9)}
    at4 = speeds[4]
    text = [
        "# The cost model, checked and extended",
        "",
        f"Written by `python benchmarks/scaling.py` on {where}.",
        "The formula is at the top of `rhtcomm/cost.py`; `python -m rhtcomm plan` applies it.",
        "Codec at 4 bits, one thread, nanoseconds a coordinate: "
        f"encode {1e9 * at4.encode:.2f}, decode {1e9 * at4.decode:.2f}, each further payload "
        f"{1e9 * at4.decode_more:.2f}.",
        "",
        "## Against measurements",
        "",
        "25 MiB over Gloo, `results/throughput.csv`. All ranks and their links share one machine's",
        "cores, and each rank keeps two busy, one with its codec, one with Gloo's thread and the",
        "emulation of its link: with fewer, the codec is taken to be slower by as much.",
        "",
        *check(speeds),
    ]
    for cores in (1, 8):
        text += [
            "",
            f"## On paper: 25 MiB, {cores} core{'s' * (cores > 1)} a rank for the codec",
            "",
            "Nothing here was measured beyond the codec's speed on one core"
            + (", taken to grow with the cores." if cores > 1 else ".")
            + " 50 microseconds a message; error allowed: that of 4 bits.",
            "",
            *scaling(speeds, cores),
        ]
    (HERE / "scaling.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
