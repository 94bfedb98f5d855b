"""The communication hooks that throughput.py compares, and the bucket that it gives them."""

import fnmatch
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

import rhtcomm
import rhtcomm.hooks
from rhtcomm.codebooks.quic_fl import WIDE

BITS = (1, 2, 4, 8)

Hook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]


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
    hook: Hook
    make_state: Callable[[], Any]
    allowed: float  # bound on |mean' - mean|^2 / |mean|^2
    sent: float = math.nan  # bytes that a rank sends; NaN: the state counts them

    @functools.cached_property
    def state(self) -> Any:
        """Made for those that compete only."""
        return self.make_state()

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
    everybody = torchs_hooks(numel, ring)
    everybody += compressed("gloo", None)  # each hook makes a group of its own, as in training
    if "PMI_RANK" in os.environ:
        mpi = rhtcomm.MPICommunicator()
        everybody.append(
            Contestant(
                "float32",
                "mpi",
                rhtcomm.hooks.rht_hook,
                lambda: rhtcomm.hooks.RHTState(communicator=mpi, min_numel=numel + 1),
                allowed=1e-10,
                sent=ring * 4 * numel,
            )
        )
        everybody += compressed("mpi", mpi)
    return [
        one
        for one in everybody
        for names in [(one.name, f"{one.name}, {one.carrier}")]
        if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)
    ]


def torchs_hooks(numel: int, ring: float) -> list[Contestant]:
    """Torch's own hooks, over Gloo; `ring` times a tensor's bytes is what a rank sends of it."""

    def plain(name: str, hook: Hook, itemsize: int, allowed: float) -> Contestant:
        return Contestant(name, "gloo", hook, lambda: None, allowed, ring * itemsize * numel)

    def power_sgd(rank: int) -> Contestant:
        rows = [len(matrix) for matrix in Bucket.of(torch.empty(numel)).matrices]
        return Contestant(
            f"PowerSGD rank {rank}",
            "gloo",
            powerSGD_hook.powerSGD_hook,
            lambda: powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=rank, start_powerSGD_iter=2
            ),
            allowed=1e-3,
            sent=ring * 4 * rank * sum(count + 1024 for count in rows),
        )

    return [
        plain("float32", default_hooks.allreduce_hook, 4, 1e-10),
        plain("fp16", default_hooks.fp16_compress_hook, 2, 1e-6),
        plain("bf16", default_hooks.bf16_compress_hook, 2, 1e-4),
        power_sgd(1),
        power_sgd(4),
    ]


def compressed(carrier: str, communicator: rhtcomm.MPICommunicator | None) -> list[Contestant]:
    """This package's hook by bits and algorithm."""
    found = []
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
            options |= {"communicator": communicator, "min_numel": 0, "warmup_steps": 0}
            make_state = functools.partial(rhtcomm.hooks.RHTState, bits, **options)
            name = f"rht{bits} {way}"
            hook = rhtcomm.hooks.rht_hook
            found.append(Contestant(name, carrier, hook, make_state, allowed=1.3 * allowed))
    return found
