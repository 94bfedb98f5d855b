"""What error feedback keeps between steps: a residual for each parameter.

In a step residuals are flat, in the order in which DDP lays a parameter's gradient into a bucket:
that of the parameter's memory where it is dense (channels_last, transposed), else that of its
indices; a complex number is a pair of floats. What is saved has the parameter's shape, so that a
model whose parameters lie in memory in another order takes it up rightly.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from .models import model_given, named_parameters, numel_of, pairs_in

__all__ = ["Residuals"]


class _Layout(NamedTuple):
    """How a bucket holds the gradient of a parameter."""

    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, parameter: torch.Tensor, bucket: StorageWeakRef | None = None) -> "_Layout":
        """By where the gradient lies if it is a view of the bucket, else where its parameter does:
        so DDP makes its buckets."""
        gradient = parameter.grad
        if bucket is None or gradient is None or _storage_of(gradient) != bucket:
            gradient = parameter
        gradient = gradient.detach()
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient)
        shape, stride = gradient.shape, gradient.stride()
        if not _is_dense(shape, stride):
            stride = torch.empty(shape, device="meta").stride()
        return cls(shape, stride)


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill their memory, each with a place of its own."""
    expected = 1
    for step, length in sorted(zip(stride, shape, strict=True)):
        if length == 1:
            continue
        if step != expected:
            return False
        expected *= length
    return True


def _storage_of(x: torch.Tensor) -> StorageWeakRef:
    """What tells the memory of x from any other, now or later, and keeps nothing alive."""
    return StorageWeakRef(x.untyped_storage())


class _Residual(NamedTuple):
    flat: torch.Tensor
    layout: _Layout
    bucket: StorageWeakRef | None = None
    """That the layout is of, once there was one."""

    @classmethod
    def from_shape(cls, value: torch.Tensor, layout: _Layout) -> "_Residual":
        flat = value.new_empty(value.numel(), dtype=torch.float32)
        flat.as_strided(*layout).copy_(value)
        return cls(flat, layout)

    def moved_to(self, bucket: StorageWeakRef, layout: _Layout) -> "_Residual":
        moved = self if layout == self.layout else self.from_shape(self.in_shape(), layout)
        return moved._replace(bucket=bucket)

    def in_shape(self) -> torch.Tensor:
        """In the shape of the parameter, contiguous, alone in its memory."""
        return self.flat.as_strided(*self.layout).clone(memory_format=torch.contiguous_format)


def _is_residual(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.is_floating_point() and bool(value.isfinite().all())


class Residuals:
    """By parameter, not by bucket, since DDP puts parameters into other buckets after a step.

    Those of parameters that are gone go with them.
    """

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._of)

    def gather(self, parameters: Sequence[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
        """What is left of a bucket's gradients, (numel,) float32 in memory of its own."""
        parts, bucket = [], _storage_of(buffer)
        for parameter in parameters:
            kept = self._of.get(parameter)
            # A bucket keeps the order of its making, whatever becomes of the parameter's memory.
            if kept is None or kept.bucket is None or kept.bucket != bucket:
                layout = _Layout.of(parameter, bucket)
                if kept is None:
                    zeros = buffer.new_zeros(numel_of(parameter), dtype=torch.float32)
                    kept = _Residual(zeros, layout)
                kept = self._of[parameter] = kept.moved_to(bucket, layout)
            parts.append(kept.flat.to(buffer.device))
        return torch.cat(parts)

    def keep(self, parameters: Sequence[torch.Tensor], residual: torch.Tensor) -> None:
        """The residual of a bucket after `gather`, (numel,) float32."""
        parts = residual.split([numel_of(parameter) for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            self._of[parameter] = self._of[parameter]._replace(flat=part)

    def by_parameter(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The parameters and their residuals, in the parameters' shapes."""
        return [(parameter, kept.in_shape()) for parameter, kept in pairs_in(self._of)]

    def by_name(self, model: nn.Module | None) -> dict[str, torch.Tensor]:
        """The residuals of a model's parameters, in their shapes.

        Raises:
            ValueError: the model is missing; or there are residuals, but none of this model.
        """
        model = model_given(model, "state_dict(model)")
        found = {
            name: self._of[parameter].in_shape()
            for name, parameter in named_parameters(model).items()
            if parameter in self._of
        }
        if len(self) and not found:
            raise ValueError(
                f"RHTState.state_dict: the model has none of the {len(self)} parameters whose "
                "gradients the hook has seen; pass the model that it is registered on"
            )
        return found

    def replace(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Forget all, and take what `by_parameter` gave."""
        found = WeakTensorKeyDictionary()
        for parameter, value in pairs:
            # They come from a file, and go to the parameter's device when they are needed.
            found[parameter] = _Residual.from_shape(value.float().cpu(), _Layout.of(parameter))
        self._of = found

    def load(self, model: nn.Module | None, saved: Mapping[str, torch.Tensor]) -> None:
        """Forget all, and take what `by_name` gave.

        Raises:
            ValueError: the model is missing, lacks one of the parameters, or has it in another
                shape, or what was saved are no residuals; nothing has changed then.
        """
        named = named_parameters(model_given(model, "load_state_dict(state, model)"))
        odd = sorted(name for name, value in saved.items() if not _is_residual(value))
        if odd:
            raise ValueError(
                "RHTState.load_state_dict: residuals must be dense tensors of finite real "
                f"numbers, but those of {odd} are not; pass what state_dict() returned"
            )
        for name, value in saved.items():
            shape = _Layout.of(named[name]).shape if name in named else None
            if value.shape != shape:
                fact = "has none" if shape is None else f"has it with shape {tuple(shape)}"
                raise ValueError(
                    f"RHTState.load_state_dict: a residual was saved for the parameter {name} with "
                    f"shape {tuple(value.shape)}, but the model {fact}; use the model that it was "
                    'saved for, or drop that name from state["residuals"]'
                )
        self.replace([(named[name], value) for name, value in saved.items()])
