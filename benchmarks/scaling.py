"""What the cost model says where this machine cannot go: `python benchmarks/scaling.py`.

Writes benchmarks/scaling.md: the model checked against results/throughput.csv, then its predictions
for many ranks and fast links, from the codec's speed on this machine.
"""

import os
import statistics
from pathlib import Path

import torch

from lib.machine import machine
from lib.report import RESULTS, read_csv, table
from rhtcomm.cost import CodecSpeed, Prediction, measure_codec, plan

HERE = Path(__file__).parent
NUMEL = 25 * 2**18
GBPS = {"100mbit": 0.1, "1gbit": 1.0}
ALLOWED = 0.25


def check(speeds: dict[int, CodecSpeed]) -> str:
    """Predicted over measured, for what was measured over Gloo on links that two cores can fill."""
    rows, ratios = [], []
    for row in read_csv(RESULTS / "throughput.csv"):
        link, contestant, n = row["link"], row["contestant"], int(row["world_size"])
        if link not in GBPS or row["carrier"] != "gloo" or float(row["mebibytes"]) != 25:
            continue
        crowded = max(1.0, 2 * n / (os.cpu_count() or 1))
        found = plan(NUMEL, n, GBPS[link], speeds=speeds, bits=(1, 2, 4, 8), slowdown=crowded)
        names = {name_of(p): p for p in found.predictions}
        if contestant in names:
            measured = float(row["median_ms"])
            predicted = 1e3 * names[contestant].seconds
            ratios.append(predicted / measured)
            times = [f"{measured:.1f}", f"{predicted:.1f}", f"{ratios[-1]:.2f}"]
            rows.append([link, str(n), contestant, *times])
    within = sum(abs(ratio - 1) <= ALLOWED for ratio in ratios)
    header = ["link", "ranks", "", "measured, ms", "predicted, ms", "predicted / measured"]
    return (
        f"{within} of {len(ratios)} predictions are within {ALLOWED:.0%} of the measurement; the "
        f"median ratio is {statistics.median(ratios):.2f}.\n\n{table(header, rows, left=(0, 2))}"
    )


def name_of(p: Prediction) -> str:
    """As results/throughput.csv has it."""
    return f"rht{p.bits} {p.algorithm}" if p.bits <= 8 else p.algorithm


def scaling(speeds: dict[int, CodecSpeed], cores: int) -> str:
    rows = []
    for n in (8, 64, 512):
        for gbps in (10, 25, 100, 400):
            found = plan(NUMEL, n, gbps, speeds=speeds, slowdown=1 / cores)
            float32, bf16 = (1e3 * p.seconds for p in found.predictions[:2])
            allowed = (p for p in found.predictions if p.bits <= 8 and p.nmse <= 0.03)
            best = min(allowed, key=lambda p: p.seconds)
            milliseconds = 1e3 * best.seconds
            row = [str(n), str(gbps), f"{float32:.1f}", f"{bf16:.1f}", best.name]
            row += [f"{milliseconds:.1f}", f"{bf16 / milliseconds:.2f}x"]
            rows.append([*row, "yes" if found.pays else "no"])
    header = ["ranks", "Gbit/s", "float32, ms", "bf16, ms", "best compressed", "ms"]
    return table([*header, "faster than bf16", "pays"], rows, left=(4, 7))


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
        "Codec at 4 bits, one thread, nanoseconds per coordinate: "
        f"encode {1e9 * at4.encode:.2f}, decode {1e9 * at4.decode:.2f}, each further payload "
        f"{1e9 * at4.decode_more:.2f}.",
        "",
        "## Against measurements",
        "",
        "25 MiB over Gloo, `results/throughput.csv`. All ranks and their links share one machine's",
        "cores, and each rank keeps two busy, one with its codec, one with Gloo's thread and the",
        "emulation of its link: with fewer, the codec is taken to be slower by as much.",
        "",
        check(speeds),
    ]
    for cores in (1, 8):
        text += [
            f"## On paper: 25 MiB, {cores} core{'s' * (cores > 1)} per rank for the codec",
            "",
            "Nothing here was measured beyond the codec's speed on one core"
            + (", taken to grow with the cores." if cores > 1 else ".")
            + " 50 microseconds per message; error allowed: that of 4 bits.",
            "",
            scaling(speeds, cores),
        ]
    (HERE / "scaling.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
