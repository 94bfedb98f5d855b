"""The communication hooks that a benchmark compares, and the bucket that it gives them."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

import rhtcomm.hooks
from rhtcomm.bench.ranks import TIMEOUT
from rhtcomm.codebooks import EXPECTED_VNMSE
from rhtcomm.communicators import Topology
from rhtcomm.quantizers import ECDQ

__all__ = [
    "QUANTIZERS",
    "Bucket",
    "Contestant",
    "compressed",
    "compressed_by",
    "expected_error",
    "fits",
    "interest",
    "power_sgd",
    "synchronize",
    "torchs",
    "uncompressed_by_mpi",
]

QUANTIZERS = ("quic_fl", "ecdq", "eden", "vector", "lattice")
_COLUMNS = 1024  # of the bucket's matrices, which PowerSGD approximates
_ROWS = 1600
# E|x' - x|^2 / |x|^2 by bits; of EDEN by the codebook of Lloyd and Max, of vectors as shipped.
_ERRORS = {
    "quic_fl": EXPECTED_VNMSE["quic_fl"],
    "eden": dict(
        enumerate(
            (0.570796, 0.133121, 0.035784, 0.009592, 0.002511, 0.000645, 0.0001635, 0.0000412), 1
        )
    ),
    "vector": {1: 0.463, 2: 0.1067, 4: 0.00781},
}

Hook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass
class Bucket:
    """What a hook uses of DDP's GradBucket, which Python cannot make: the step's only bucket."""

    tensor: torch.Tensor  # (numel,) float32
    matrices: list[torch.Tensor]  # views of it, as gradients of parameters are
    number: int = 0

    @classmethod
    def of(cls, data: torch.Tensor, number: int = 0) -> "Bucket":
        """A copy of data (numel,), a multiple of 1024 coordinates; buckets of a hook have numbers.

        A hook may keep something for each number, so a number stands for one length.
        """
        tensor = data.clone()
        return cls(tensor, list(tensor.view(-1, _COLUMNS).split(_ROWS)), number)

    def buffer(self) -> torch.Tensor:
        return self.tensor

    def gradients(self) -> list[torch.Tensor]:
        return self.matrices

    def parameters(self) -> list[torch.Tensor]:
        return self.matrices

    def index(self) -> int:
        return self.number

    def is_last(self) -> bool:
        return True


@dataclass
class Contestant:
    """One way to average a bucket, and what is known of it beforehand."""

    name: str
    carrier: str  # what its messages travel by, such as "gloo"
    hook: Hook
    make_state: Callable[[], Any]
    error: float  # expected |mean' - mean|^2 / |mean|^2
    quantizer: str | None = None  # None: not this package's
    algorithm: str | None = None
    bits: float = 32.0  # nan: it sends no number per coordinate
    bytes_sent: Callable[[int], float] | None = None  # by a rank, of numel; None: its state counts
    low_rank: bool = False  # it approximates, and is checked on what it can represent
    slack: float = field(default=1.3, repr=False)  # of the error, in one measurement

    @functools.cached_property
    def state(self) -> Any:
        """Made for those that compete only."""
        return self.make_state()

    @property
    def compresses(self) -> bool:
        """Whether it is one of this package's, compressed."""
        return self.quantizer is not None

    def seconds(self, bucket: Bucket) -> float:
        """Average the bucket in place, after a barrier; until the result is there, on this rank."""
        device = bucket.tensor.device
        synchronize(device)
        dist.barrier()
        start = time.perf_counter()
        done = self.hook(self.state, bucket).wait()
        synchronize(device)
        elapsed = time.perf_counter() - start
        if done.data_ptr() != bucket.tensor.data_ptr():
            bucket.tensor.copy_(done)
        return elapsed

    def close(self) -> None:
        """End connections of its own."""
        if "state" in self.__dict__ and isinstance(self.state, rhtcomm.hooks.RHTState):
            self.state.close()


def fits(quantizer: str, bits: float) -> bool:
    """Whether a quantizer has so many bits per coordinate."""
    if quantizer == "ecdq":
        return bits in {quarter / 4 for quarter in range(4, 25)}
    return bits in _ERRORS.get(quantizer, _ERRORS["quic_fl"])


def expected_error(quantizer: str, bits: float, algorithm: str) -> float:
    """The expected error of a mean of independent Gaussian gradients, relative to its square."""
    if quantizer == "lattice":
        # Of Gaussian rows the largest of 4096 is below 5 standard deviations, nearly always.
        return float((10 / (2**bits - 1)) ** 2 / 12)
    error = ECDQ(bits).vnmse if quantizer == "ecdq" else _ERRORS[quantizer][int(bits)]
    # The second hop's is of the mean and its error.
    return error if algorithm == "all_gather" else 2 * error + error**2


def compressed(
    carrier: str,
    bits: float,
    algorithm: str = "all_gather",
    quantizer: str = "quic_fl",
    make_communicator: Callable[[], Topology] | None = None,
    min_numel: int = 0,
    connections: int = 1,
    **options: Any,
) -> Contestant:
    """This package's hook; by default over connections of its own, as in training.

    Args:
        make_communicator: what makes a communicator, over which it exchanges instead.
        min_numel, connections: of `RHTState`.
        options: further ones of `RHTState`, which become part of its name.
    """

    def make_state() -> rhtcomm.hooks.RHTState:
        return rhtcomm.hooks.RHTState(
            bits,
            quantizer=quantizer,  # type: ignore[arg-type]
            algorithm="auto" if quantizer == "lattice" else algorithm,  # type: ignore[arg-type]
            communicator=None if make_communicator is None else make_communicator(),
            timeout=TIMEOUT if make_communicator is None else None,
            min_numel=min_numel,
            connections=connections if make_communicator is None else 1,
            warmup_steps=0,
            **options,
        )

    words = [f"rht{bits:g}"]
    words += [quantizer] if quantizer != "quic_fl" else []
    words += [algorithm] if quantizer != "lattice" else []
    name = ", ".join([" ".join(words), *map(str, options.values())])
    error = expected_error(quantizer, bits, algorithm)
    hook = rhtcomm.hooks.rht_hook
    return Contestant(name, carrier, hook, make_state, error, quantizer, algorithm, bits)


def compressed_by(
    carrier: str,
    bits: Sequence[float],
    quantizers: Sequence[str],
    algorithms: Sequence[str],
    make_communicator: Callable[[], Topology] | None = None,
    min_numel: int = 0,
    connections: int = 1,
) -> list[Contestant]:
    """All combinations that exist."""
    return [
        compressed(carrier, b, algorithm, quantizer, make_communicator, min_numel, connections)
        for quantizer in quantizers
        for b in bits
        for algorithm in (algorithms if quantizer != "lattice" else ("lattice",))
        if fits(quantizer, b)
    ]


def torchs(carrier: str, world_size: int, names: Sequence[str]) -> list[Contestant]:
    """Torch's uncompressed hooks, of "float32", "fp16" and "bf16"."""
    ring = 2 * (world_size - 1) / world_size
    hooks: dict[str, tuple[Hook, int, float]] = {
        "float32": (default_hooks.allreduce_hook, 4, 1e-10),
        # A ring rounds the sum at every rank.
        "fp16": (default_hooks.fp16_compress_hook, 2, max(1e-6, 3e-8 * world_size)),
        "bf16": (default_hooks.bf16_compress_hook, 2, max(1e-4, 2e-6 * world_size)),
    }
    found = []
    for name in names:
        hook, itemsize, error = hooks[name]
        sent = functools.partial(_product, ring * itemsize)
        bits = 8.0 * itemsize
        one = Contestant(name, carrier, hook, lambda: None, error, bits=bits, bytes_sent=sent)
        found.append(one)
    return found


def _product(factor: float, numel: int) -> float:
    return factor * numel


def power_sgd(carrier: str, world_size: int, rank: int) -> Contestant:
    """Torch's PowerSGD hook, on matrices of 1024 columns."""
    ring = 2 * (world_size - 1) / world_size

    def sent(numel: int) -> float:
        rows = [len(matrix) for matrix in Bucket.of(torch.empty(numel)).matrices]
        return ring * 4 * rank * sum(count + _COLUMNS for count in rows)

    return Contestant(
        f"PowerSGD rank {rank}",
        carrier,
        powerSGD_hook.powerSGD_hook,
        lambda: powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=2
        ),
        error=1e-3,
        bytes_sent=sent,
        bits=math.nan,
        low_rank=True,
    )


def uncompressed_by_mpi(communicator: Topology) -> Contestant:
    """This package's exact average over MPI, which is MPI's own sum."""
    ring = 2 * (communicator.world_size - 1) / communicator.world_size
    return Contestant(
        "float32",
        "mpi",
        rhtcomm.hooks.rht_hook,
        lambda: rhtcomm.hooks.RHTState(communicator=communicator, min_numel=1 << 62),
        error=1e-10,
        bytes_sent=functools.partial(_product, ring * 4),
    )


def interest(world_size: int, contestant: Contestant) -> int:
    """How late a contestant comes, and so how soon it is left out."""
    if not contestant.compresses:
        return 1 if contestant.low_rank else 0
    usual = "all_gather" if world_size == 2 else "two_shot"
    late = 0 if contestant.algorithm in (usual, "lattice") else 4
    late += 0 if contestant.bits == 4 else 1 if contestant.bits in (2, 8) else 2
    return late + {"quic_fl": 0, "ecdq": 1}.get(str(contestant.quantizer), 3)
