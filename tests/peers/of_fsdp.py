"""The models and the comparison of torch's FSDP2 tests, with our reduce-scatter in its place."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from stand_in import HOOKS, Seen
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from rhtcomm.hooks import compress_fsdp

MODELS = ("MLP", "MLPStack", "DoubleLinear", "TransformerWithSharedParams")


def model_called(name: str) -> tuple[nn.Module, list[nn.Module], Callable[[], tuple[Any, ...]]]:
    """A model, the modules of it that are units, and what makes a batch."""
    from torch.testing._internal import common_fsdp as fsdp

    if name == "MLP":
        model: Any = fsdp.MLP(16)
        return model, [model.in_proj, model.out_proj], lambda: (torch.randn(8, 16),)
    if name == "MLPStack":
        model = fsdp.MLPStack(17)
        return model, [*model], lambda: (torch.randn(8, 17),)
    if name == "DoubleLinear":
        model = fsdp.DoubleLinear(24)
        return model, [model.lin1, model.lin2], lambda: (torch.randn(8, 24),)
    model = fsdp.TransformerWithSharedParams.init(
        dist.group.WORLD,
        fsdp.FSDPInitMode.NO_FSDP,
        fsdp.DEVICEInitMode.DEVICE_NEVER,
        deterministic=True,
        add_bn=False,
    )
    units = [*model.transformer.encoder.layers, *model.transformer.decoder.layers]
    return model, units, lambda: model.get_input(torch.device("cpu"))


class Wrong(ReduceScatter):
    """Twice this rank's own shard, of no other rank."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, *_: Any, **__: Any) -> None:
        own = input_tensor.view(dist.get_world_size(), -1)[dist.get_rank()]
        output_tensor.view(-1).copy_(own).mul_(2)


def run(rank: int, world_size: int, name: str, hook: str) -> tuple[str, int]:
    """What became of a comparison with a model that is not sharded, over 5 steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_fsdp, common_utils

        return _run(rank, name, hook, common_fsdp, common_utils.TestCase)


def _run(rank: int, name: str, hook: str, upstream: Any, test_case: Any) -> tuple[str, int]:
    seen, options = Seen(), HOOKS[hook]

    class Case(test_case):  # type: ignore[misc]
        def assertEqual(self, x: Any, y: Any, *args: Any, **given: Any) -> None:
            if seen.tolerance and isinstance(x, torch.Tensor):
                given |= {"atol": seen.tolerance, "rtol": 1.3e-6}
            super().assertEqual(x, y, *args, **given)  # noqa: PT009

        def runTest(self) -> None: ...

    torch.manual_seed(42)
    model, units, batch = model_called(name)
    whole = copy.deepcopy(model)
    for unit in [*units, model]:
        fully_shard(unit)
    if options is None:
        for module in model.modules():
            if hasattr(module, "set_custom_reduce_scatter"):
                module.set_custom_reduce_scatter(Wrong())
    else:
        handle = compress_fsdp(model, **{"warmup_steps": 0, **options})
    # With 8 bits parameters would drift apart.
    rate = 1e-2 if hook == "exact" else 0.0
    optimizers = [torch.optim.SGD(one.parameters(), lr=rate) for one in (model, whole)]
    torch.manual_seed(rank)

    def not_in_its_place(*_: Any, **__: Any) -> None:
        raise AssertionError("torch's own reduce-scatter was called")

    for _ in range(5):
        given = batch()
        with upstream.patch_reduce_scatter(not_in_its_place):
            for one in (model, whole):
                result = one(*given)
                parts = result if isinstance(result, tuple) else (result,)
                sum(part.square().mean() for part in parts).backward()
        norms = [p.grad.norm() for p in whole.parameters()]
        norm = torch.stack(norms).norm()
        dist.all_reduce(norm, dist.ReduceOp.MAX)
        seen.largest = norm.item() if hook == "8 bits" else 0.0
        for parameter in whole.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        upstream.check_sharded_parity(Case(), whole, model)
        seen.calls += 1
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if options is not None:
        assert handle.stats().steps == 5
        handle.close()
    return "passed", seen.calls
