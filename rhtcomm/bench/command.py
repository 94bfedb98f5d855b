"""`python -m rhtcomm bench`: measure exchanges on these ranks, and say whether to compress."""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from rhtcomm.bench import machine
from rhtcomm.bench.advice import advise, of_steps
from rhtcomm.bench.contestants import QUANTIZERS, expected_error
from rhtcomm.bench.exchanges import measure_exchanges
from rhtcomm.bench.failures import Told, Watch
from rhtcomm.bench.plot import check_matplotlib, plot
from rhtcomm.bench.ranks import Ranks, join, spawn
from rhtcomm.bench.report import printed
from rhtcomm.bench.results import Result, Row, Step, write_csv, write_json
from rhtcomm.bench.rounds import Budget
from rhtcomm.bench.training import contestants_for, load, measure_steps
from rhtcomm.communicators.stripes import check_connections
from rhtcomm.doctor.launcher import Launch, own_launch
from rhtcomm.versions import PACKAGE

__all__ = ["add_arguments", "run", "without_ranks"]

ALGORITHMS = ("all_gather", "two_shot", "gather")
_PLANNED = 0.96  # of the seconds; the last turn may take longer than it was expected to
_FOR_STEPS = 0.5  # of these, where training steps are measured too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m rhtcomm bench`."""
    parser.formatter_class = argparse.HelpFormatter  # texts name what is worth knowing of defaults
    parser.epilog = (
        "Start it on all ranks, as your training: torchrun ... -m rhtcomm bench, or by mpiexec or "
        "srun. docs/bench.md has examples."
    )
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="start N ranks on this machine, without a launcher")
    add("--seconds", type=float, default=60.0, metavar="S", help="time of the whole run (60)")
    add(
        "--mebibytes",
        type=float,
        nargs="+",
        default=[1.0, 25.0],
        metavar="M",
        help="sizes of buckets, as float32 (1 25)",
    )
    add(
        "--bits",
        type=_number,
        nargs="+",
        default=[1, 2, 4, 8],
        metavar="B",
        help="per coordinate (1 2 4 8); a quantizer takes part with those that it has",
    )
    names = ", ".join(QUANTIZERS)
    add(
        "--quantizers",
        nargs="+",
        choices=QUANTIZERS,
        default=list(QUANTIZERS[:-1]),
        metavar="Q",
        help=f"of {names} (all but the lattice)",
    )
    add(
        "--algorithms",
        nargs="+",
        choices=ALGORITHMS,
        default=list(ALGORITHMS),
        metavar="A",
        help=f"of {', '.join(ALGORITHMS)} (all)",
    )
    add(
        "--max-nmse",
        type=float,
        default=0.03,
        metavar="E",
        help="squared error that the advice allows, relative to the gradient's square (0.03)",
    )
    _add_places(parser)


def _add_places(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--backend", help="of torch.distributed (nccl on CUDA, gloo on CPU)")
    add("--device", metavar="KIND", help="cpu, cuda, ... (cuda where there is one)")
    add(
        "--communicator",
        choices=["torch", "mpi"],
        default="torch",
        help="what compressed exchanges travel by (torch)",
    )
    add(
        "--connections",
        type=int,
        default=1,
        metavar="N",
        help="TCP connections of compressed exchanges to each other rank, between sites (1)",
    )
    add(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="of two levels, which are measured where there are 2 nodes of 2 ranks (as launched)",
    )
    add("--model", metavar="MODULE:FUNCTION", help="time training steps of this model too")
    add("--step", metavar="SCRIPT", help="time training steps of this script's bench() too")
    add("--json", type=Path, metavar="FILE", help="write all figures, for `plan --from FILE`")
    add("--csv", type=Path, metavar="FILE", help="write the rows of the table")
    add("--plot", type=Path, metavar="FILE", help="draw them (matplotlib: 'rhtcomm[plot]')")


def _number(text: str) -> float:
    """Of bits: whole ones as an int, since quantizers ask for that."""
    number = float(text)
    return int(number) if number % 1 == 0 else number


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; the exit status.

    Raises:
        ValueError: an argument is out of its range, or nothing started this as several ranks.
    """
    launch = own_launch()
    _check(arguments, writes=launch.rank == 0)
    if launch.world_size < 2:
        if arguments.ranks is None:
            raise ValueError(
                "rhtcomm bench: it needs 2 or more ranks, so start it by a launcher, such as "
                "torchrun --standalone --nproc-per-node 2 -m rhtcomm bench, by mpiexec or srun, "
                "or with --ranks 2 on this machine alone"
            )
        return spawn(arguments.ranks, without_ranks(sys.argv[2:]))
    watch = Watch(launch.rank, launch.world_size)
    try:
        _run_rank(arguments, launch, watch)
    except (Exception, KeyboardInterrupt, Told) as error:
        watch.end(error)
    return 0


def _check(arguments: argparse.Namespace, writes: bool) -> None:
    """Raise ValueError for what is out of range; `writes`: whether this rank writes the files."""
    if arguments.ranks is not None and arguments.ranks < 2:
        raise ValueError(f"rhtcomm bench: --ranks {arguments.ranks} must be at least 2")
    if not 0 < arguments.seconds < math.inf:
        raise ValueError(f"rhtcomm bench: --seconds {arguments.seconds:g} must be positive")
    if arguments.ranks_per_node is not None and arguments.ranks_per_node < 1:
        raise ValueError(
            f"rhtcomm bench: --ranks-per-node {arguments.ranks_per_node} must be at least 1"
        )
    if not all(0 < size < math.inf for size in arguments.mebibytes):
        raise ValueError("rhtcomm bench: --mebibytes must be positive")
    if not all(1 <= bits <= 8 for bits in arguments.bits):
        raise ValueError("rhtcomm bench: --bits must be from 1 to 8")
    check_connections(arguments.connections, "rhtcomm bench")
    if arguments.connections > 1 and arguments.communicator == "mpi":
        raise ValueError("rhtcomm bench: --connections is for --communicator torch, not for mpi")
    if arguments.model and arguments.step:
        raise ValueError("rhtcomm bench: give --model or --step, not both")
    if not writes:  # other machines need have neither the folders nor matplotlib
        return
    if arguments.plot is not None:
        check_matplotlib()
    for path in (arguments.json, arguments.csv, arguments.plot):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"rhtcomm bench: {path}: there is no folder {path.parent}")


def without_ranks(arguments: Sequence[str]) -> list[str]:
    """Arguments for a rank, which finds its place in its environment."""
    kept, skip = [], False
    for word in arguments:
        if skip:
            skip = False
        elif word == "--ranks":
            skip = True
        elif not word.startswith("--ranks="):
            kept.append(word)
    return kept


def _run_rank(arguments: argparse.Namespace, launch: Launch, watch: Watch) -> None:
    logging.getLogger("rhtcomm").setLevel(logging.ERROR)
    device, store = join(launch, arguments.backend, arguments.device)
    watch.connect(store)
    ranks = Ranks(device, arguments.ranks_per_node or launch.local_size)
    arguments = ranks.tell(arguments)  # those of rank 0
    budget = Budget(arguments.seconds, ranks)
    result = Result(_facts(arguments, ranks))
    training = None
    if arguments.model or arguments.step:
        watch.doing = "the model was loaded"
        training = load(arguments.model, arguments.step, device)
        budget.end("loading the model")
    seconds = _PLANNED * arguments.seconds
    share = _FOR_STEPS if training is not None else 1.0
    measure_exchanges(arguments, share * seconds, result, budget, ranks, watch)
    if training is not None:
        watch.doing = "training steps were measured"
        backend, what = str(result.facts["backend"]), (arguments.bits, arguments.quantizers)
        field = contestants_for(backend, ranks.world_size, *what, arguments.connections)
        result.steps, dropped = measure_steps(training, field, seconds, budget, ranks)
        result.dropped += [
            {"contestant": one.name, "carrier": one.carrier, "numel": None} for one in dropped
        ]
        for one in field:
            one.close()
    if ranks.first:
        watch.doing = "results were written"
        _finish(arguments, result, budget)
    dist.barrier()
    dist.destroy_process_group()


def _facts(arguments: argparse.Namespace, ranks: Ranks) -> dict[str, object]:
    return {
        "rhtcomm": PACKAGE,
        "torch": torch.__version__,
        "backend": dist.get_backend(),
        "device": ranks.device.type,
        "communicator": arguments.communicator,
        "connections": arguments.connections,
        "world_size": ranks.world_size,
        "nodes": ranks.nodes,
        "threads": torch.get_num_threads(),
        "cores": machine.cores(),
        "kernels": machine.kernels(ranks.device),
        "processor": machine.processor(),
    }


def _finish(arguments: argparse.Namespace, result: Result, budget: Budget) -> None:
    def error(row: Row | Step) -> float:
        assert row.quantizer is not None
        assert row.algorithm is not None
        return expected_error(row.quantizer, row.bits, row.algorithm)

    result.parts = budget.parts
    if result.steps:
        result.advice = of_steps(result.steps, error, arguments.max_nmse)
    else:
        result.advice = advise(result.rows, error, arguments.max_nmse)
    try:
        if arguments.json is not None:
            write_json(result, arguments.json)
        if arguments.csv is not None:
            write_csv(result, arguments.csv)
        if arguments.plot is not None:
            plot(result, arguments.plot)
    finally:  # a full disk does not cost the measurements
        print(printed(result, budget.seconds, arguments.json), flush=True)
