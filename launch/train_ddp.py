"""Train a byte-level GPT on the Python standard library, with a choice of gradient compression.

    torchrun --nproc-per-node=2 launch/train_ddp.py --hook rht --bits 4
    launch/mpirun.sh 2 --hook rht --bits 4

Every machine has the data, so a run needs no download. Ranks read different windows of it, drawn
by a generator that is keyed by (seed, step, rank): nothing about the data has to be saved for a
run to resume where it stopped.

Communication is timed alike for all hooks: a bucket counts from the call of its hook until its
future completes, and a step's `comm_seconds` is the length of the union of these intervals on
rank 0. It holds encoding, waiting for slower ranks, the exchange and decoding, whether or not the
backward pass went on meanwhile. `exposed_seconds` is the part that it did not hide: from the call
of the step's last hook, when all gradients are there, until the backward pass returns.
"""

import argparse
import csv
import dataclasses
import gc
import hashlib
import io
import json
import math
import os
import platform
import socket
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

CSV_COLUMNS = (
    *("step", "train_loss", "val_loss", "step_seconds", "comm_seconds", "exposed_seconds"),
    "bytes_sent",
)

# What a run's results depend on, so what a resumed run must share with the one that it continues.
RESUME_FIELDS = (
    *("layers", "width", "heads", "context", "batch", "steps", "lr", "warmup", "seed"),
    *("hook", "bits", "quantizer", "exact_fraction", "rotations", "algorithm"),
    *("error_feedback", "powersgd_rank", "bucket_cap_mb"),
)

# Where torchrun and Slurm (for a requeued job) tell a rank that it was started again.
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

# The first steps allocate memory and open connections.
UNTIMED_STEPS = 3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT on the Python standard library. Start with torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = parser.add_argument_group("model (the defaults make 10.7 million parameters)")
    model.add_argument("--layers", type=int, default=6)
    model.add_argument("--width", type=int, default=384)
    model.add_argument("--heads", type=int, default=6)
    model.add_argument("--context", type=int, default=256, help="bytes a sequence")

    training = parser.add_argument_group("training")
    training.add_argument("--batch", type=int, default=8, help="sequences per rank and step")
    training.add_argument("--steps", type=int, default=1000)
    training.add_argument("--lr", type=float, default=1e-3, help="peak of the cosine schedule")
    training.add_argument("--warmup", type=int, default=50, help="steps of linear warmup")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--eval-every", type=int, default=50, help="steps between evaluations")
    training.add_argument("--eval-batches", type=int, default=8, help="validation batches per rank")

    hook = parser.add_argument_group("gradient communication")
    hook.add_argument("--hook", choices=("none", "fp16", "bf16", "powersgd", "rht"), default="rht")
    hook.add_argument("--bits", type=int, default=4, help="rht: bits a coordinate")
    hook.add_argument(
        "--quantizer", choices=("quic_fl", "eden", "vector"), default="quic_fl", help="rht"
    )
    hook.add_argument(
        "--exact-fraction",
        type=fraction,
        choices=(0, 1 / 512),
        default=0,
        metavar="{0,1/512}",
        help="rht with quic_fl: of the coordinates that travel exactly",
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
        help="rht: by default the quantizer's safe number",
    )
    hook.add_argument("--powersgd-rank", type=int, default=4, help="powersgd: of its matrices")
    hook.add_argument(
        "--error-feedback",
        action="store_true",
        help="rht: send later what a step could not; every rank's residuals, as many bytes as the "
        "model, then lie in the checkpoint",
    )
    hook.add_argument(
        "--communicator",
        choices=("torch", "mpi"),
        default="torch",
        help="rht: what carries the payloads; mpi needs ranks started by mpiexec",
    )
    hook.add_argument("--bucket-cap-mb", type=float, default=25.0, help="DDP's bucket size, in MiB")

    output = parser.add_argument_group("output")
    output.add_argument("--csv", type=Path, help="log with one row a step")
    output.add_argument("--summary", type=Path, help="JSON with the run's figures")
    output.add_argument(
        "--checkpoint",
        type=Path,
        help="file that all ranks can read; ranks started again by torchrun or Slurm go on from it",
    )
    output.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    output.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint; a new run renames what lies there to *.previous",
    )
    output.add_argument("--stop-at", type=int, help="write the checkpoint and end after this step")

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--backend", choices=("gloo", "nccl"), help="default: nccl where there is CUDA, else gloo"
    )
    machine.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda with nccl, cpu with gloo"
    )
    machine.add_argument("--threads", type=int, help="CPU threads a rank; default: its share")

    args = parser.parse_args()
    if "RANK" not in os.environ and started_by_mpiexec():
        take_ranks_from_mpi()
    if args.width % (2 * args.heads) != 0:
        parser.error(
            f"--width {args.width} over --heads {args.heads} does not give heads of even width: "
            f"choose a width that is a multiple of {2 * args.heads}"
        )
    for name in ("steps", "eval_every", "eval_batches", "checkpoint_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.checkpoint and args.hook == "powersgd":
        parser.error(
            "--hook powersgd keeps an error for each parameter, which --checkpoint does not save: "
            "leave out --checkpoint"
        )
    if args.error_feedback and args.hook != "rht":
        parser.error(f"--error-feedback is for --hook rht, not {args.hook}: leave one of them out")
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint: name the file to go on from")
    if "RANK" not in os.environ:
        parser.error(
            "the environment has no RANK: start this script with torchrun --nproc-per-node=2 "
            "or with launch/mpirun.sh 2"
        )
    if args.backend is None:
        cuda = args.device != "cpu" and torch.cuda.is_available()
        args.backend = "nccl" if cuda else "gloo"
    if args.device is None:
        args.device = "cuda" if args.backend == "nccl" else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "torch finds no CUDA device here, which --device cuda and --backend nccl need: "
            "leave them out to train on the CPU over Gloo"
        )
    if args.backend == "nccl" and args.device == "cpu":
        parser.error("--backend nccl needs --device cuda: leave out one of them")
    if args.threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.threads = max(1, (cores or 1) // int(os.environ["LOCAL_WORLD_SIZE"]))
    return args


def fraction(text: str) -> float:
    return float(Fraction(text))


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
        **{"RANK": str(world.rank), "WORLD_SIZE": str(world.size)},
        **{"LOCAL_RANK": str(node.rank), "LOCAL_WORLD_SIZE": str(node.size)},
        **{"MASTER_ADDR": host, "MASTER_PORT": str(port)},
    }


# Data ---------------------------------------------------------------------------------------------

# Third-party packages, tests, generated tables, and what distributions package apart from Python.
EXCLUDED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"),
    *("idlelib", "lib2to3", "distutils", "tkinter", "turtledemo", "ensurepip"),
}


def source_files(root: Path) -> list[str]:
    """Paths of the Python files under `root`, relative to it and sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        here = Path(folder).relative_to(root)
        found += [(here / name).as_posix() for name in names if name.endswith(".py")]
    return sorted(found)


def is_validation(relative_path: str) -> bool:
    """Whether a file is held out: one in ten, by a hash of its path."""
    return hashlib.sha256(relative_path.encode()).digest()[0] < 26


def load_corpus(root: Path) -> tuple[Tensor, Tensor]:
    """The bytes of the training files and of the validation files, each (bytes,) uint8."""
    parts = {False: bytearray(), True: bytearray()}
    for path in source_files(root):
        parts[is_validation(path)] += (root / path).read_bytes()
    for part in parts.values():
        if len(part) < 100_000:
            raise RuntimeError(
                f"the standard library at {root} has too little Python source ({len(part)} bytes "
                "in one part of the split): use a Python that ships its library as .py files"
            )
    train, validation = (
        torch.frombuffer(parts[held_out], dtype=torch.uint8) for held_out in (False, True)
    )
    return train, validation


def draw_batch(
    data: Tensor, batch: int, context: int, key: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Inputs and the bytes that follow them, both (batch, context) int64, drawn as `key` says."""
    starts = np.random.default_rng(key).integers(len(data) - context, size=(batch, 1))
    windows = data[torch.from_numpy(starts) + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


# Model --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal attention with rotary positions, then a GELU network; both with pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (batch, context, width); cos, sin: (context, head width / 2)."""
        qkv = self.query_key_value(self.attention_norm(x))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, C) each
        y = F.scaled_dot_product_attention(
            rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin), v, is_causal=True
        )
        x = x + self.attention_out(y.transpose(1, 2).flatten(2))
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. x: (..., context, head width)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class GPT(nn.Module):
    """Bytes to the logits of the next byte; the head shares the embedding's weights."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.half_head = width // heads // 2
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The residual stream is a sum of 2 * layers of these.
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, context) int64 -> logits (batch, context, 256)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        exponents = torch.arange(self.half_head, device=tokens.device) / self.half_head
        angles = torch.outer(positions, 10_000.0**-exponents)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    gains = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warmup, then a cosine from the peak to a hundredth of it."""
    warmup = min(1.0, (step + 1) / max(1, args.warmup))
    progress = max(0.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    return float(args.lr * warmup * (0.505 + 0.495 * math.cos(math.pi * progress)))


# Communication ------------------------------------------------------------------------------------

Hook = Callable[[Any, Any], torch.futures.Future[Tensor]]
Moment = float | torch.cuda.Event  # seconds, or a point of a CUDA stream


class MeasuredHook:
    """A communication hook that also records when each bucket was handed over and came back."""

    def __init__(self, hook: Hook, device: torch.device) -> None:
        self._hook = hook
        self._device = device
        self._intervals: list[tuple[Moment, Moment]] = []
        self.last_call: Moment | None = None

    def now(self) -> Moment:
        """On CUDA a moment of the current stream, since the host runs ahead of it."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def hook(
        self,
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        start = self.last_call = self.now()

        def finish(future: torch.futures.Future[Tensor]) -> Tensor:
            self._intervals.append((start, self.now()))
            return future.value()

        # DDP waits for the future that `then` makes, so a step never ends with an interval missing.
        return self._hook(state, bucket).then(finish)

    def take_seconds(self, origin: Moment) -> float:
        """Seconds with a bucket under way since the last call; `origin` is any earlier moment."""
        intervals = [(elapsed(origin, a), elapsed(origin, b)) for a, b in self._intervals]
        self._intervals.clear()
        return union_length(intervals)


def elapsed(start: Any, end: Any) -> float:
    """Seconds between two moments; those of CUDA must have passed on the device."""
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000
    return float(end - start)


def union_length(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals, which may overlap."""
    length, covered = 0.0, -math.inf
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return length


def make_hook(args: argparse.Namespace) -> tuple[Any, Hook]:
    """State and hook, as `register_comm_hook` takes them."""
    if args.hook == "none":
        return None, default_hooks.allreduce_hook
    if args.hook == "bf16":
        return None, default_hooks.bf16_compress_hook
    if args.hook == "fp16":
        return None, default_hooks.fp16_compress_hook
    if args.hook == "powersgd":
        # With more than one bucket it hangs on Gloo, where --bucket-cap-mb must hold the model.
        low_rank = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=args.powersgd_rank, start_powerSGD_iter=10
        )
        return low_rank, powerSGD_hook.powerSGD_hook
    import rhtcomm.hooks  # the other hooks train without the package

    state = rhtcomm.hooks.RHTState(
        bits=args.bits,
        quantizer=args.quantizer,
        exact_fraction=args.exact_fraction,
        rotations=args.rotations,
        algorithm=args.algorithm,
        error_feedback=args.error_feedback,
        seed=args.seed,
        communicator=rhtcomm.MPICommunicator() if args.communicator == "mpi" else None,
    )
    return state, rhtcomm.hooks.rht_hook


def bytes_of_step(args: argparse.Namespace, state: Any, parameters: int, world_size: int) -> int:
    """Bytes that a rank sends in a step of a hook other than rht."""
    itemsize = 2 if args.hook in ("fp16", "bf16") else 4
    if args.hook == "powersgd" and state.iter > state.start_powerSGD_iter:
        # The state counts what it sent in all its steps since the first compressed one.
        steps = round(state.total_numel_before_compression / parameters)
        parameters = round(state.total_numel_after_compression / steps)
    return ring_bytes(parameters, itemsize, world_size)


def ring_bytes(numel: int, itemsize: int, world_size: int) -> int:
    """Bytes that a rank sends in a ring all-reduce."""
    return round(2 * (world_size - 1) / world_size * numel * itemsize)


# Training -----------------------------------------------------------------------------------------


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    mean: list[float] = (total / dist.get_world_size()).tolist()
    return mean


def gather(value: Any) -> list[Any]:
    """What each rank gave, by rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    # A run that is killed here must not lose the checkpoint before.
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, config: dict[str, Any], device: torch.device
) -> tuple[dict[str, Any] | None, str]:
    """A rank's checkpoint, or None, and what the rank found at the path."""
    if not path.is_file():
        return None, "no file"
    try:
        data = path.read_bytes()
        content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        saved, step = content["config"], content["step"]
    except Exception as error:  # whatever unpickling raises; all ranks must hear of it
        return None, f"no checkpoint that can be read ({type(error).__name__}: {error})"
    differing = [
        f"{name}={saved.get(name)} (now {value})"
        for name, value in config.items()
        if saved.get(name) != value
    ]
    if differing:
        return None, f"a checkpoint that belongs to another run, with {', '.join(differing)}"
    return content, f"step {step} in a file with SHA-256 {hashlib.sha256(data).hexdigest()[:16]}"


def agreed_checkpoint(
    args: argparse.Namespace, config: dict[str, Any], device: torch.device
) -> dict[str, Any] | None:
    """What all ranks go on from, or None for a new run.

    The ranks decide together, as they may know different things: torchrun counts a restart on the
    node of the failure alone (torch 2.13), and a node may not see another's files.

    Raises:
        ValueError: on all ranks, if they do not all find the same checkpoint of this run.
    """
    restarted = any(int(os.environ.get(name, "0")) for name in RESTART_COUNTS)
    asked, again = (any(given) for given in zip(*gather((args.resume, restarted)), strict=True))
    path = args.checkpoint
    if path is None:
        return None
    if not (asked or again):
        # A restart before this run's first checkpoint must not take another run's.
        if dist.get_rank() == 0 and path.is_file():
            os.replace(path, path.with_name(path.name + ".previous"))
        return None

    checkpoint, found = load_checkpoint(path, config, device)
    ranks_by_finding: dict[str, list[str]] = {}
    for rank, finding in enumerate(gather(found)):
        ranks_by_finding.setdefault(finding, []).append(str(rank))
    if list(ranks_by_finding) == ["no file"] and not asked:
        return None  # it failed before the first checkpoint
    if checkpoint is None or len(ranks_by_finding) > 1:
        findings = "; ".join(
            f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} found {finding}"
            for finding, ranks in ranks_by_finding.items()
        )
        raise ValueError(
            f"the ranks cannot go on from --checkpoint {path}: {findings}. It must name one file "
            "that all nodes see, made with the settings of this run; a run without --resume starts "
            "anew"
        )
    return checkpoint


def logged_rows(path: Path, last_step: int) -> Iterator[dict[str, str]]:
    """The rows of a log up to a step; what was logged after the checkpoint will be run again."""
    if path.is_file():
        with path.open(newline="") as file:
            yield from (row for row in csv.DictReader(file) if int(row["step"]) <= last_step)


def train(args: argparse.Namespace) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    train_data, validation_data = load_corpus(Path(sysconfig.get_path("stdlib")))
    corpus = hashlib.sha256(train_data.numpy().tobytes()).hexdigest()[:16]

    torch.manual_seed(args.seed)
    gpt = GPT(args.layers, args.width, args.heads).to(device)
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    optimizer = make_optimizer(gpt, args.lr)

    for path in filter(None, (args.csv, args.summary, args.checkpoint)):
        path.parent.mkdir(parents=True, exist_ok=True)
    config = {name: getattr(args, name) for name in RESUME_FIELDS}
    config |= {"world_size": world_size, "corpus": corpus}
    checkpoint = agreed_checkpoint(args, config, device)
    first_step = checkpoint["step"] if checkpoint else 0
    last_step = min(args.steps, args.stop_at or args.steps)
    if checkpoint and first_step >= last_step:
        if rank == 0:
            print(
                f"the checkpoint {args.checkpoint} is at step {first_step} and the run ends at "
                f"step {last_step}: nothing is left to train"
            )
            if "summary" in checkpoint:  # not in those of earlier versions
                report(args, checkpoint["summary"])
        return
    if checkpoint:
        gpt.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    def batch(data: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        inputs, targets = draw_batch(data, args.batch, args.context, key)
        return inputs.to(device), targets.to(device)

    model = DistributedDataParallel(
        gpt, bucket_cap_mb=args.bucket_cap_mb, gradient_as_bucket_view=True
    )
    # DDP orders its buckets anew after its first backward pass, and compressed gradients depend on
    # the buckets. One pass thrown away before the hook is there gives every step the final ones,
    # in a new run and in a resumed one.
    loss_of(model, *batch(train_data, args.seed, 0, rank)).backward()
    optimizer.zero_grad()

    state, hook = make_hook(args)
    measured = MeasuredHook(hook, device)
    model.register_comm_hook(state, measured.hook)
    if checkpoint and args.hook == "rht":
        state.load_state_dict(checkpoint["hook"][rank], gpt)

    def validate() -> float:
        with torch.no_grad():
            losses = [
                loss_of(gpt, *batch(validation_data, index, rank)).item()
                for index in range(args.eval_batches)
            ]
        return statistics.fmean(losses)

    log = None
    if rank == 0 and args.csv:
        kept = list(logged_rows(args.csv, first_step)) if checkpoint else []
        log_file = args.csv.open("w", newline="")
        log = csv.DictWriter(log_file, CSV_COLUMNS)
        log.writeheader()
        log.writerows(kept)

    step_times: list[float] = []
    comm_times: list[float] = []
    exposed_times: list[float] = []
    bytes_sent = 0
    val_loss = math.nan
    name = f"rht, {args.bits} bits" if args.hook == "rht" else args.hook

    def summarize(steps: int) -> str:
        """The run's figures as JSON, after so many steps."""
        step_seconds, comm_seconds, exposed_seconds = (
            statistics.median(times[UNTIMED_STEPS:] or times)
            for times in (step_times, comm_times, exposed_times)
        )
        summary = {
            "args": vars(args),
            "name": name,
            "steps": steps,
            "world_size": world_size,
            "parameters": parameters,
            "final_val_loss": val_loss,
            "csv": args.csv,
            "median_step_seconds": step_seconds,
            "median_comm_seconds": comm_seconds,
            "median_exposed_seconds": exposed_seconds,
            "bytes_per_step": bytes_sent,
            "rht": None,
            "corpus": {
                "train_bytes": len(train_data),
                "validation_bytes": len(validation_data),
                "sha256": corpus,
            },
            "torch": torch.__version__,
            "hardware": hardware(device),
        }
        if args.hook == "rht":
            stats = state.stats()
            summary["rht"] = dataclasses.asdict(stats) | {
                "compression_ratio": stats.compression_ratio
            }
        return json.dumps(summary, indent=2, default=str)

    progress = tqdm(
        range(first_step, last_step),
        desc=name,
        initial=first_step,
        total=last_step,
        disable=None if rank == 0 else True,  # None: shown on a terminal only
    )
    for step in progress:
        sent_before = state.stats().bytes_sent if args.hook == "rht" else 0
        started = time.perf_counter()
        origin = measured.now()

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = loss_of(model, *batch(train_data, args.seed, step, rank))
        loss.backward()
        backward_done = measured.now()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        train_loss = loss.item()

        if device.type == "cuda":
            torch.cuda.synchronize()
        step_times.append(time.perf_counter() - started)
        comm_times.append(measured.take_seconds(origin))
        exposed_times.append(elapsed(measured.last_call, backward_done))
        if args.hook == "rht":
            bytes_sent = state.stats().bytes_sent - sent_before
        else:
            bytes_sent = bytes_of_step(args, state, parameters, world_size)

        done = step + 1
        evaluate = done % args.eval_every == 0 or done == last_step
        if evaluate:
            train_loss, val_loss = mean_over_ranks([train_loss, validate()], device)
        else:
            (train_loss,) = mean_over_ranks([train_loss], device)

        save = args.checkpoint and (done % args.checkpoint_every == 0 or done == last_step)
        hook_states: list[Any] | None = [None] * world_size if rank == 0 else None
        if save and args.hook == "rht":
            dist.gather_object(state.state_dict(gpt), hook_states)

        if rank == 0:
            progress.set_postfix(train=f"{train_loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
            if evaluate:
                progress.write(
                    f"{name}: step {done}/{args.steps}, loss {train_loss:.4f} in training, "
                    f"{val_loss:.4f} in validation, {step_times[-1]:.3f} s a step",
                    file=sys.stderr,
                )
            if log:
                log.writerow(
                    {
                        "step": done,
                        "train_loss": f"{train_loss:.6f}",
                        "val_loss": f"{val_loss:.6f}" if evaluate else "",
                        "step_seconds": f"{step_times[-1]:.6f}",
                        "comm_seconds": f"{comm_times[-1]:.6f}",
                        "exposed_seconds": f"{exposed_times[-1]:.6f}",
                        "bytes_sent": bytes_sent,
                    }
                )
                log_file.flush()
            if save:
                content = {"config": config, "step": done}
                content |= {"model": gpt.state_dict(), "optimizer": optimizer.state_dict()}
                content["summary"] = summarize(done)  # for a restart that finds nothing left to do
                if args.hook == "rht":
                    content["hook"] = hook_states
                save_checkpoint(args.checkpoint, content)

    if rank == 0:
        report(args, summarize(last_step))
    if args.hook == "rht":
        state.close()


def report(args: argparse.Namespace, summary: str) -> None:
    """Print a run's figures, and write them where --summary says."""
    run = json.loads(summary)
    print(
        f"{run['name']}: {run['parameters']:,} parameters, {run['world_size']} ranks, "
        f"{run['steps']} steps, validation loss {run['final_val_loss']:.4f} nats a byte, "
        f"{run['median_step_seconds']:.3f} s a step (median), "
        f"{run['median_comm_seconds']:.3f} s of it communicating, "
        f"{run['bytes_per_step']:,} bytes sent a step and rank"
    )
    if args.summary:
        args.summary.write_text(summary + "\n")


def hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} CPU cores ({vectors}), {platform.platform()}"


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cuda":  # over Gloo, ranks may share a GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(args.backend)
    train(args)
    gather(None)  # a node whose ranks have ended cannot start again with one whose rank fails now
    # DDP, its hook and the futures of the last step may refer to one another and to the group,
    # whose threads must end before Python does: they would ask a dying interpreter for its lock.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
