"""Access to FSDP1 for `compress_fsdp`, through a few private names."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from .models import plain_name
from .units import CALL, Scatter

__all__ = ["FlatUnit", "flat_units_in"]


class FlatUnit:
    """Parameters that FullyShardedDataParallel flattened into one tensor.

    Its shards do not end at parameters, so each shard is one segment.

    Args:
        module: the FSDP1 module.
        name: of the wrapped module, in the model.
    """

    def __init__(self, module: FullyShardedDataParallel, name: str) -> None:
        self.module: Any = module
        self._handle: Any = module._handle
        self.name = name or type(module.module).__name__
        self._names = [f"{name}.{FLAT}".lstrip(".")]

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        """This rank's shard of the flat tensor."""
        return [(self._names[0], self._handle.flat_param)]

    @property
    def ranks(self) -> dist.ProcessGroup:
        """The process group over which its gradients are sharded."""
        ranks: dist.ProcessGroup = self.module.process_group
        return ranks

    @property
    def device(self) -> torch.device:
        return torch.device(self.module.compute_device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which its gradients are reduced."""
        dtype: torch.dtype = self._handle._reduce_dtype
        return dtype

    @property
    def numel(self) -> int:
        """Coordinates of a shard."""
        shard: torch.Size = self._handle.flat_param._sharded_size
        return shard.numel()

    def segments(self, numel: int) -> tuple[list[torch.Tensor], tuple[int, ...], tuple[int, ...]]:
        """The parameters, lengths and rows of a shard: the flat tensor, its length, one row."""
        return [self._handle.flat_param], (numel,), (1,)

    def reduce_by(self, scatter: Scatter) -> None:
        """Replace its reduction by ``scatter(output, gradients, ranks, op)``."""

        def hook(_: object, gradients: torch.Tensor, output: torch.Tensor) -> None:
            scatter(output, gradients, self.ranks, dist.ReduceOp.AVG)

        # register_comm_hook gives all units the same hook, without telling it the unit.
        self.module._comm_hook, self.module._comm_hook_state = hook, None

    def restore(self) -> None:
        """Restore the reduction from before `reduce_by`."""
        self.module._comm_hook = None

    def check(self, replicas: bool) -> None:
        """Raise unless its reduction can be replaced.

        Raises:
            ValueError: it is not sharded, or also replicated.
            RuntimeError: it already has a hook.
        """
        strategy = self.module.sharding_strategy
        sharded = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
        if strategy not in sharded or replicas:
            raise ValueError(
                f"{CALL}: {self.name} is in FullyShardedDataParallel (FSDP1) with "
                f"{strategy}{' and replicate_group' * replicas}, whose hooks work only without "
                "replicas; for replicas of shards use fully_shard (FSDP2), and for replicas "
                "without shards use DistributedDataParallel and rhtcomm.hooks.register"
            )
        if self.module._comm_hook is not None:
            raise RuntimeError(
                f"{CALL}: {self.name} already has a communication hook; call remove() on the "
                "handle of an earlier call, or leave out register_comm_hook"
            )


FLAT = "_flat_param"  # torch's name of a module's flat tensor


def flat_units_in(model: nn.Module) -> list[FlatUnit]:
    """The units of a model that FSDP1 shards, in the order of its modules."""
    return [
        FlatUnit(module, plain_name(name))
        for name, module in model.named_modules()
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None
    ]
