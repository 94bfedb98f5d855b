"""One log line that says what a hook does."""

import logging
from collections.abc import Iterable

import torch

from ..codec import DTYPES
from ..communicators import SocketCommunicator, Topology, TorchCommunicator, backend_of
from ..kernels import cpu, kernel_for, reference
from ..lattice import Lattice
from ..quantizers import QuicFL
from ..reduce import Reducer
from .base import HookState

__all__ = ["log_summary"]

_log = logging.getLogger("rhtcomm")


def log_summary(
    state: HookState,
    device: torch.device,
    reductions: Iterable[tuple[Reducer, torch.dtype, int, bool]],
    *,
    what: str = "gradients",
    step: str = "step",
) -> None:
    """Log on rank 0 how gradients on a device are sent.

    `reductions` are those of a step: the reducer, the dtype, the number of coordinates, and whether
    the mean is scattered. `what` names what is averaged, and `step` a step.
    """
    engine = state.engine
    assert engine is not None
    topology, codec = engine.topology, str(state.codec)
    if topology.rank != 0:
        return
    if state.policy.by_bucket:
        traffic = "exclude and bits decide for each bucket whether and how it is compressed"
    else:
        sent, uncompressed = (b / 1e6 for b in _bytes_per_step(state, reductions))
        traffic = f"a rank sends about {sent:.2f} MB per {step} instead of {uncompressed:.2f} MB"
        if state.policy.treatment(state.key.step, ()) is not None:
            traffic += f" from {step} {state.policy.warmup_steps} on"
    _log.info(
        f"rhtcomm: {what} of {topology.world_size} ranks are averaged by {codec}, algorithm "
        f"{state.algorithm!r}, over {_transport(topology, device)}, with "
        f"{_kernels(state, device)}; {traffic}"
    )


def _transport(topology: Topology, device: torch.device) -> str:
    if topology.within is not None:
        within, between = _transport(topology.within, device), _transport(topology.between, device)
        return f"{within} within a node and {between} between nodes"
    if isinstance(topology, TorchCommunicator):
        return "gloo" if topology.private else backend_of(topology.group, device.type)
    return "sockets" if isinstance(topology, SocketCommunicator) else type(topology).__name__


def _kernels(state: HookState, device: torch.device) -> str:
    # The lattice's kernels are of the same kind as QUIC-FL's.
    quantizer = QuicFL(4) if isinstance(state.codec, Lattice) else state.codec.quantizer
    kernel = kernel_for(device, quantizer)
    if isinstance(kernel, cpu.Library):
        return f"C kernels ({kernel.variant})"
    return "plain torch" if kernel is reference else "Triton kernels"


def _bytes_per_step(
    state: HookState, reductions: Iterable[tuple[Reducer, torch.dtype, int, bool]]
) -> tuple[float, float]:
    """MB that a rank sends with and without compression."""
    sent = uncompressed = 0.0
    for reducer, dtype, numel, scatters in reductions:
        before = reducer.topology.ring_bytes(numel * dtype.itemsize) / (2 if scatters else 1)
        uncompressed += before
        compressed = dtype in DTYPES and numel >= state.min_numel
        sent += reducer.expected_bytes(numel, scatters) if compressed else before
    return sent, uncompressed
