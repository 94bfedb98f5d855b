"""The units of a model that was sharded by torch's `fully_shard`.

torch has a public interface for which modules are units, and for setting a reduce-scatter and an
all-reduce hook of each. It has none for which parameters a unit reduces, in which order and over
which ranks: only this module uses private names for that. They are those of torch 2.11 to 2.15.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo

from ..segments import rows_of
from .models import plain_name

__all__ = ["CALL", "Scatter", "Unit", "units_in"]

CALL = "rhtcomm.hooks.compress_fsdp"  # for errors

Scatter = Callable[[torch.Tensor, torch.Tensor, dist.ProcessGroup, Any], None]


class Unit:
    """Parameters that are gathered, and whose gradients are reduced, in one exchange.

    Args:
        module: passed to `fully_shard`, or the first of several.
        group: torch's group of its parameters.
        names: of the model's modules.
    """

    def __init__(self, module: FSDPModule, group: Any, names: dict[nn.Module, str]) -> None:
        assert isinstance(module, nn.Module)
        self.module, self._group = module, group
        self.name = names[module] or type(module).__name__
        infos = [parameter._module_info for parameter in group.fsdp_params]
        self._names = [f"{names[info.module]}.{info.param_name}".lstrip(".") for info in infos]
        self._before = group._reduce_scatter_comm, group._all_reduce_hook

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        """This rank's shards of the parameters, and their names in the model."""
        parameters = [parameter.sharded_param for parameter in self._group.fsdp_params]
        return list(zip(self._names, parameters, strict=True))

    @property
    def ranks(self) -> dist.ProcessGroup:
        """The process group over which its gradients are sharded."""
        ranks: dist.ProcessGroup = self._group._reduce_scatter_process_group
        return ranks

    @property
    def device(self) -> torch.device:
        device: torch.device = self._group.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which its gradients are reduced; for complex ones, that of their parts."""
        first = self._group.fsdp_params[0]
        policy, own = first.mp_policy, first.sharded_param.dtype
        dtype: torch.dtype = policy.reduce_dtype or policy.param_dtype or own
        return dtype.to_real()

    @property
    def divide_factor(self) -> float | None:
        """The divisor that the user set; None: the number of ranks."""
        factor: float | None = self._group.gradient_divide_factor
        return factor

    @property
    def numel(self) -> int:
        """Coordinates of a shard, if all trained parameters have a gradient."""
        return sum(shape.numel() for _, shape in self._trained())

    def segments(
        self, numel: int
    ) -> tuple[list[torch.Tensor], tuple[int, ...], tuple[int, ...]] | None:
        """The parameters, their lengths and their rows in a shard of `numel` coordinates.

        Includes the zeros that pad uneven shards to the same length. None if some parameter has no
        gradient.
        """
        trained = self._trained()
        lengths = tuple(shape.numel() for _, shape in trained)
        if sum(lengths) != numel:
            return None
        rows = tuple(rows_of(shape, shape.numel()) for _, shape in trained)
        return [parameter for parameter, _ in trained], lengths, rows

    def _trained(self) -> list[tuple[torch.Tensor, torch.Size]]:
        """Parameters with the shapes of their shards, in the order of their gradients.

        Complex numbers are pairs.
        """
        trained = [p for p in self._group.fsdp_params if p.sharded_param.requires_grad]
        return [
            (
                p.sharded_param,
                torch.Size([*p.padded_sharded_param_size, *[2] * p.sharded_param.is_complex()]),
            )
            for p in trained
        ]

    def reduce_by(self, scatter: Scatter) -> None:
        """Replace its reduction by ``scatter(output, gradients, ranks, op)``."""
        self.module.set_custom_reduce_scatter(_ReduceScatter(scatter))

    def average_by(self, average: Callable[[torch.Tensor], None]) -> None:
        """Call ``average(shard)`` after each reduction."""
        self.module.set_all_reduce_hook(average)

    def restore(self) -> None:
        """Restore the reduction from when this object was created."""
        self._group._reduce_scatter_comm, self._group._all_reduce_hook = self._before

    def check(self, replicas: bool) -> None:
        """Raise unless its reduce-scatter, and for `replicas` its all-reduce hook, can be replaced.

        Raises:
            ValueError: torch itself replicates it, by an all-reduce that cannot be replaced.
            RuntimeError: it already has a custom reduce-scatter or hook.
        """
        mesh_info = self._group.mesh_info
        if isinstance(mesh_info, DDPMeshInfo):
            raise ValueError(
                f"{CALL}: torch itself replicates {self.name} (native HSDP or replicate, on "
                f"{mesh_info.mesh}), by an all-reduce that cannot be replaced. Pass fully_shard "
                'only the mesh of the shards, such as mesh["shard"], and compress_fsdp the group '
                'of the replicas: replicate_group=mesh.get_group("replicate")'
            )
        scatter, hook = self._before
        if type(scatter).__name__ != "DefaultReduceScatter":
            raise RuntimeError(
                f"{CALL}: {self.name} already has a custom reduce-scatter "
                f"({type(scatter).__name__}); call remove() on the handle of an earlier call, or "
                "leave out what set it, such as set_custom_reduce_scatter or set_symm_mem_for_comm"
            )
        if replicas and hook is not None:
            raise RuntimeError(
                f"{CALL}: {self.name} already has an all-reduce hook, and torch allows only one; "
                "leave out replicate_group, or that hook"
            )


class _ReduceScatter(ReduceScatter):
    """The reduce-scatter that FSDP2 calls for a unit."""

    def __init__(self, scatter: Scatter) -> None:
        self._scatter = scatter

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        self._scatter(output_tensor, input_tensor, group, op)


def _groups_of(state: Any) -> list[Any]:
    """The parameter groups that torch keeps for modules passed to `fully_shard`."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    only = state._fsdp_param_group  # in torch 2.11
    return [] if only is None else [only]


def units_in(model: nn.Module) -> list[Unit]:
    """The units of a model that have parameters, in the order of its modules.

    Raises:
        TypeError: the model has no units.
        ValueError: the parameters of a unit are sharded over several meshes.
    """
    names = {module: plain_name(name) for name, module in model.named_modules()}
    units, seen = list[Unit](), set[int]()
    for module in names:
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        groups = _groups_of(state)
        if len(groups) > 1:
            raise ValueError(
                f"{CALL}: the parameters of {names[module] or type(module).__name__} are sharded "
                f"over {len(groups)} meshes, but torch allows only one custom reduce-scatter; call "
                "fully_shard separately for the modules of each mesh"
            )
        if groups and id(state) not in seen:  # fully_shard([a, b]) makes one unit of both
            seen.add(id(state))
            units.append(Unit(module, groups[0], names))
    if not units:
        raise TypeError(
            f"{CALL}: no module of this {type(model).__name__} was sharded by fully_shard; call it "
            "first. (For a model in DistributedDataParallel, call rhtcomm.hooks.register.)"
        )
    return units
