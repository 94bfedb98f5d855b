"""Exchanges of outer steps, and the check that ranks start with equal models."""

import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..arguments import natural
from ..communicators import SocketCommunicator, Topology, TorchCommunicator
from ..reduce import DisagreementError
from .anchors import CALL, Part, real
from .base import HookState
from .buckets import Bucket, say_if_exact
from .engines import Engine, Future
from .models import ranks_of
from .policy import Bits

__all__ = [
    "OuterState",
    "check_schedule",
    "digest",
    "outer_optimizer",
    "warn_of_ddp",
]

_log = logging.getLogger("rhtcomm")


class OuterState(HookState):
    """Configuration and progress of the exchanges of an `OuterAverager`.

    A step is an exchange of one fragment; each of its parts is a bucket.
    """

    def __init__(
        self, facts: Mapping[str, object], bits: Bits, warmup_steps: int = 0, **options: Any
    ) -> None:
        if options.get("equalize"):
            raise ValueError(
                f"{CALL}: leave out equalize; it helps only with Adam, which divides gradients by "
                "their size"
            )
        super().__init__(bits, warmup_steps=warmup_steps, **options)
        self.facts = dict(facts)
        """What the ranks compare in addition before the next exchange if `agreed` is false."""

    def begin(self, parts: Sequence[Part], followed: Mapping[str, torch.Tensor]) -> Engine:
        """Connect the ranks, and compare their arguments and averaged tensors; call it on all
        ranks.

        Raises:
            ValueError: it excludes a parameter that the model does not have.
            RuntimeError: another rank did not connect.
            DisagreementError: on all ranks, if their arguments or models differ.
        """
        session = self._session
        self.learn(parts)
        session.called = True  # its warnings do not apply here
        device = parts[0].flat.device
        engine = session.start(device, None, self._make_engine)
        with engine.beginning(self.key, device):
            _check_alike(followed, engine, device)
        return engine

    def learn(self, parts: Sequence[Part]) -> None:
        """Learn the names of the parts' tensors, if these are new."""
        named = [pair for part in parts for pair in zip(part.names, part.tensors, strict=True)]
        if not all(self._session.knows([tensor]) for _, tensor in named):
            self._session.learn([tensor for _, tensor in named])
            self.policy.learn(named)

    def _make_engine(self, *args: Any) -> Engine:
        engine = super()._make_engine(*args)
        engine.owner = CALL
        return engine

    def _facts(self, number: int) -> dict[str, object]:
        self.facts = super()._facts(number) | self.facts
        return self.facts

    def send(self, parts: Sequence[Part], changes: Sequence[torch.Tensor]) -> list[Future]:
        """Start averaging the changes of a fragment's parts, in place; returns futures."""
        engine, sent = self.engine, []
        assert engine is not None
        for part, change in zip(parts, changes, strict=True):
            key, ends = self._next(part.number, part is parts[-1], engine)
            treatment = None
            if not part.exact:
                say_if_exact(change.dtype, self._said)
                treatment = self.policy.treatment(key.step, part.tensors)
            bucket = Bucket(change, key, [*part.anchors], ends, treatment, self)
            bucket.reports = self._new_reports()
            sent.append(engine.submit(bucket))
            if self.reports is not None:
                self.reports.add(bucket, sent[-1], engine.cuda)
        return sent

    def wait(self, futures: Sequence[Future]) -> None:
        """Until the means are there, those of the fragment that was sent first; raises errors."""
        if self.reports is not None:
            self.reports.land(len(futures))
        for future in futures:
            future.wait()


# What the ranks begin with ----------------------------------------------------------------------


def _check_alike(named: Mapping[str, torch.Tensor], engine: Engine, device: torch.device) -> None:
    """Raise DisagreementError on all ranks unless all have the same tensors, bit for bit.

    Rank 0 warns if the ranks' processors round differently.
    """
    digests = b"".join(map(digest, [*named.values(), _fused_sum(device)]))
    row = torch.frombuffer(bytearray(digests), dtype=torch.uint8).to(device)
    rows = engine.topology.all_gather(row).view(-1, len(named) + 1, _DIGEST_BYTES)
    *alike, rounds_alike = (rows == rows[0]).all(dim=2).all(dim=0).tolist()
    if not rounds_alike and engine.topology.rank == 0:
        _log.warning(
            "%s: torch rounds x + a y differently on some ranks, which have another kind of "
            "processor; each step of the outer optimizer may make the last bits of anchors differ",
            CALL,
        )
    odd = [name for name, same in zip(named, alike, strict=True) if not same]
    if odd:
        raise DisagreementError(
            f"{CALL}: {len(odd)} of {len(named)} parameters and buffers, such as {odd[0]}, differ "
            "between ranks, but must be equal at the start: call torch.manual_seed before "
            "creating the model, or load one checkpoint on all ranks. Load what each rank saved "
            "for itself after creating the averager"
        )


def _fused_sum(device: torch.device) -> torch.Tensor:
    """x + a y, as in torch's optimizers; some processors round it once, others twice."""
    x = torch.arange(1, 4097, dtype=torch.float32, device=device) / 3
    return torch.add(x, x.flip(0), alpha=0.7)


def warn_of_ddp(model: nn.Module, topology: Topology) -> None:
    """Warn if DDP averages the gradients of ranks that exchange outer steps."""
    if not isinstance(topology, (TorchCommunicator, SocketCommunicator)):
        return  # levels, with DDP within the lower one; or other transports
    ranks = {*topology.ranks}
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            both = ranks & {*ranks_of(module.process_group)}
            if len(both) > 1:
                warnings.warn(
                    f"{CALL}: ranks {sorted(both)} are also in one DistributedDataParallel, which "
                    "sends every gradient in addition; leave it out, or pass a process_group "
                    "with one rank of each site",
                    stacklevel=3,
                )


_DIGEST_BYTES = 16


def digest(tensor: torch.Tensor) -> bytes:
    """A digest of its bits."""
    octets = real(tensor).contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(octets.tobytes(), digest_size=_DIGEST_BYTES).digest()


# Arguments ---------------------------------------------------------------------------------------


def check_schedule(period: object, fragments: object, delay: object) -> tuple[int, int]:
    steps, count = natural(period, CALL, "period"), natural(fragments, CALL, "fragments")
    wait = natural(delay, CALL, "delay")
    if steps < 1:
        raise ValueError(f"{CALL}: period={steps} must be at least 1, in inner steps")
    if not 1 <= count <= steps:
        raise ValueError(
            f"{CALL}: fragments={count} must lie in [1, period={steps}]: fragments are exchanged "
            "one at a time"
        )
    if wait >= steps:
        raise ValueError(
            f"{CALL}: delay={wait} must be less than period={steps}: a fragment's exchange must "
            "end before its next one starts"
        )
    return steps, wait


def outer_optimizer(make: object, anchors: nn.Module) -> torch.optim.Optimizer:
    if not callable(make) or isinstance(make, torch.optim.Optimizer):
        raise TypeError(
            f"{CALL}: optimizer is of type {type(make).__name__}; it must be a function that takes "
            "the list of anchors and returns the outer optimizer, such as lambda anchors: "
            "torch.optim.SGD(anchors, lr=1.0)"
        )
    parameters = [*anchors.parameters()]
    made = make(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"{CALL}: optimizer made {made!r:.80}, which is not a torch.optim.Optimizer"
        )
    has = {id(p) for group in made.param_groups for p in group["params"]}
    if has != {*map(id, parameters)}:
        raise ValueError(
            f"{CALL}: the outer optimizer has {len(has)} parameters, but there are "
            f"{len(parameters)} anchors; pass it exactly the anchors"
        )
    return made
