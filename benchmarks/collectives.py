"""Every collective over every communicator: error against theory, bytes against formulas, bits.

    python benchmarks/collectives.py        (needs the extras demo and mpi)

Starts 2, 3 and 4 ranks on this machine, under torchrun (Gloo) and under mpiexec (MPI), averages a
tensor of 2^20 Gaussian numbers, another one on every rank, and writes results/collectives.md:

* NMSE / theory: |result - mean|^2 over what the docstrings of collectives.py and lattice.py expect.
* bytes / formula: sent by all ranks, counted at the communicator, over the formulas there.
* bits: whether all ranks, of both communicators, ended with the same ones.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import rhtcomm
from lib.processes import execute, mpirun, torchrun
from lib.progress import progress
from lib.report import RESULTS, heading, table
from rhtcomm.communicators import Communicator
from rhtcomm.kernels import LatticeTask
from rhtcomm.reduce import Algorithm

NUMEL, BITS, KEY = 1 << 20, 4, rhtcomm.Key(seed=3)
WORLD_SIZES = (2, 3, 4)
LAUNCHERS = {"Gloo": torchrun, "MPI": mpirun}
# Name, codec, algorithm, error of one encoding (README.md).
CASES: list[tuple[str, rhtcomm.Codec | rhtcomm.Lattice, Algorithm, float]] = [
    (f"{type(quantizer).__name__}, {algorithm}", rhtcomm.Codec(quantizer), algorithm, error)
    for quantizer, error in ((rhtcomm.QuicFL(BITS), 0.011587), (rhtcomm.Eden(BITS), 0.0095925))
    for algorithm in ("all_gather", "two_shot", "gather")
] + [("Lattice", rhtcomm.Lattice(BITS), "auto", float("nan"))]


def tensor_of(rank: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank)) * (1 + rank)


def hierarchical(communicator: Communicator, over: str) -> rhtcomm.HierarchicalCommunicator:
    """Two nodes of two ranks."""
    rank = communicator.rank
    if over == "MPI":
        world = communicator.comm  # type: ignore[attr-defined]
        split = (world.Split(rank // 2, rank), world.Split(rank % 2, rank))
        return rhtcomm.HierarchicalCommunicator(*map(rhtcomm.MPICommunicator, split))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2))
    return rhtcomm.HierarchicalCommunicator.from_mesh(mesh)


def run_rank(over: str, folder: Path) -> None:
    """One rank: all cases, results into a file."""
    torch.set_num_threads(1)
    if over == "Gloo":
        dist.init_process_group("gloo")
        communicator: Communicator = rhtcomm.TorchCommunicator()
    else:
        communicator = rhtcomm.MPICommunicator()
    rank, world_size = communicator.rank, communicator.world_size
    inputs = [tensor_of(other).double() for other in range(world_size)]
    runs = [(name, codec, algorithm, communicator) for name, codec, algorithm, _ in CASES]
    if world_size == 4:
        levels = hierarchical(communicator, over)
        runs.append(("QuicFL, 2 nodes x 2", rhtcomm.Codec(rhtcomm.QuicFL(BITS)), "auto", levels))
    outcomes = {}
    for name, codec, algorithm, ranks in runs:
        x, before = tensor_of(rank), ranks.bytes_sent
        rhtcomm.all_reduce(x, codec, KEY, ranks, algorithm=algorithm, check=False)
        outcomes[name] = {
            "bytes": ranks.bytes_sent - before,
            "error": (x - sum(inputs) / world_size).square().sum().item(),
            "bits": hashlib.sha256(x.numpy().tobytes()).hexdigest(),
        }
    (folder / f"{over}-{world_size}-{rank}.json").write_text(json.dumps(outcomes))
    if over == "Gloo":
        dist.destroy_process_group()


def expected_error(name: str, n: int) -> float:
    inputs = torch.stack([tensor_of(rank) for rank in range(n)]).double()
    if name == "Lattice":
        lattice = rhtcomm.Lattice(BITS)
        rotated = torch.stack([lattice.rotation.forward(x.float(), KEY) for x in inputs])
        bounds = rotated.abs().view(n, -1, lattice.block).amax(dim=(0, 2)).double()
        step = 2 * bounds / (2**BITS - 1)
        return float((step**2 / 12 / n).sum()) * lattice.block
    if name.endswith("2 nodes x 2"):
        inputs = inputs.view(2, 2, -1).mean(dim=1)
        error, algorithm = CASES[0][3], "all_gather"
    else:
        error, algorithm = next((e, a) for known, _, a, e in CASES if known == name)
    first = error * float(inputs.square().sum()) / len(inputs) ** 2
    if algorithm == "all_gather":
        return first
    return first + error * (float(inputs.mean(dim=0).square().sum()) + first)


def expected_bytes(name: str, n: int) -> float:
    """By all ranks together."""
    payload = CASES[0][1].nbytes(NUMEL)  # type: ignore[union-attr]
    if name == "Lattice":
        task = LatticeTask(rhtcomm.Lattice(BITS), NUMEL, n)
        return 2 * (n - 1) * 4 * (task.words + task.blocks)
    if name.endswith("2 nodes x 2"):
        return 2 * payload  # one payload each way between the nodes, in shares
    return (n * (n - 1) if name.endswith("all_gather") else 2 * (n - 1)) * payload


Outcomes = list[dict[str, dict[str, Any]]]  # by rank, by name of the case


def start_ranks(folder: Path) -> dict[tuple[int, str], Outcomes]:
    """By number of ranks and launcher."""
    found = {}
    starts = [(n, over) for n in WORLD_SIZES for over in LAUNCHERS]
    for n, over in progress(starts, "ranks started", keep=True):
        execute([*LAUNCHERS[over](n), __file__, "--rank-of", over, "--folder", str(folder)])
        found[n, over] = [
            json.loads((folder / f"{over}-{n}-{rank}.json").read_text()) for rank in range(n)
        ]
    return found


def compare(outcomes: dict[tuple[int, str], Outcomes]) -> tuple[list[list[str]], bool]:
    """A row for each case and launcher, and whether all are as they should be."""
    rows, fine = [], True
    for n in WORLD_SIZES:
        ranks = {over: outcomes[n, over] for over in LAUNCHERS}
        for name in ranks["Gloo"][0]:
            theory, formula = expected_error(name, n), expected_bytes(name, n)
            seen = {rank[name]["bits"] for of_one in ranks.values() for rank in of_one}
            for over, of_one in ranks.items():
                error = max(rank[name]["error"] for rank in of_one) / theory
                sent = sum(rank[name]["bytes"] for rank in of_one) / formula
                fine &= abs(error - 1) < 0.05 and abs(sent - 1) < 0.01 and len(seen) == 1
                same = "same" if len(seen) == 1 else "DIFFERENT"
                rows.append([str(n), name, over, f"{error:.4f}", f"{sent:.5f}", same])
    return rows, fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank-of", choices=LAUNCHERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        run_rank(arguments.rank_of, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, fine = compare(start_ranks(Path(folder)))
    header = ["n", "algorithm", "over", "NMSE / theory", "bytes / formula", "bits on all ranks"]
    text = f"{heading()}\nb = {BITS}, 2^20 float32\n\n{table(header, rows, left=(1, 2, 5))}"
    (RESULTS / "collectives.md").write_text(text)
    print(text, end="")
    if not fine:
        sys.exit("an error is 5% off, a count of bytes 1%, or bits differ")


if __name__ == "__main__":
    main()
