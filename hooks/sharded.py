"""The state of a sharded model: its reductions, their keys, and its shutdown."""

import contextlib
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..communicators import Topology
from ..randomness import Key
from ..reduce import Reducer
from .base import HookState
from .buckets import Bucket, say_if_exact
from .engines import Engine
from .fsdp1 import FlatUnit
from .inline import InlineEngine
from .models import ranks_of
from .policy import Bits
from .session import Session
from .units import CALL, Unit

__all__ = ["ShardedState"]

AnyUnit = Unit | FlatUnit

_REFUSED = {
    "process_group": "each unit has the ranks of its mesh",
    "communicator": "each unit has the ranks of its mesh",
    "equalize": "its scales belong to whole parameters, but ranks hold shards",
    "error_feedback": "every rank would have to keep a float32 copy of the whole model's size",
}


class ShardedState(HookState):
    """Configuration and progress of a model's reductions. `compress_fsdp` makes it.

    Buckets are numbered by unit: i (of u units) for its reduce-scatter, and u (1 + s) + i for the
    average of shard s over replicas.
    """

    def __init__(
        self,
        units: Sequence[AnyUnit],
        replicate_group: dist.ProcessGroup | None,
        bits: Bits,
        **options: Any,
    ) -> None:
        _check_ranks(units, replicate_group)
        _check_options(options, replicate_group)
        super().__init__(bits, **options)
        # They refer to the model, which refers to this state.
        self._numbers = weakref.WeakKeyDictionary({unit: i for i, unit in enumerate(units)})
        self._shards = [(unit.name, unit.numel) for unit in units]
        self._replicate_group = replicate_group
        self._replicas = Session(None, self._timeout, None, self._connections, silent=True)
        self._finalizer_of_replicas = weakref.finalize(self, self._replicas.close_late)
        # The current step: its key, its backward pass by autograd's number, its buckets.
        self._now, self._reduced = self.key, set[int]()
        self._pass: int | None = None  # none: no step has begun

    # Beginning ----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Connect the ranks and compare their arguments; call it on all ranks.

        Raises:
            ValueError: it excludes a parameter that the model does not have.
            RuntimeError: another rank did not connect.
            DisagreementError: on all ranks, if their arguments or units differ.
        """
        self._learn_units()
        unit = next(iter(self._numbers))
        try:
            engine = self._session.start(unit.device, unit.ranks, self._make_engine)
            with engine.beginning(self.key, unit.device):
                if self._replicate_group is not None:
                    make = self._make_engine_of_replicas
                    replicas = self._replicas.start(unit.device, self._replicate_group, make)
                    with replicas.beginning(self.key, unit.device):
                        pass
        except BaseException:
            self._session.called = True  # nobody could
            raise

    def _learn_units(self) -> None:
        """The parameters of the units, by name."""
        named = [pair for unit in self._numbers for pair in unit.named_parameters()]
        self._session.learn([parameter for _, parameter in named])
        self.policy.learn(named)

    @property
    def engines(self) -> list[InlineEngine]:
        """The session of the shards and, if there are replicas, that of the replicas."""
        found = (self._session.engine, self._replicas.engine)
        return [engine for engine in found if isinstance(engine, InlineEngine)]

    def _kind_of_engine(self, device: torch.device, reducer: Reducer) -> type[Engine]:
        return InlineEngine

    def _facts(self, number: int) -> dict[str, object]:
        replicas = 1 if self._replicate_group is None else self._replicate_group.size()
        return super()._facts(number) | {"units": self._shards, "replicas": replicas}

    def _make_engine_of_replicas(
        self, topology: Topology, number: int, device: torch.device
    ) -> Engine:
        reducer = Reducer(self.codec, topology, self.algorithm, self.min_numel)
        facts = self._facts(number) | {"shard": self.engines[0].topology.rank}
        return InlineEngine(reducer, facts, repr(self), self.totals, None, self.nmse_every)

    # Reductions ---------------------------------------------------------------------------------

    def scatter(
        self,
        unit: AnyUnit,
        output: torch.Tensor,
        gradients: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
    ) -> None:
        """Write the reduction by `op` of all ranks' gradients of this rank's shard to `output`."""
        with self._failures_told():
            factor = _factor(op, group.size())
            engine = self.engines[0]
            if not engine.topology.private and group not in engine.topology.carriers():
                raise RuntimeError(
                    f"{CALL}: {unit.name} is now reduced over another process group; call "
                    "set_separate_reduce_scatter_group before compress_fsdp"
                )
            number = self._numbers[unit]
            bucket = self._bucket(unit, number, self._session, _floats(gradients), _floats(output))
            self._run(engine, bucket)
            if factor != 1:
                output.mul_(factor)

    def average(self, unit: Unit, shard: torch.Tensor) -> None:
        """Replace `shard` by its mean over replicas, or by their sum if the user set a divide
        factor."""
        with self._failures_told():
            shards, replicas = self.engines
            number = len(self._shards) * (1 + shards.topology.rank) + self._numbers[unit]
            bucket = self._bucket(unit, number, self._replicas, _floats(shard))
            self._run(replicas, bucket)
            if unit.divide_factor is not None:
                shard.mul_(replicas.topology.world_size)

    def _run(self, engine: InlineEngine, bucket: Bucket) -> None:
        """Training waits meanwhile, or on a device where torch has its streams wait."""
        if self.reports is None:
            engine.run(bucket)
            return
        bucket.reports, since = [], time.perf_counter()
        engine.run(bucket)
        queues = engine.cuda.queues(bucket.buffer.device)
        wait = None if queues else time.perf_counter() - since
        self.reports.add(bucket, None, engine.cuda, wait)
        if bucket.ends:
            self.reports.land()

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        """A context whose errors make the other ranks raise too."""
        self._session.called = True
        try:
            if self._session.closed:
                raise RuntimeError(f"{CALL}: its handle was closed; call compress_fsdp again")
            yield
        except BaseException as failure:
            for engine in self.engines:
                engine.fail(failure)
            raise

    def _bucket(
        self,
        unit: AnyUnit,
        number: int,
        session: Session,
        buffer: torch.Tensor,
        output: torch.Tensor | None = None,
    ) -> Bucket:
        say_if_exact(buffer.dtype, self._said)
        numel = buffer.numel() if output is None else output.numel()
        parameters, lengths, rows = unit.segments(numel) or ([], (numel,), (1,))
        if not parameters and self.policy.by_bucket:
            raise RuntimeError(
                f"{CALL}: some parameters of {unit.name} have no gradient, and torch does not say "
                "which, but exclude and a function for bits need to know; call "
                "model.set_reduce_scatter_unused_params(True), which newer torch versions have "
                "and which gives them zeros"
            )
        if parameters and not self._session.knows(parameters):
            self._learn_units()  # load_state_dict(assign=True) replaced them
        key, ends = self._next_key(number, session)
        treatment = self.policy.treatment(key.step, parameters)
        return Bucket(buffer, key, parameters, ends, treatment, self, output, (lengths, rows))

    def _next_key(self, number: int, session: Session) -> tuple[Key, bool]:
        """The key of a bucket, and whether the bucket must end its step, since nothing else would.

        A step is a backward pass. If a number is repeated in a pass, another step begins, so that
        no key is used twice.
        """
        current: int = torch._C._current_graph_task_id()  # -1: none
        if current not in (-1, self._pass):
            torch.autograd.Variable._execution_engine.queue_callback(self._settle)
        if current != self._pass or number in self._reduced:
            self._now, self._pass, self._reduced = self.key, current, set()
            self._next_step()
        self._reduced.add(number)
        private = session.engine is not None and session.engine.topology.private
        owner = 0 if private else session.number
        return replace(self._now, bucket=number, owner=owner), current == -1

    def _settle(self) -> None:
        """Called at the end of a backward pass."""
        with self._failures_told():
            for engine in self.engines:
                engine.settle(self._now)
        if self.reports is not None:
            self.reports.land()

    # Checkpoints and the end --------------------------------------------------------------------

    def state_dict(self, model: nn.Module | None = None) -> dict[str, Any]:
        for engine in self.engines:
            engine.checks.raise_failed(wait=True)
        return super().state_dict(model)

    def load_state_dict(self, state: dict[str, Any], model: nn.Module | None = None) -> None:
        super().load_state_dict(state, model)
        for engine in self.engines:
            engine.agreed = False
        self._pass, self._reduced = None, set()

    def close(self) -> None:
        self._finalizer_of_replicas.detach()
        self._replicas.close()
        super().close()
        for engine in self.engines:
            if engine.failure is None:
                engine.checks.raise_failed(wait=True)

    def bypass(self, model: nn.Module) -> None:
        """Restore torch's reductions; replicas are then averaged by `torch.distributed`."""
        for unit in self._numbers:
            unit.restore()
            if self._replicate_group is not None:
                assert isinstance(unit, Unit)
                hook = partial(_average_exactly, unit, self._replicate_group)
                unit.average_by(hook)


def _floats(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x).view(-1) if x.is_complex() else x


def _average_exactly(unit: Unit, group: dist.ProcessGroup, shard: torch.Tensor) -> None:
    dist.all_reduce(shard, group=group)
    if unit.divide_factor is None:
        shard.div_(group.size())


def _factor(op: Any, world_size: int) -> float:
    """A reduction's result as a multiple of the mean.

    Raises:
        ValueError: it is neither a mean nor a sum.
    """
    if op == dist.ReduceOp.AVG:
        return 1
    if op == dist.ReduceOp.SUM:
        return world_size
    if op == dist.ReduceOp.PREMUL_SUM:
        return world_size * float(op.__getstate__()[1])
    raise ValueError(f"{CALL}: {op} is neither a sum nor a mean; leave the divide factors to torch")


def _check_ranks(units: Sequence[AnyUnit], replicate_group: object) -> None:
    shards = ranks_of(units[0].ranks)
    for unit in units:
        if ranks_of(unit.ranks) != shards:
            raise ValueError(
                f"{CALL}: {units[0].name} is sharded over the ranks {shards}, but {unit.name} over "
                f"{ranks_of(unit.ranks)}; pass one mesh for all units to fully_shard"
            )
    if replicate_group is None:
        return
    if not isinstance(replicate_group, dist.ProcessGroup):
        raise TypeError(
            f"{CALL}: replicate_group={replicate_group!r} must be a process group that includes "
            'this rank, such as mesh.get_group("replicate")'
        )
    replicas = ranks_of(replicate_group)
    if {*replicas} & {*shards} != {dist.get_rank()}:
        raise ValueError(
            f"{CALL}: replicate_group has the ranks {replicas}, and the model is sharded over "
            f"{shards}; rank {dist.get_rank()} must be the only rank in both"
        )


def _check_options(options: dict[str, Any], replicate_group: object) -> None:
    for name, reason in _REFUSED.items():
        if options.get(name):
            raise ValueError(f"{CALL}: leave out {name}; {reason}")
    if options.get("quantizer") == "lattice":
        raise ValueError(
            f'{CALL}: quantizer="lattice" has no payload for a single rank; use another quantizer'
        )
    if replicate_group is None and options.get("algorithm", "auto") != "auto":
        raise ValueError(
            f"{CALL}: algorithm={options['algorithm']!r} needs replicate_group; shards are always "
            "exchanged by one all-to-all"
        )
    if replicate_group is not None and options.get("rotations") == "auto":
        raise ValueError(
            f'{CALL}: rotations="auto" cannot be used with replicate_group, since ranks with '
            "different shards would want different numbers; pass a number"
        )
