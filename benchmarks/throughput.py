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
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import rhtcomm.hooks
from contestants import Bucket, Contestant, contestants
from lib.machine import machine
from lib.processes import MPIEXEC, ONE_THREAD, execute, mpirun, on_links
from lib.progress import progress
from lib.report import RESULTS, read_csv, table, write_csv
from lib.timing import quantiles

MBIT = {"100mbit": 100, "1gbit": 1000, "10gbit": 10_000}
TURN = 3  # timed exchanges of a contestant, one after the other
WARMUP = 3  # PowerSGD sends its first two buckets uncompressed


def draw(numel: int, rank: int, low_rank: bool) -> torch.Tensor:
    """A rank's gradient: Gaussian, or matrices of rank 1 that differ between ranks in one factor.

    PowerSGD leaves out what is not of low rank, and so is checked on what it can represent.
    """
    shared, own = (torch.Generator().manual_seed(seed) for seed in (0, 1 + rank))
    if not low_rank:
        return torch.randn(numel, generator=own)
    column = torch.randn(numel // 1024, 1, generator=shared)
    return (column * torch.randn(1024, generator=own)).flatten()


def check(contestant: Contestant, numel: int) -> float:
    """The squared error of a Gaussian mean, relative to its norm.

    Raises:
        AssertionError: the error is larger than the hook's own, or replicas differ.
    """
    low_rank = contestant.name.startswith("PowerSGD")
    if low_rank:
        error_of_mean(contestant, draw(numel, dist.get_rank(), low_rank), WARMUP)
    gaussian = draw(numel, dist.get_rank(), low_rank=False)
    return error_of_mean(contestant, gaussian, bounded=not low_rank)


def error_of_mean(
    contestant: Contestant, data: torch.Tensor, repeats: int = 1, bounded: bool = True
) -> float:
    who = f"{contestant.name}, {contestant.carrier}"
    exact = data.double()
    dist.all_reduce(exact)
    exact /= dist.get_world_size()
    bucket = Bucket.of(data)
    for _ in range(repeats):
        bucket.tensor.copy_(data)
        contestant.seconds(bucket)
    nmse = float((bucket.tensor - exact).square().sum() / exact.square().sum())
    allowed = contestant.allowed if bounded else float("inf")
    if not nmse <= allowed:
        raise AssertionError(
            f"{who}: the mean is off by an NMSE of {nmse:.3g}, and {allowed:.3g} is the most that "
            "its error explains"
        )
    others = [torch.empty_like(bucket.tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, bucket.tensor)
    if not all(torch.equal(others[0], other) for other in others):
        raise AssertionError(f"{who}: replicas differ")
    return nmse


Spent = tuple[float, float, float, int]  # seconds of encode, exchange, decode; bytes sent


def spent(contestant: Contestant) -> Spent:
    """By this rank until now; NaN for other hooks."""
    if not isinstance(contestant.state, rhtcomm.hooks.RHTState):
        return math.nan, math.nan, math.nan, 0
    stats = contestant.state.stats()
    return stats.encode_seconds, stats.exchange_seconds, stats.decode_seconds, stats.bytes_sent


def measure(link: str, mebibytes: float, rounds: int, patterns: list[str]) -> list[dict[str, Any]]:
    """One row per contestant; on every rank, with the times of the slowest."""
    numel, shown = int(mebibytes * 2**18), dist.get_rank() == 0
    field = contestants(numel, dist.get_world_size(), patterns)
    data = draw(numel, dist.get_rank(), low_rank=False)
    bucket = Bucket.of(data)
    errors = [check(contestant, numel) for contestant in progress(field, "checks", shown=shown)]
    turns = range(-(-rounds // TURN))
    seconds = torch.empty(len(field), len(turns), TURN, dtype=torch.float64)
    costs: list[list[Spent]] = [[] for _ in field]
    for turn in progress(turns, link, shown=shown):
        for index, contestant in enumerate(field):
            bucket.tensor.copy_(data)
            contestant.seconds(bucket)
            for again in range(TURN):
                bucket.tensor.copy_(data)
                before = spent(contestant)
                seconds[index, turn, again] = contestant.seconds(bucket)
                after = spent(contestant)
                costs[index].append(tuple(b - a for a, b in zip(before, after, strict=True)))
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    rows = []
    for contestant, error, times, cost in zip(field, errors, seconds, costs, strict=True):
        figures = row_of(contestant, link, error, times.flatten().tolist(), cost)
        run = {"link": link, "world_size": dist.get_world_size(), "mebibytes": mebibytes}
        rows.append(run | figures)
        if isinstance(contestant.state, rhtcomm.hooks.RHTState):
            contestant.state.close()
    return rows


def row_of(
    contestant: Contestant, link: str, error: float, seconds: list[float], costs: list[Spent]
) -> dict[str, Any]:
    """A contestant's figures, as the CSV has them."""
    low, median, high = quantiles(seconds)
    sent = costs[0][3] or contestant.sent
    times = {
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "ideal_ms": 8 * sent / (MBIT[link] * 1e6) if link in MBIT else 0.0,
    }
    own = {
        f"{what}_ms": statistics.median(cost[index] for cost in costs)
        for index, what in enumerate(("encode", "exchange", "decode"))
    }
    return {
        "contestant": contestant.name,
        "carrier": contestant.carrier,
        "rounds": len(seconds),
        **{name: f"{1e3 * value:.3f}" for name, value in times.items()},
        "nmse": f"{error:.3g}",
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
        help="names, or patterns; by default all but the lattice, which takes seconds",
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
