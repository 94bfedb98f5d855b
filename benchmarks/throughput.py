"""Time of one gradient bucket's exchange, as DDP sees it, on loopback and on emulated links.

    python benchmarks/throughput.py                                     all of it (root; 25 minutes)
    python benchmarks/throughput.py --links 1gbit --ranks 2 --contestants float32 "rht4 *"
    python benchmarks/throughput.py --quick

Time runs from the call of the communication hook until its future is done, on the slowest rank,
after a barrier. All contestants take turns in the same processes, on the same data, of three
exchanges each after one that is not timed: a connection that was idle while others had their turns
begins slowly, which within a step of training it is not. A time is taken only after the check of
the same run: the hook's mean is as near to the exact one as its error allows. Each link and number
of ranks is one run; its rows replace those of an earlier one in throughput.csv, from which
throughput.md and throughput.png are made.
"""

import argparse
import csv
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kernels import machine, quantiles
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from tqdm import tqdm

import rhtcomm
import rhtcomm.hooks
from rhtcomm.codebooks.quic_fl import WIDE

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    *("link", "world_size", "mebibytes", "contestant", "carrier", "rounds", "median_ms", "low_ms"),
    *("high_ms", "ideal_ms", "nmse", "encode_ms", "exchange_ms", "decode_ms"),
)
BITS = (1, 2, 4, 8)
MBIT = {"100mbit": 100, "1gbit": 1000, "10gbit": 10_000}
TURN = 3  # timed exchanges of a contestant, one behind the other
WARMUP = 3  # PowerSGD sends its first two buckets uncompressed


@dataclass
class Bucket:
    """What a hook uses of DDP's GradBucket, which Python cannot make: the step's only bucket."""

    tensor: torch.Tensor
    matrices: list[torch.Tensor]  # views of it, as gradients of parameters are

    @classmethod
    def of(cls, data: torch.Tensor) -> "Bucket":
        tensor = data.clone()
        return cls(tensor, list(tensor.view(-1, 1024).split(1600)))

    def buffer(self) -> torch.Tensor:
        return self.tensor

    def gradients(self) -> list[torch.Tensor]:
        return self.matrices

    def parameters(self) -> list[torch.Tensor]:
        return self.matrices

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


@dataclass
class Contestant:
    name: str
    carrier: str
    hook: Callable[[Any, Any], torch.futures.Future[torch.Tensor]]
    state: Any
    allowed: float  # bound on |mean' - mean|^2 / |mean|^2
    sent: float  # bytes that a rank sends; NaN: the state counts them

    def seconds(self, bucket: Bucket) -> float:
        dist.barrier()
        start = time.perf_counter()
        done = self.hook(self.state, bucket).wait()
        elapsed = time.perf_counter() - start
        if done.data_ptr() != bucket.tensor.data_ptr():
            bucket.tensor.copy_(done)
        return elapsed


def contestants(numel: int, world_size: int, patterns: list[str]) -> list[Contestant]:
    """Those whose name, or name and carrier, match a pattern."""
    ring = 2 * (world_size - 1) / world_size
    found = []

    def add(name: str, carrier: str, *rest: Any) -> None:
        both = f"{name}, {carrier}"
        if any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(both, p) for p in patterns):
            hook, make_state, allowed, sent = rest
            found.append(Contestant(name, carrier, hook, make_state(), allowed, sent))

    def none() -> None:
        return None

    add("float32", "gloo", default_hooks.allreduce_hook, none, 1e-10, ring * 4 * numel)
    add("fp16", "gloo", default_hooks.fp16_compress_hook, none, 1e-6, ring * 2 * numel)
    add("bf16", "gloo", default_hooks.bf16_compress_hook, none, 1e-4, ring * 2 * numel)
    rows = [len(matrix) for matrix in Bucket.of(torch.empty(numel)).matrices]
    for rank in (1, 4):
        add(
            *(f"PowerSGD rank {rank}", "gloo", powerSGD_hook.powerSGD_hook),
            lambda rank=rank: powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=rank, start_powerSGD_iter=2
            ),
            *(1e-3, ring * 4 * rank * sum(row + 1024 for row in rows)),
        )
    # Over Gloo each hook makes a group of its own, as it does in training.
    carriers: dict[str, rhtcomm.MPICommunicator | None] = {"gloo": None}
    if "PMI_RANK" in os.environ:
        carriers["mpi"] = rhtcomm.MPICommunicator()
    for carrier, communicator in carriers.items():
        if carrier == "mpi":
            add(
                *("float32", carrier, rhtcomm.hooks.rht_hook),
                lambda c=communicator: rhtcomm.hooks.RHTState(communicator=c, min_numel=numel + 1),
                *(1e-10, ring * 4 * numel),
            )
        for bits in BITS:
            error = WIDE.reference_vnmse[bits]
            # Of Gaussian rows the largest of 4096 is below 5 standard deviations, nearly always.
            lattice = (10 / (2**bits - 1)) ** 2 / 12
            two_shot = 2 * error + error**2  # the second hop's is of the mean and its error
            ways: list[tuple[str, float, dict[str, Any]]] = [
                ("all_gather", error, {"algorithm": "all_gather"}),
                ("two_shot", two_shot, {"algorithm": "two_shot"}),
                ("lattice", lattice, {"quantizer": "lattice"}),
            ]
            if bits == 4:
                auto = {"rotations": "auto"}
                ways.append(("all_gather, auto", error, {"algorithm": "all_gather", **auto}))
                ways.append(("two_shot, auto", two_shot, {"algorithm": "two_shot", **auto}))
            for way, allowed, options in ways:
                add(
                    *(f"rht{bits} {way}", carrier, rhtcomm.hooks.rht_hook),
                    lambda c=communicator, b=bits, o=options: rhtcomm.hooks.RHTState(
                        b, communicator=c, min_numel=0, **o
                    ),
                    *(1.3 * allowed, float("nan")),
                )
    return found


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
        _check(contestant, draw(numel, dist.get_rank(), low_rank), contestant.allowed, WARMUP)
    allowed = float("inf") if low_rank else contestant.allowed
    return _check(contestant, draw(numel, dist.get_rank(), low_rank=False), allowed)


def _check(contestant: Contestant, data: torch.Tensor, allowed: float, repeats: int = 1) -> float:
    exact = data.double()
    dist.all_reduce(exact)
    exact /= dist.get_world_size()
    bucket = Bucket.of(data)
    for _ in range(repeats):
        bucket.tensor.copy_(data)
        contestant.seconds(bucket)
    nmse = float((bucket.tensor - exact).square().sum() / exact.square().sum())
    if not nmse <= allowed:
        raise AssertionError(
            f"{contestant.name}, {contestant.carrier}: the mean is off by an NMSE of {nmse:.3g}, "
            f"and {allowed:.3g} is the most that its error explains"
        )
    others = [torch.empty_like(bucket.tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, bucket.tensor)
    if not all(torch.equal(others[0], other) for other in others):
        raise AssertionError(f"{contestant.name}, {contestant.carrier}: replicas differ")
    return nmse


def parts(contestant: Contestant) -> tuple[float, float, float, int]:
    if not isinstance(contestant.state, rhtcomm.hooks.RHTState):
        return (float("nan"),) * 3 + (0,)
    stats = contestant.state.stats()
    return stats.encode_seconds, stats.exchange_seconds, stats.decode_seconds, stats.bytes_sent


def measure(link: str, mebibytes: float, rounds: int, patterns: list[str]) -> list[dict[str, Any]]:
    """One row a contestant; on every rank, with the times of the slowest."""
    numel, world_size = int(mebibytes * 2**18), dist.get_world_size()
    field = contestants(numel, world_size, patterns)
    data = draw(numel, dist.get_rank(), low_rank=False)
    bucket = Bucket.of(data)
    shown = dist.get_rank() == 0
    errors = [
        check(contestant, numel)
        for contestant in tqdm(field, desc="checks", leave=False, disable=None if shown else True)
    ]
    turns = range(-(-rounds // TURN))
    seconds = torch.empty(len(field), len(turns), TURN, dtype=torch.float64)
    split: list[list[tuple[float, float, float, int]]] = [[] for _ in field]
    for turn in tqdm(turns, desc=link, leave=False, disable=None if shown else True):
        for index, contestant in enumerate(field):
            bucket.tensor.copy_(data)
            contestant.seconds(bucket)
            for again in range(TURN):
                bucket.tensor.copy_(data)
                before = parts(contestant)
                seconds[index, turn, again] = contestant.seconds(bucket)
                after = parts(contestant)
                split[index].append(tuple(b - a for a, b in zip(before, after, strict=True)))
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    rows = []
    for contestant, error, times, split_times in zip(field, errors, seconds, split, strict=True):
        low, median, high = quantiles(times.flatten().tolist())
        sent = split_times[0][3] or contestant.sent
        encode, exchange, decode = (
            statistics.median(one[part] for one in split_times) for part in range(3)
        )
        ideal = 8 * sent / (MBIT[link] * 1e6) if link in MBIT else 0.0
        figures = (median, low, high, ideal)
        values = (
            *(link, world_size, mebibytes, contestant.name, contestant.carrier, times.numel()),
            *(f"{1e3 * value:.3f}" for value in figures),
            f"{error:.3g}",
            *(f"{1e3 * value:.3f}" for value in (encode, exchange, decode)),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        if isinstance(contestant.state, rhtcomm.hooks.RHTState):
            contestant.state.close()
    return rows


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
    program = [sys.executable, "-m", "mpi4py", __file__, "--task", json.dumps(task)]
    mpiexec = Path(sys.prefix) / "bin" / "mpiexec"
    if link == "loopback":
        command = [str(mpiexec), "-n", str(ranks), *program]
    else:
        command = [str(ROOT / "launch" / "network.sh"), "--mpi", str(ranks), link, "--", *program]
    environment = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "MPIEXEC": str(mpiexec)}
    subprocess.run(command, env=os.environ | environment, check=True)
    content: list[dict[str, Any]] = json.loads(rows.read_text())
    rows.unlink()
    return content


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def replace(path: Path, new: list[dict[str, Any]]) -> None:
    """Rows of the same link, ranks and size give way to the new ones."""

    def run(row: dict[str, Any]) -> tuple[str, int, float]:
        return row["link"], int(row["world_size"]), float(row["mebibytes"])

    done = {run(row) for row in new}
    rows = [row for row in read(path) if run(row) not in done] + new
    order = ["loopback", *MBIT]
    rows.sort(key=lambda row: (run(row)[2], order.index(row["link"]), run(row)[1]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def groups(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], list[dict[str, str]]]:
    grouped: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        key = (row["mebibytes"], row["link"], row["world_size"])
        grouped.setdefault(key, []).append(row)
    return grouped


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        "# benchmarks/throughput.py",
        "",
        f"{machine()}; one thread a rank, all ranks on {os.cpu_count()} cores; load average at the "
        f"end, {os.getloadavg()[0]:.1f}: what exceeds the number of ranks is other work.",
        "",
        "Time of the exchange of one bucket of float32, from the hook's call until its future is",
        "done on the slowest rank. Ideal: bytes that a rank sends over the link's rate, nothing",
        "else; frames take 4.4% more. Encode, exchange, decode: medians on rank 0; chunks travel",
        "behind one another, and exchange is what the hook waits for. NMSE: of the mean, of",
        "Gaussian gradients that differ between ranks. Their rank is full, the worst for PowerSGD;",
        "it is checked on gradients of rank 1 (matrices of 1024 columns). On loopback MPI goes",
        "through shared memory. 10gbit is more than two cores can move: its times say nothing of",
        "such a link.",
    ]
    for (mebibytes, link, world_size), members in groups(rows).items():
        floor = next((float(r["median_ms"]) for r in members if r["contestant"] == "float32"), None)
        lines += [
            "",
            f"## {mebibytes} MiB, {link}, {world_size} ranks, {members[0]['rounds']} rounds",
            "",
            "| | over | median, ms | 10% .. 90% | ideal | faster than float32 | encode | exchange "
            "| decode | NMSE |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in members:
            own = [
                "" if row[f"{part}_ms"] == "nan" else f"{float(row[f'{part}_ms']):.1f}"
                for part in ("encode", "exchange", "decode")
            ]
            faster = f"{floor / float(row['median_ms']):.2f}x" if floor else ""
            ideal = f"{float(row['ideal_ms']):.1f}" if link in MBIT else ""
            lines.append(
                f"| {row['contestant']} | {row['carrier']} | {float(row['median_ms']):.1f} "
                f"| {float(row['low_ms']):.1f} .. {float(row['high_ms']):.1f} | {ideal} "
                f"| {faster} | {' | '.join(own)} | {row['nmse']} |"
            )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """The largest bucket: a panel a link and number of ranks, Gloo only, ideals as marks."""
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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="1gbit, 2 ranks, 1 MiB, b = 4")
    parser.add_argument("--table", action="store_true", help="only write the table and plot anew")
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
    for link, ranks in tqdm(combinations if not arguments.table else [], disable=None):
        replace(path, start(link, ranks, arguments))
    rows = read(path)
    (arguments.out / "throughput.md").write_text(table(rows))
    plot(rows, arguments.out / "throughput.png")
    print(f"{path} and throughput.md, throughput.png beside it")


if __name__ == "__main__":
    main()
