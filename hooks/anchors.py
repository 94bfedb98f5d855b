"""The tensors of a model that outer steps average, their anchors, and the parts that are
exchanged."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..memory import memory_of
from .models import named_parameters, plain_name, unwrapped

__all__ = [
    "CALL",
    "Part",
    "difference",
    "everything_in",
    "followed_in",
    "mirror_of",
    "parts_of",
    "real",
]

CALL = "rhtcomm.hooks.OuterAverager"


def _anchor_dtype(tensor: torch.Tensor, exact: bool) -> torch.dtype:
    """float64 for float64 tensors and tensors that are sent exactly, otherwise float32."""
    double = exact or tensor.dtype in (torch.float64, torch.complex128)
    return torch.float64 if double else torch.float32


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Detached from autograd's graph; complex numbers as pairs."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Part:
    """Tensors of a model that are sent in one exchange, and their anchors.

    With a the anchors, w the tensors, and r(a) the anchors rounded to the dtypes of the tensors, an
    exchange averages the change r(a) - w over ranks. Where r(a) = w, the change is exactly 0, even
    if w is not finite.

    Args:
        number: of its bucket.
        named: the tensors by name, whose anchors have one dtype and device.
        exact: whether they are sent uncompressed, as float64 is.
    """

    def __init__(self, number: int, named: Mapping[str, torch.Tensor], exact: bool) -> None:
        self.number, self.names, self.exact = number, [*named], exact
        self.tensors = [*named.values()]
        first = self.tensors[0]
        self.flat = torch.empty(0, dtype=_anchor_dtype(first, exact), device=first.device)
        """(numel,) the anchors, concatenated."""
        self.flat = self.read()
        self.anchors = [nn.Parameter(view) for view in self.views(self.flat)]
        """The anchors in the shapes of the tensors, (..., 2) for complex ones; views of `flat`."""
        self._rounded = any(real(tensor).dtype != self.flat.dtype for tensor in self.tensors)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The slices of `flat` (numel,), in the shapes of the tensors."""
        shapes = [real(tensor).shape for tensor in self.tensors]
        pieces = flat.split([shape.numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def read(self) -> torch.Tensor:
        """The current tensors: (numel,) in the anchors' dtype, in memory of its own."""
        like: Any = {"dtype": self.flat.dtype, "device": self.flat.device}
        return torch.cat([real(tensor).reshape(-1).to(**like) for tensor in self.tensors])

    def write(self, flat: torch.Tensor) -> None:
        """Set the tensors to `flat` (numel,), rounded to their dtypes."""
        for tensor, view in zip(self.tensors, self.views(flat), strict=True):
            real(tensor).copy_(view)

    def change(self, now: torch.Tensor) -> torch.Tensor:
        """r(a) - w for the current tensors w (numel,)."""
        base = self.flat
        if self._rounded:
            views = zip(self.tensors, self.views(self.flat), strict=True)
            rounded = [view.to(real(tensor).dtype).reshape(-1) for tensor, view in views]
            base = torch.cat([x.to(self.flat.dtype) for x in rounded])
        return difference(base, now)


def difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x - y; 0 where both are the same infinity."""
    return (x - y).masked_fill_(x == y, 0)


def _fragments_of(named: Mapping[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """`count` consecutive groups of the tensors, of similar size.

    Raises:
        ValueError: there are fewer tensors.
    """
    if len(named) < count:
        raise ValueError(
            f"{CALL}: fragments={count}, but the model has {len(named)} trainable parameters; use "
            "fewer fragments"
        )
    left, rest = [*named.items()], sum(tensor.numel() for tensor in named.values())
    found = []
    for missing in range(count, 0, -1):
        taken, numel = 0, 0
        while taken == 0 or (
            len(left) - taken >= missing and (numel + left[taken][1].numel() / 2) * missing < rest
        ):
            numel += left[taken][1].numel()
            taken += 1
        if missing == 1:
            taken = len(left)
        found.append(dict(left[:taken]))
        left, rest = left[taken:], rest - numel
    return found


def mirror_of(named: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module that has only these parameters, under these names."""
    root = nn.Module()
    for name, parameter in named.items():
        *path, last = name.split(".")
        node = root
        for step in path:
            if step not in node._modules:
                node.add_module(step, nn.Module())
            node = node.get_submodule(step)
        node.register_parameter(last, parameter)
    return root


def everything_in(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers of a model, by their names without wrappers' prefixes."""
    buffers = {plain_name(name): buffer for name, buffer in unwrapped(model).named_buffers()}
    return named_parameters(model) | buffers


def followed_in(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parameters and buffers of a model that are exchanged.

    Raises:
        TypeError: model is not a module, or a tensor has no memory of its own.
        ValueError: no parameter is trained.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CALL}: model={model!r:.80} must be a torch.nn.Module")
    trained = {
        name: parameter
        for name, parameter in named_parameters(model).items()
        if parameter.requires_grad
    }
    if not trained:
        raise ValueError(
            f"{CALL}: no parameter of the model requires a gradient; unfreeze at least one"
        )
    buffers = {}
    for prefix, module in unwrapped(model).named_modules(remove_duplicate=True):
        for name in sorted(module._buffers.keys() - module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is not None and (buffer.is_floating_point() or buffer.is_complex()):
                buffers[plain_name(f"{prefix}.{name}" if prefix else name)] = buffer
    for name, tensor in (named_parameters(model) | buffers).items():
        memory_of(tensor, CALL, name)
    return trained, buffers


def parts_of(
    trained: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], fragments: int
) -> list[list[Part]]:
    """The parts of each fragment; buffers belong to the last one."""
    found: list[list[Part]] = []
    count = 0
    pieces = [(piece, False) for piece in _fragments_of(trained, fragments)] + [(buffers, True)]
    for piece, exact in pieces:
        kinds: dict[Any, dict[str, torch.Tensor]] = {}
        for name, tensor in piece.items():
            kinds.setdefault((_anchor_dtype(tensor, exact), tensor.device), {})[name] = tensor
        parts = [Part(count + i, named, exact) for i, named in enumerate(kinds.values())]
        count += len(parts)
        if exact:
            found[-1] += parts
        else:
            found.append(parts)
    return found
