"""Time of one gradient bucket's exchange, as DDP sees it, on loopback and on emulated links.

    python benchmarks/throughput.py                                     all of it (root; 25 minutes)
    python benchmarks/throughput.py --links 1gbit --ranks 2 --contestants float32 "rht4 *"
    python benchmarks/throughput.py --quick

Time runs from the call of the communication hook until its future is done, on the slowest rank,
after a barrier. All contestants take turns in the same processes, on the same data. A turn is three
exchanges after one that is not timed, since a connection that was idle is slow at first, which does
not happen within a step of training. A time is taken only after the check of the same run: the
hook's mean is as near to the exact one as its error allows. Each link and number of ranks is one
run; its rows replace those of an earlier one in throughput.csv, from which throughput.md and
throughput.png are made.
"""

import argparse
import fnmatch
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import rhtcomm
from lib.machine import machine
from lib.processes import MPIEXEC, ONE_THREAD, execute, mpirun, on_links
from lib.progress import progress
from lib.report import RESULTS, read_csv, table, write_csv
from rhtcomm.bench.budget import TURN
from rhtcomm.bench.checks import Problem, check
from rhtcomm.bench.contestants import (
    Bucket,
    Contestant,
    compressed,
    compressed_by,
    power_sgd,
    torchs,
    uncompressed_by_mpi,
)
from rhtcomm.bench.exchanges import row_of as figures
from rhtcomm.bench.ranks import Ranks
from rhtcomm.bench.rounds import Entry, take_turn
from rhtcomm.communicators import Topology

MBIT = {"100mbit": 100, "1gbit": 1000, "10gbit": 10_000}
BITS, ALGORITHMS = (1, 2, 4, 8), ("all_gather", "two_shot")


def contestants(world_size: int, patterns: list[str]) -> list[Contestant]:
    """Those whose name, or name and carrier, match a pattern."""
    everybody = torchs("gloo", world_size, ("float32", "fp16", "bf16"))
    everybody += [power_sgd("gloo", world_size, rank) for rank in (1, 4)]
    everybody += rhtcomms("gloo", None)  # each hook makes a group of its own, as in training
    if "PMI_RANK" in os.environ:
        mpi = rhtcomm.MPICommunicator()
        everybody.append(uncompressed_by_mpi(mpi))
        everybody += rhtcomms("mpi", lambda: mpi)
    return [
        one
        for one in everybody
        for names in [(one.name, f"{one.name}, {one.carrier}")]
        if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)
    ]


def rhtcomms(carrier: str, make: Callable[[], Topology] | None) -> list[Contestant]:
    """This package's hook by bits and algorithm."""
    found = []
    for bits in BITS:
        found += compressed_by(carrier, [bits], ["quic_fl"], ALGORITHMS, make)
        found += compressed_by(carrier, [bits], ["lattice"], ALGORITHMS, make)
        if bits == 4:
            found += [
                compressed(carrier, bits, algorithm, "quic_fl", make, rotations="auto")
                for algorithm in ALGORITHMS
            ]
    return found


def measure(link: str, mebibytes: float, rounds: int, patterns: list[str]) -> list[dict[str, Any]]:
    """One row per contestant; on every rank, with the times of the slowest."""
    ranks = Ranks(torch.device("cpu"))
    problem = Problem(int(mebibytes * 2**18), ranks)
    field = [Entry(one, problem) for one in contestants(ranks.world_size, patterns)]
    for entry in progress(field, "checks", shown=ranks.first):
        entry.nmse, _ = check(entry.contestant, problem)
    bucket = Bucket.of(problem.data)
    for _ in progress(range(-(-rounds // TURN)), link, shown=ranks.first):
        for entry in field:
            entry.seconds += take_turn(entry, bucket)
    rows = []
    for entry in field:
        entry.seconds = ranks.largest(*entry.seconds)
        run = {"link": link, "world_size": ranks.world_size, "mebibytes": mebibytes}
        rows.append(run | row_of(entry, link))
        entry.contestant.close()
    return rows


def row_of(entry: Entry, link: str) -> dict[str, Any]:
    """A contestant's figures, as the CSV has them."""
    found = figures(entry)
    sent = found.bytes_sent or 0.0
    times = {
        "median_ms": found.median,
        "low_ms": found.low,
        "high_ms": found.high,
        "ideal_ms": 8 * sent / (MBIT[link] * 1e6) if link in MBIT else 0.0,
    }
    own = {f"{what}_ms": getattr(found, what) for what in ("encode", "exchange", "decode")}
    return {
        "contestant": found.contestant,
        "carrier": found.carrier,
        "rounds": found.rounds,
        **{name: f"{1e3 * value:.3f}" for name, value in times.items()},
        "nmse": f"{found.nmse:.3g}",
        **{name: f"{1e3 * value:.3f}" for name, value in own.items()},
    }


def run_rank(task: dict[str, Any]) -> None:
    """What each rank runs; rank 0 writes the rows."""
    if task["link"] == "loopback":
        rank = os.environ.get("PMI_RANK") or os.environ["RANK"]
        os.environ |= {"RANK": rank, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        os.environ |= {"MASTER_PORT": "29517", "WORLD_SIZE": str(task["ranks"])}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for mebibytes in task["mebibytes"]:
        rows += measure(task["link"], mebibytes, task["rounds"], task["contestants"])
    if dist.get_rank() == 0:
        Path(task["rows"]).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def start(link: str, ranks: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = arguments.out / "throughput.partial.json"
    rounds = max(5, arguments.rounds // 3) if link == "100mbit" else arguments.rounds
    task = {"link": link, "ranks": ranks, "rounds": rounds, "rows": str(rows.resolve())}
    task |= {"mebibytes": arguments.mebibytes, "contestants": arguments.contestants}
    program = [__file__, "--task", json.dumps(task)]
    if link == "loopback":
        command = [*mpirun(ranks), *program]
    else:
        command = [*on_links(ranks, link, mpi=True), *program]
    execute(command, {**ONE_THREAD, "PYTHON": sys.executable, "MPIEXEC": MPIEXEC})
    content: list[dict[str, Any]] = json.loads(rows.read_text())
    rows.unlink()
    return content


def replace(path: Path, new: list[dict[str, Any]]) -> None:
    """Rows of the same link, ranks and size give way to the new ones."""

    def run(row: dict[str, Any]) -> tuple[str, int, float]:
        return row["link"], int(row["world_size"]), float(row["mebibytes"])

    done = {run(row) for row in new}
    old = read_csv(path) if path.is_file() else []
    rows = [row for row in old if run(row) not in done] + new
    order = ["loopback", *MBIT]
    rows.sort(key=lambda row: (run(row)[2], order.index(row["link"]), run(row)[1]))
    write_csv(path, rows)


def groups(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], list[dict[str, str]]]:
    grouped: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        key = (row["mebibytes"], row["link"], row["world_size"])
        grouped.setdefault(key, []).append(row)
    return grouped


def report(rows: list[dict[str, str]]) -> str:
    text = f"""# benchmarks/throughput.py

{machine()}; one thread per rank, all ranks on {os.cpu_count()} cores; load average at the \
end, {os.getloadavg()[0]:.1f}: what exceeds the number of ranks is other work.

Time of the exchange of one bucket of float32, from the hook's call until its future is
done on the slowest rank. Ideal: bytes sent per rank over the link's rate, nothing
else; frames take 4.4% more. Encode, exchange, decode: medians on rank 0; chunks travel
behind one another, and exchange is what the hook waits for. NMSE: of the mean, of
Gaussian gradients that differ between ranks. Their rank is full, the worst for PowerSGD;
it is checked on gradients of rank 1 (matrices of 1024 columns). On loopback MPI goes
through shared memory. 10gbit is more than two cores can move: its times say nothing of
such a link.
"""
    for (mebibytes, link, world_size), members in groups(rows).items():
        rounds = members[0]["rounds"]
        text += f"\n## {mebibytes} MiB, {link}, {world_size} ranks, {rounds} rounds\n\n"
        text += table_of(members)
    return text


def table_of(members: list[dict[str, str]]) -> str:
    floor = next((float(r["median_ms"]) for r in members if r["contestant"] == "float32"), None)
    rows = []
    for row in members:
        median, low, high, ideal = (
            float(row[f"{what}_ms"]) for what in ("median", "low", "high", "ideal")
        )
        own = [row[f"{what}_ms"] for what in ("encode", "exchange", "decode")]
        rows.append(
            [
                row["contestant"],
                row["carrier"],
                f"{median:.1f}",
                f"{low:.1f} .. {high:.1f}",
                f"{ideal:.1f}" if row["link"] in MBIT else "",
                f"{floor / median:.2f}x" if floor else "",
                *("" if value == "nan" else f"{float(value):.1f}" for value in own),
                row["nmse"],
            ]
        )
    header = ["", "over", "median, ms", "10% .. 90%", "ideal", "faster than float32"]
    return table([*header, "encode", "exchange", "decode", "NMSE"], rows, left=(0, 1))


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """The largest bucket: a panel per link and number of ranks, Gloo only, ideals as marks."""
    from matplotlib.figure import Figure

    largest = max(float(row["mebibytes"]) for row in rows)
    chosen = [r for r in rows if float(r["mebibytes"]) == largest and r["carrier"] == "gloo"]
    panels = groups(chosen)
    figure = Figure(figsize=(5.5 * min(2, len(panels)), 4 * -(-len(panels) // 2)), layout="tight")
    axes = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    for axis, ((_, link, world_size), members) in zip(axes.flat, panels.items(), strict=False):
        names = [row["contestant"] for row in members]
        medians = [float(row["median_ms"]) for row in members]
        colors = ["C0" if name.startswith("rht") else "0.6" for name in names]
        axis.barh(names, medians, color=colors)
        if link in MBIT:
            ideals = [float(row["ideal_ms"]) for row in members]
            axis.plot(ideals, names, "k|", markersize=9, label="bytes over link rate")
            axis.legend(fontsize=7)
        axis.set(xlabel="ms, median", title=f"{largest:g} MiB, {link}, {world_size} ranks")
        axis.tick_params(axis="y", labelsize=7)
        axis.invert_yaxis()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    links = ("loopback", *MBIT)
    parser.add_argument("--links", nargs="+", choices=links, default=list(links))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mebibytes", type=float, nargs="+", default=[1.0, 25.0])
    parser.add_argument(
        "--rounds", type=int, default=18, help=f"whole turns of {TURN}; at 100mbit a third of them"
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=["[!r]*", "rht? [!l]*"],
        help="names, or patterns; by default all but the lattice",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="1gbit, 2 ranks, 1 MiB, b = 4")
    parser.add_argument("--table", action="store_true", help="only rewrite the table and the plot")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run_rank(arguments.task)
        return
    if arguments.quick:
        arguments.links, arguments.ranks, arguments.mebibytes = ["1gbit"], [2], [1]
        arguments.contestants, arguments.rounds = ["float32", "bf16", "rht4 *"], 2 * TURN
        if arguments.out == parser.get_default("out"):
            arguments.out = Path("demo-results")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "throughput.csv"
    combinations = [(link, ranks) for link in arguments.links for ranks in arguments.ranks]
    for link, ranks in progress([] if arguments.table else combinations, keep=True):
        replace(path, start(link, ranks, arguments))
    rows = read_csv(path)
    (arguments.out / "throughput.md").write_text(report(rows))
    plot(rows, arguments.out / "throughput.png")
    print(f"{path} and throughput.md, throughput.png next to it")


if __name__ == "__main__":
    main()
