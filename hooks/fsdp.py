"""One line that compresses the gradients of a sharded model."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..reduce import Reducer
from .engines import Engine
from .fsdp1 import FlatUnit, flat_units_in
from .policy import Bits
from .register import Handle
from .sharded import ShardedState
from .summary import log_summary
from .units import CALL, Unit, units_in

__all__ = ["compress_fsdp"]


def compress_fsdp(
    model: nn.Module,
    bits: Bits = 4,
    *,
    replicate_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Handle:
    """Compress the gradients of a model that `fully_shard` (FSDP2) or FSDP1 shards.

    ``handle = rhtcomm.hooks.compress_fsdp(model, bits=4)`` after the calls of `fully_shard`, with
    the same arguments on all ranks.

    The reduce-scatter of each unit becomes one all-to-all of encoded shards. With n ranks, g_j the
    unit's gradients on rank j, and C the code of this step and unit, rank i gets

        (1 / n) sum over j of decode(C(shard i of g_j)).

    Its expected value is the mean; its squared error is e / n times the mean over j of |shard i of
    g_j|^2, with e the quantizer's. A rank sends n - 1 payloads of one shard. The parameters'
    all-gather stays exact. Mixed precision, accumulation and divide factors work as before.

    Args:
        model: sharded by `fully_shard`, with a mesh of one dimension; or in
            FullyShardedDataParallel (FSDP1) with FULL_SHARD or SHARD_GRAD_OP. FSDP1's shards do not
            end at parameters: `exclude` uses the names of its flat tensors, and rows of zeros get
            noise.
        bits: bits per coordinate, or a function of a unit's parameters; see `RHTState`.
        replicate_group: the ranks that hold the same shard in different replicas of the model
            (HSDP); their means are averaged with compression, as by `rhtcomm.all_reduce`. torch
            must not know of the replicas: with a mesh of dimensions "replicate" and "shard", pass
            ``mesh["shard"]`` to `fully_shard`, and ``mesh.get_group("replicate")`` here. A mesh of
            (ranks, 1) only replicates. After `set_gradient_divide_factor` replicas are summed
            instead, as in torch's own HSDP.
        options: of `RHTState`; not process_group, communicator, error_feedback, equalize or
            quantizer="lattice". A step is a backward pass that reduces gradients; a second
            reduction of a unit in one pass begins another step. algorithm needs replicate_group,
            with which rotations="auto" is refused.

    Returns:
        A handle like that of `register`. Its `remove` restores torch's reductions.

    Raises:
        TypeError: the model is not sharded, or an option is of another type.
        ValueError: torch itself replicates a unit (native HSDP, NO_SHARD), units have different
            ranks, or an option is out of its range or refused.
        RuntimeError: a unit already has a custom reduce-scatter or an all-reduce hook; or another
            rank did not connect.
        DisagreementError: on all ranks, if their arguments or units differ.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{CALL}: model={model!r:.80} must be a model that was sharded by fully_shard"
        )
    units = flat_units_in(model) or units_in(model)
    for unit in units:
        unit.check(replicas=replicate_group is not None)
    state = ShardedState(units, replicate_group, bits, **options)
    state.begin()
    for unit in units:
        unit.reduce_by(partial(state.scatter, unit))
        if replicate_group is not None:
            assert isinstance(unit, Unit)  # `check` refuses others
            unit.average_by(partial(state.average, unit))
    log_summary(state, units[0].device, _reductions(units, state.engines))
    return Handle(model, state)


def _reductions(
    units: Sequence[Unit | FlatUnit], engines: Sequence[Engine]
) -> list[tuple[Reducer, torch.dtype, int, bool]]:
    """Of a step."""
    shards, *replicas = (engine.reducer for engine in engines)
    found = []
    for unit in units:
        if shards.topology.world_size > 1:
            found.append((shards, unit.dtype, unit.numel * shards.topology.world_size, True))
        found += [(reducer, unit.dtype, unit.numel, False) for reducer in replicas]
    return found
