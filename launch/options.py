"""The trainer's command line, and the variables that it reads from a rank's environment."""

import argparse
import os
import socket
from fractions import Fraction
from pathlib import Path

import torch


def parse_args() -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args()
    if "RANK" not in os.environ and started_by_mpiexec():
        take_ranks_from_mpi()
    try:
        check(args)
        choose_machine(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT on the Python standard library. Start with torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = parser.add_argument_group("model (the defaults make 10.7 million parameters)")
    model.add_argument("--layers", type=int, default=6)
    model.add_argument("--width", type=int, default=384)
    model.add_argument("--heads", type=int, default=6)
    model.add_argument("--context", type=int, default=256, help="bytes per sequence")

    training = parser.add_argument_group("training")
    training.add_argument("--batch", type=int, default=8, help="sequences per rank and step")
    training.add_argument("--steps", type=int, default=1000)
    training.add_argument("--lr", type=float, default=1e-3, help="peak of the cosine schedule")
    training.add_argument("--warmup", type=int, default=50, help="steps of linear warmup")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--eval-every", type=int, default=50, help="steps between evaluations")
    training.add_argument("--eval-batches", type=int, default=8, help="validation batches per rank")

    add_hook_options(parser)
    add_output_options(parser)

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--backend", choices=("gloo", "nccl"), help="default: nccl with CUDA, otherwise gloo"
    )
    machine.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda with nccl, cpu with gloo"
    )
    machine.add_argument(
        "--threads",
        type=int,
        help=("CPU threads per rank; default: the cores divided by the ranks of the node"),
    )
    return parser


def add_hook_options(parser: argparse.ArgumentParser) -> None:
    hook = parser.add_argument_group("gradient communication")
    hook.add_argument("--hook", choices=("none", "fp16", "bf16", "powersgd", "rht"), default="rht")
    hook.add_argument("--bits", type=bits, default=4, help="rht: bits per coordinate")
    hook.add_argument(
        "--quantizer",
        choices=("quic_fl", "ecdq", "eden", "vector"),
        default="quic_fl",
        help="rht",
    )
    hook.add_argument(
        "--hook-warmup",
        type=int,
        default=64,
        metavar="STEPS",
        help=(
            "rht: number of first steps that are sent with 8 bits per coordinate (ecdq: 6, "
            "vector: 4)"
        ),
    )
    hook.add_argument(
        "--exact-fraction",
        type=fraction,
        choices=(0, 1 / 512),
        default=0,
        metavar="{0,1/512}",
        help="rht with quic_fl: fraction of the coordinates that are sent exactly",
    )
    hook.add_argument(
        "--algorithm",
        choices=("auto", "all_gather", "two_shot", "gather"),
        default="auto",
        help="rht",
    )
    hook.add_argument(
        "--rotations",
        type=lambda text: text if text == "auto" else int(text),
        choices=(1, 2, 3, "auto"),
        help="rht: default: the quantizer's own number",
    )
    hook.add_argument("--powersgd-rank", type=int, default=4, help="powersgd: rank of its matrices")
    hook.add_argument(
        "--error-feedback",
        action="store_true",
        help=(
            "rht: add the compression error of a step to the next; the checkpoint then holds each "
            "rank's residuals, as large as the model"
        ),
    )
    hook.add_argument(
        "--communicator",
        choices=("torch", "mpi"),
        default="torch",
        help="rht: transport of the payloads; mpi needs ranks started by mpiexec",
    )
    hook.add_argument(
        "--connections",
        type=int,
        default=1,
        help="rht: TCP connections to each other rank, for networks between sites",
    )
    hook.add_argument("--bucket-cap-mb", type=float, default=25.0, help="DDP's bucket size, in MiB")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--csv", type=Path, help="log with one row per step")
    output.add_argument(
        "--telemetry",
        type=Path,
        metavar="RUN.CSV",
        help="rht: CSV with one row per bucket and step, for python -m rhtcomm report",
    )
    output.add_argument("--summary", type=Path, help="JSON with the run's figures")
    output.add_argument(
        "--checkpoint",
        type=Path,
        help="file that all ranks can read; ranks restarted by torchrun or Slurm resume from it",
    )
    output.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    output.add_argument(
        "--resume",
        action="store_true",
        help="resume from the checkpoint; a new run renames an existing one to *.previous",
    )
    output.add_argument("--stop-at", type=int, help="write the checkpoint and stop after this step")


def fraction(text: str) -> float:
    return float(Fraction(text))


def bits(text: str) -> float:
    return float(text) if "." in text else int(text)


def check(args: argparse.Namespace) -> None:
    """Check the options that do not depend on the machine.

    Raises:
        ValueError: options are out of range or contradict each other, or this process is not a
            rank.
    """
    if args.width % (2 * args.heads) != 0:
        raise ValueError(
            f"--width {args.width} over --heads {args.heads} does not give heads of even width; "
            f"choose a multiple of {2 * args.heads}"
        )
    for name in ("steps", "eval_every", "eval_batches", "checkpoint_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.checkpoint and args.hook == "powersgd":
        raise ValueError(
            "--hook powersgd keeps an error for each parameter, which --checkpoint does not save; "
            "leave out --checkpoint"
        )
    if args.error_feedback and args.hook != "rht":
        raise ValueError(
            f"--error-feedback works only with --hook rht, not {args.hook}; leave out one of them"
        )
    if args.telemetry and args.hook != "rht":
        raise ValueError(f"--telemetry is for --hook rht, not {args.hook}: leave one of them out")
    if args.resume and args.checkpoint is None:
        raise ValueError("--resume needs --checkpoint; name the file to resume from")
    if "RANK" not in os.environ:
        raise ValueError(
            "the environment has no RANK; start this script with torchrun --nproc-per-node=2 or "
            "with launch/mpirun.sh 2"
        )


def choose_machine(args: argparse.Namespace) -> None:
    """Choose the backend, the device and the threads if they were not given.

    Raises:
        ValueError: the backend and the device do not fit each other or this machine.
    """
    if args.backend is None:
        cuda = args.device != "cpu" and torch.cuda.is_available()
        args.backend = "nccl" if cuda else "gloo"
    if args.device is None:
        args.device = "cuda" if args.backend == "nccl" else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda and --backend nccl need a CUDA device, but torch finds none; leave "
            "them out to train on the CPU over Gloo"
        )
    if args.backend == "nccl" and args.device == "cpu":
        raise ValueError("--backend nccl needs --device cuda; leave out one of them")
    if args.threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.threads = max(1, (cores or 1) // int(os.environ["LOCAL_WORLD_SIZE"]))


def started_by_mpiexec() -> bool:
    return any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"))


def take_ranks_from_mpi() -> None:
    """Set the variables that torchrun would have set; DDP's own process group needs them."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    host = "127.0.0.1" if node.size == world.size else socket.gethostname()
    host, port = world.bcast((host, port))
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(node.rank),
        "LOCAL_WORLD_SIZE": str(node.size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
