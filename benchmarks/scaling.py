"""The cost model, checked where this machine can go, and what it says where it cannot.

    python benchmarks/scaling.py --measure      measure first (root; 4 minutes)
    python benchmarks/scaling.py                write scaling.md from the last measurement

Measures by `python -m rhtcomm bench`: 2 to 16 ranks of this machine on loopback, and 2 and 4 on
emulated links of 1 Gbit/s. Then predicts each run from another one, as `plan --from` does, and in
the end larger clusters, from the run of 2 ranks on loopback.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.machine import machine
from lib.processes import execute, on_links
from lib.progress import progress
from lib.report import RESULTS, table
from rhtcomm.planning.measured import Measured
from rhtcomm.planning.plan import Plan, plan

HERE = Path(__file__).parent
FILES = RESULTS / "scaling"
RUNS = [("loopback", 2), ("loopback", 4), ("loopback", 8), ("loopback", 16), ("1gbit", 2)]
RUNS += [("1gbit", 4)]
GBPS = {"loopback": 1000.0, "1gbit": 1.0}  # loopback has no rate of its own: processors set it
ALLOWED = 0.25
NUMEL = 25 * 2**18


@dataclass(frozen=True)
class Run:
    """Of bench: what it measured for predictions, and times by size and way to exchange."""

    measured: Measured
    times: dict[tuple[int, str], tuple[float, float]]  # median, and 10% of the times are below
    load: float

    @classmethod
    def read(cls, link: str, ranks: int) -> "Run":
        path = FILES / f"{link}-{ranks}.json"
        content = json.loads(path.read_text())
        times = {}
        for row in content["rows"]:
            name = row["contestant"]
            if row["quantizer"] is not None:
                name = f"{row['bits']:g} bits, {row['algorithm']}"
            times[row["numel"], name] = (row["median"], row["low"])
        return cls(Measured.read(path), times, content["load"])


def measure(link: str, ranks: int, seconds: float) -> None:
    """Run bench, and keep what it writes, with the load average of the time."""
    FILES.mkdir(parents=True, exist_ok=True)
    path = FILES / f"{link}-{ranks}.json"
    arguments = ["--seconds", str(seconds), "--json", str(path), "--quantizers", "quic_fl"]
    arguments += ["--bits", "2", "4", "8", "--algorithms", "all_gather", "two_shot"]
    bench = ["-m", "rhtcomm", "bench", *arguments]
    if link == "loopback":
        execute([sys.executable, *bench, "--ranks", str(ranks)])
    else:
        execute([*on_links(ranks, link), *bench])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"load": round(os.getloadavg()[0], 1)}, indent=1) + "\n")


def predicted(
    run: Run, ranks: int, numel: int, cores: float, gbps: float, threads: int = 1
) -> Plan:
    """With several threads the codec is taken to be as many times as fast."""
    measured = run.measured
    speeds = measured.speeds["quic_fl"]
    return plan(
        numel,
        ranks,
        gbps,
        link=measured.link,
        speeds=speeds,
        bits=sorted(speeds),
        cores=cores,
        threads=threads,
        slowdown=measured.threads / threads,
    )


def section(source: tuple[str, int], target: tuple[str, int]) -> str:
    """Times that bench measured, and predictions for them from another run of bench."""
    run, other = Run.read(*source), Run.read(*target)
    link, ranks = target
    # All ranks share the cores of this machine, those on emulated links too.
    cores = (os.cpu_count() or 1) / ranks
    rows, counts = [], []
    for numel in sorted({numel for numel, _ in other.times if numel >= 1 << 18}):
        found = predicted(run, ranks, numel, cores, GBPS[link])
        of_size = []
        for p in found.predictions:
            if (numel, p.name) not in other.times:
                continue
            median, low = other.times[numel, p.name]
            times = [f"{1e3 * time:.1f}" for time in (low, median, p.seconds)]
            ratios = p.seconds / low, p.seconds / median
            of_size.append([abs(ratio - 1) <= ALLOWED for ratio in ratios])
            shown = [f"{ratio:.2f}" for ratio in ratios]
            rows.append([f"{numel / 2**18:g} MiB", p.name, *times, *shown])
        if of_size:
            low_within, median_within = map(sum, zip(*of_size, strict=True))
            counts.append(
                f"{numel / 2**18:g} MiB: {median_within} of {len(of_size)} predictions are within "
                f"{ALLOWED:.0%} of the median,\n"
                f"{low_within} within {ALLOWED:.0%} of the fastest 10%."
            )
    header = ["size", "", "10% of the times, ms", "median, ms", "predicted, ms"]
    header += ["predicted / 10%", "predicted / median"]
    counts.append(f"\nLoad average at the end: {other.load:g}.")
    return (
        f"### From {source[0]}, {source[1]} ranks, to {target[0]}, {target[1]} ranks\n\n"
        + "\n".join(counts)
        + f"\n\n{table(header, rows, left=(0, 1))}"
    )


def on_paper(cores: int) -> str:
    run = Run.read("loopback", 2)
    rows = []
    for ranks in (8, 16, 64):
        for gbps in (1, 10, 25, 100):
            found = predicted(run, ranks, NUMEL, cores, gbps, threads=cores)
            float32, bf16 = (1e3 * p.seconds for p in found.predictions[:2])
            allowed = (p for p in found.predictions if p.bits <= 8 and p.nmse <= 0.03)
            best = min(allowed, key=lambda p: p.seconds)
            milliseconds = 1e3 * best.seconds
            parts = (best.link_seconds, best.codec_seconds, best.posting_seconds)
            row = [str(ranks), str(gbps), f"{float32:.1f}", f"{bf16:.1f}", best.name]
            row += [f"{milliseconds:.1f}", *(f"{1e3 * part:.1f}" for part in parts)]
            rows.append([*row, f"{bf16 / milliseconds:.2f}x", "yes" if found.pays else "no"])
    header = ["ranks", "Gbit/s", "float32", "bf16", "best compressed", "time", "link", "codec"]
    header += ["posting", "faster than bf16", "pays"]
    return table(header, rows, left=(4, 10))


def report(remark: str) -> str:
    loopback = Run.read("loopback", 2)
    link, at4 = loopback.measured.link, loopback.measured.speeds["quic_fl"][4]
    text = f"""# The cost model, checked and extended

Written by `python benchmarks/scaling.py` on {machine()}.
The formula is at the top of `rhtcomm/planning/cost.py`; `python -m rhtcomm plan --from` applies it.
{remark}

Measured with 2 ranks on loopback: {1e6 * link.posting:.0f} us of a core per message, \
{1e6 * link.latency:.0f} us latency,
{1e9 * link.transport:.2f} ns of a core per byte sent and received; codec at 4 bits, one thread, \
ns per coordinate: encode {1e9 * at4.encode:.2f},
decode {1e9 * at4.decode:.2f}, each further payload {1e9 * at4.decode_more:.2f}.

## From one link to another

What bench measured on one link predicts another one. All ranks share the {os.cpu_count()} cores of
one machine. Where other programs use them too, the fastest 10% of the times are nearest to those of
a machine without other work, which the model predicts.

"""
    for ranks in (2, 4):
        text += section(("loopback", ranks), ("1gbit", ranks)) + "\n"
        text += section(("1gbit", ranks), ("loopback", ranks)) + "\n"
    text += """## More ranks on the same cores

What bench measured with 2 ranks predicts more of them. 1 MiB takes longer than predicted, since
threads wait for the cores that all ranks share. Gloo's own sum takes less than predicted at 25 MiB:
with a core for itself, which the 2 ranks had, it spins while it waits, and this counts as work.

"""
    for ranks in (4, 8, 16):
        text += section(("loopback", 2), ("loopback", ranks)) + "\n"
    fastest = 8 / (1e9 * link.all_reduce)
    for cores in (1, 8):
        text += f"""## On paper: 25 MiB, {cores} core{"s" * (cores > 1)} per rank

Nothing here was measured with so many ranks or on such a link. It rests on figures of 2 ranks on
loopback{"" if cores == 1 else ", with a codec that is taken to grow with the cores"}. \
The error allowed is that of 4 bits. Times in ms.
Uncompressed gradients are sent over Gloo, where one thread moves the bytes of a rank:
{fastest:.0f} Gbit/s of float32, however fast its link is.

{on_paper(cores)}
"""
    return text.rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run bench first, as root")
    parser.add_argument("--seconds", type=float, default=40, help="of each run of bench")
    parser.add_argument("--remark", default="", help="on the machine's other work")
    arguments = parser.parse_args()
    for link, ranks in progress(RUNS if arguments.measure else [], keep=True):
        measure(link, ranks, arguments.seconds)
    (HERE / "scaling.md").write_text(report(arguments.remark))


if __name__ == "__main__":
    main()
