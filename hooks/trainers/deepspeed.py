"""The hook in DeepSpeed without ZeRO, where the engine averages gradients itself.

The engine does not use DistributedDataParallel. After the last backward pass of a step it flattens
and averages the gradients of all parameters. Here `rht_hook` does this instead, with buckets like
DDP's, but the same in each step.
"""

import inspect
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from ..ddp import rht_hook
from ..policy import Bits
from ..register import Handle, begin
from ..state import RHTState
from ..stats import figures
from .common import attach, restore_rank, save_rank

__all__ = ["register"]

CALL = "rhtcomm.hooks.trainers.deepspeed.register"
NUMEL = 1 << 23  # of a bucket: one travels while others are encoded and decoded


def register(engine: DeepSpeedEngine, bits: Bits = 4, **options: Any) -> Handle:
    """Compress the gradients of an engine that `deepspeed.initialize` returned, without ZeRO.

    ``handle = register(engine, bits=4)``; call it in all processes.

    Gradients are averaged where the engine would: after the backward pass of the last micro-batch
    of a step, in their dtype there. The engine's `save_checkpoint` and `load_checkpoint` save and
    load the hook's state, in one file per rank. If `load_checkpoint` leaves out the optimizer, it
    also leaves out the hook. A checkpoint without the hook is loaded with a warning. The figures of
    each step go to DeepSpeed's monitors. Call `handle.close()` before `destroy_process_group`.

    In a single process it warns that there is nothing to compress.

    Args:
        engine: the first result of `deepspeed.initialize`.
        bits, options: of `rhtcomm.hooks.register`.

    Raises:
        TypeError: it is not a DeepSpeedEngine.
        ValueError: the engine uses ZeRO or parallelism other than data parallelism, or sums
            gradients; or an option is out of its range or has other ranks.
        RuntimeError: the engine already has a hook, or another rank did not connect.
        DisagreementError: on all ranks, if their arguments differ.
    """
    _check(engine, options)
    if engine.seq_dp_world_size == 1:
        how = "start the script with deepspeed or torchrun"
        return attach(engine.module, bits, options, CALL, how)
    handle = _Handle(engine, RHTState(bits, **options))
    begin(handle.state, engine.module, engine.seq_data_parallel_group, handle.install)
    return handle


def _check(engine: DeepSpeedEngine, options: dict[str, Any]) -> None:
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"{CALL}: engine={engine!r:.80} must be a DeepSpeedEngine, the first of what "
            "deepspeed.initialize returns"
        )
    other = engine.pipeline_parallelism or engine.has_moe_layers
    refused = (
        ("process_group" in options, "leave out process_group; the engine's own is used"),
        (
            engine.zero_optimization(),
            f"the engine uses ZeRO stage {engine.zero_optimization_stage()}, which reduces "
            'shards; set "zero_optimization": {"stage": 0}, or shard the model with '
            "fully_shard (FSDP2) instead and call rhtcomm.hooks.compress_fsdp(model)",
        ),
        (
            other or engine.mp_world_size * engine.sequence_parallel_size > 1,
            "the engine uses pipeline, expert, tensor or sequence parallelism; the hook supports "
            "only data parallelism",
        ),
        (
            not engine.gradient_average,
            'the engine sums gradients; set "gradient_allreduce_op": "mean"',
        ),
    )
    for holds, reason in refused:
        if holds:
            raise ValueError(f"{CALL}: {reason}")
    if _REPLACED[0] in vars(engine):
        raise RuntimeError(
            f"{CALL}: the engine already has a hook; call remove() on its handle first"
        )


_REPLACED = ("buffered_allreduce_fallback", "save_checkpoint", "load_checkpoint")


class _Handle(Handle):
    """A handle that replaces three methods of the engine."""

    state: RHTState

    def __init__(self, engine: DeepSpeedEngine, state: RHTState) -> None:
        super().__init__(engine.module, state)
        self._weak_engine = weakref.ref(engine)
        self._logged = state.stats()  # already sent to the monitors

    def install(self) -> None:
        engine = self._engine()
        engine.buffered_allreduce_fallback = self._average
        engine.save_checkpoint, engine.load_checkpoint = self._save, self._load

    def _bypass(self) -> None:
        """Restore the engine's own averaging."""
        for name in _REPLACED:
            vars(self._engine()).pop(name, None)

    def _engine(self) -> Any:
        engine = self._weak_engine()
        if engine is None:
            raise RuntimeError(f"{CALL}: its engine is gone; register the new one")
        return engine

    def _average(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Replace the gradients of all parameters by their means over ranks."""
        assert grads is None, "the engine names gradients to average in pipelines alone"
        engine = self._engine()
        buckets = [*_buckets(engine.module)]
        means = [rht_hook(self.state, bucket) for bucket in buckets]
        if self.state.reports is not None:
            self.state.reports.land()
        for bucket, mean in zip(buckets, means, strict=True):
            bucket.take(mean.wait())
        if engine.monitor.enabled:
            before, self._logged = self._logged, self.stats()
            samples = engine.global_samples + engine.train_batch_size()  # after this step
            events = figures(before, self._logged).items()
            engine.monitor.write_events([(name, value, samples) for name, value in events])

    def _save(
        self, save_dir: str | os.PathLike[str], tag: Any = None, *others: Any, **named: Any
    ) -> Any:
        engine = self._engine()
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        folder = Path(save_dir, tag)
        folder.mkdir(parents=True, exist_ok=True)
        save_rank(self, folder)
        # The engine waits for all ranks before it writes that this is the latest checkpoint.
        return type(engine).save_checkpoint(engine, save_dir, tag, *others, **named)

    def _load(self, *arguments: Any, **named: Any) -> Any:
        engine = self._engine()
        load = type(engine).load_checkpoint
        path, client_state = load(engine, *arguments, **named)
        given = inspect.signature(load).bind(engine, *arguments, **named)
        given.apply_defaults()
        told = given.arguments
        if path is not None and told["load_optimizer_states"] and not told["load_module_only"]:
            restore_rank(self, Path(path).parent)
        return path, client_state


@dataclass(frozen=True)
class _Bucket:
    """Gradients in the form of DDP's buckets, for `rht_hook`."""

    number: int
    last: bool
    owners: list[torch.Tensor]
    """The parameters."""
    flat: torch.Tensor
    """(numel,) their gradients."""

    def index(self) -> int:
        return self.number

    def is_last(self) -> bool:
        return self.last

    def parameters(self) -> list[torch.Tensor]:
        return self.owners

    def buffer(self) -> torch.Tensor:
        return self.flat

    def take(self, mean: torch.Tensor) -> None:
        """Copy the mean to the gradients."""
        pieces = mean.split([parameter.numel() for parameter in self.owners])
        for parameter, piece in zip(self.owners, pieces, strict=True):
            _gradient(parameter).copy_(piece.view(parameter.shape))


def _buckets(model: torch.nn.Module) -> Iterator[_Bucket]:
    """All gradients in the order of the parameters, by dtype."""
    lists: dict[torch.dtype, list[list[torch.Tensor]]] = {}
    room: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter.numel() == 0:
            continue
        if parameter.grad is None:  # other ranks may have one
            parameter.grad = torch.zeros_like(parameter)
        dtype = parameter.grad.dtype
        room[dtype] = room.get(dtype, 0) - parameter.numel()
        if room[dtype] < 0:
            lists.setdefault(dtype, []).append([])
            room[dtype] = NUMEL - parameter.numel()
        lists[dtype][-1].append(parameter)
    found = [owners for of_dtype in lists.values() for owners in of_dtype]
    for number, owners in enumerate(found):
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in owners])
        yield _Bucket(number, number == len(found) - 1, owners, flat)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    if parameter.grad.layout != torch.strided:
        raise TypeError(
            f"{CALL}: a gradient of shape {tuple(parameter.shape)} is sparse, which cannot be "
            "compressed; make the layer dense (sparse=False for nn.Embedding)"
        )
    return parameter.grad.detach()
