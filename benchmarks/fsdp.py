"""Time of a training step of FSDP2 with and without compression, on emulated links.

    python benchmarks/fsdp.py                              all of it (root; 9 minutes)
    python benchmarks/fsdp.py --links 1gbit --ranks 2
    python benchmarks/fsdp.py --quick

The model is a row of wide linear layers, each a unit, on a batch of a few samples, so that
communication dominates. A step is forward and backward, on the slowest rank, after a barrier.
Models with and without compression take turns in the same processes, on the same data. A time is
taken only after the check of the same run: gradients are as near to the exact mean as the
quantizer's error allows. Bytes are those that left through the emulated link. Each link and number
of ranks is one run; its rows replace those of an earlier one in fsdp.csv, from which fsdp.md is
made.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lib.machine import machine
from lib.processes import ONE_THREAD, execute, on_links
from lib.progress import progress
from lib.report import RESULTS, read_csv, table, write_csv
from lib.timing import quantiles
from rhtcomm.codebooks.quic_fl import WIDE
from rhtcomm.hooks import compress_fsdp

MBIT = {"100mbit": 100, "1gbit": 1000}
BITS = 4
BATCH = 8
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)  # as torchtitan trains
WAYS: dict[str, dict[str, Any]] = {
    "float32, parameters gathered twice": {},
    "float32, gathered once": {"reshard_after_forward": False},
    "bf16 parameters, gathered twice": {"mp_policy": BF16},
    "bf16 parameters, gathered once": {"mp_policy": BF16, "reshard_after_forward": False},
}
"""Options of `fully_shard`; gradients are reduced as float32 in all of them."""


class Contestant:
    """One of the models: how it is sharded, and whether its gradients are compressed."""

    def __init__(self, way: str, compressed: bool, width: int, layers: int) -> None:
        self.way, self.compressed = way, compressed
        self.model = net(width, layers)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in self.model:
            fully_shard(layer, mesh=mesh, **WAYS[way])
        fully_shard(self.model, mesh=mesh, **WAYS[way])
        self.handle = compress_fsdp(self.model, BITS, warmup_steps=0) if compressed else None

    def step(self, x: torch.Tensor) -> float:
        """Seconds on the slowest rank."""
        dist.barrier()
        start = time.perf_counter()
        loss_of(self.model, x).backward()
        elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        return elapsed.item()

    def clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def check(self, x: torch.Tensor) -> float:
        """The gradients' NMSE.

        Raises:
            AssertionError: it is larger than the quantizer's error explains.
        """
        own = net(x.shape[1], len(self.model))  # type: ignore[arg-type]
        if "bf16" in self.way:
            own, x = own.bfloat16(), x.bfloat16()
        loss_of(own, x).backward()
        self.step(x.float())
        n, error, norm, energy = dist.get_world_size(), 0.0, 0.0, 0.0
        for mine, parameter in zip(own.parameters(), self.model.parameters(), strict=True):
            assert mine.grad is not None
            assert isinstance(parameter.grad, DTensor)
            exact = mine.grad.double()
            energy += exact.square().sum().item()
            dist.all_reduce(exact)
            exact /= n
            error += (parameter.grad.full_tensor() - exact).square().sum().item()
            norm += exact.square().sum().item()
        total = torch.tensor(energy, dtype=torch.float64)
        dist.all_reduce(total)
        self.clear()
        rounding = 1e-4 if "bf16" in self.way else 1e-10
        allowed = 1.1 * WIDE.reference_vnmse[BITS] * total.item() / n**2 / norm
        allowed = rounding + (allowed if self.compressed else 0.0)
        if not error <= allowed * norm:
            raise AssertionError(
                f"{self.way}: gradients are off by an NMSE of {error / norm:.3g}, and "
                f"{allowed:.3g} is the most that their error explains"
            )
        return error / norm


def net(width: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(x).square().mean()
    return loss


def sent() -> int:
    """Bytes that left this rank's machine so far, with all headers."""
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def run_rank(task: dict[str, Any]) -> None:
    """What each rank runs; rank 0 writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, shape = dist.get_rank(), (task["width"], task["layers"])
    x = torch.randn(BATCH, shape[0], generator=torch.Generator().manual_seed(1 + rank))
    field = [Contestant(way, compressed, *shape) for way in WAYS for compressed in (False, True)]
    errors = [one.check(x) for one in progress(field, "checks", shown=rank == 0)]
    seconds: list[list[float]] = [[] for _ in field]
    octets: list[list[int]] = [[] for _ in field]
    for _ in progress(range(task["rounds"]), task["link"], shown=rank == 0):
        for index, one in enumerate(field):
            one.step(x)  # a connection that was idle is slow at first
            one.clear()
            before = sent()
            seconds[index].append(one.step(x))
            octets[index].append(sent() - before)
            one.clear()
    rows = [
        row_of(one, task, *figures)
        for one, *figures in zip(field, errors, seconds, octets, strict=True)
    ]
    if rank == 0:
        Path(task["rows"]).write_text(json.dumps(rows))
    for one in field:
        if one.handle is not None:
            one.handle.close()
    dist.barrier()
    dist.destroy_process_group()


def row_of(
    one: Contestant, task: dict[str, Any], error: float, seconds: list[float], octets: list[int]
) -> dict[str, Any]:
    """A contestant's figures, as the CSV has them."""
    low, median, high = quantiles(seconds)
    megabytes = statistics.median(octets) / 1e6
    return {
        "link": task["link"],
        "world_size": task["ranks"],
        "mebibytes": task["width"] ** 2 * task["layers"] / 2**18,
        "way": one.way,
        "gradients": f"{BITS} bits" if one.compressed else "uncompressed",
        "rounds": len(seconds),
        "median_ms": f"{1e3 * median:.1f}",
        "low_ms": f"{1e3 * low:.1f}",
        "high_ms": f"{1e3 * high:.1f}",
        "sent_mb": f"{megabytes:.2f}",
        "ideal_ms": f"{8e3 * megabytes / MBIT[task['link']]:.1f}",
        "nmse": f"{error:.3g}",
    }


def report(rows: list[dict[str, str]]) -> str:
    text = f"""# benchmarks/fsdp.py

{machine()}; one thread per rank, all ranks on {os.cpu_count()} cores; load average at the \
end, {os.getloadavg()[0]:.1f}; the excess over the number of ranks is other work.

Time of a step (forward and backward) on the slowest rank, for a model of wide linear layers in
FSDP2 over Gloo. FSDP2 gathers the parameters for the forward pass and, unless
`reshard_after_forward=False`, again for the backward pass; this is not compressed.
Gradients are reduced in float32. Uncompressed, Gloo's reduce-scatter does it, which moves as many
bytes as an all-reduce. Sent: bytes that left rank 0 through its link in a step, with all headers.
Ideal: these bytes divided by the link's rate.
"""
    runs: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        runs.setdefault((row["mebibytes"], row["link"], row["world_size"]), []).append(row)
    for (mebibytes, link, world_size), members in runs.items():
        text += f"\n## {float(mebibytes):g} MiB of float32 parameters, {link}, {world_size} ranks, "
        text += f"{members[0]['rounds']} rounds\n\n"
        plain = {row["way"]: float(row["median_ms"]) for row in members[::2]}
        cells = [
            [
                row["way"],
                row["gradients"],
                row["median_ms"],
                f"{row['low_ms']} .. {row['high_ms']}",
                row["sent_mb"],
                row["ideal_ms"],
                f"{plain[row['way']] / float(row['median_ms']):.2f}x",
                row["nmse"],
            ]
            for row in members
        ]
        header = ["model", "gradients", "median, ms", "10% .. 90%", "sent, MB", "ideal, ms"]
        text += table([*header, "faster", "NMSE"], cells, left=(0, 1))
    return text


def start(link: str, ranks: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = arguments.out / "fsdp.partial.json"
    task = {"link": link, "ranks": ranks, "rounds": arguments.rounds, "rows": str(rows.resolve())}
    task |= {"width": arguments.width, "layers": arguments.layers}
    execute([*on_links(ranks, link), __file__, "--task", json.dumps(task)], ONE_THREAD)
    content: list[dict[str, Any]] = json.loads(rows.read_text())
    rows.unlink()
    return content


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--links", nargs="+", choices=list(MBIT), default=["1gbit"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="1gbit, 2 ranks, a small model")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run_rank(arguments.task)
        return
    if arguments.quick:
        arguments.links, arguments.ranks = ["1gbit"], [2]
        arguments.width, arguments.layers, arguments.rounds = 512, 2, 3
        if arguments.out == parser.get_default("out"):
            arguments.out = Path("demo-results")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "fsdp.csv"
    combinations = [(link, ranks) for link in arguments.links for ranks in arguments.ranks]
    for link, ranks in progress(combinations, keep=True):
        new = start(link, ranks, arguments)
        old = read_csv(path) if path.is_file() else []
        done = (link, str(ranks), str(new[0]["mebibytes"]))
        kept = [row for row in old if (row["link"], row["world_size"], row["mebibytes"]) != done]
        write_csv(path, [*kept, *new])
    (arguments.out / "fsdp.md").write_text(report(read_csv(path)))
    print(f"{path} and fsdp.md next to it")


if __name__ == "__main__":
    main()
