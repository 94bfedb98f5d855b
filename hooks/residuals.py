"""The residual of each parameter, kept between steps for error feedback.

In a step residuals are flat, in the order in which DDP stores a parameter's gradient in a bucket:
that of the parameter's memory if it is dense (channels_last, transposed), otherwise that of its
indices. A complex number is a pair of floats. Saved residuals have the parameter's shape, so that a
model with another memory layout loads them correctly.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.feedback import raise_bound_
from .models import model_given, named_parameters, numel_of, pairs_in

__all__ = ["Residuals"]


class _Layout(NamedTuple):
    """The layout of a parameter's gradient in a bucket."""

    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, parameter: torch.Tensor, bucket: StorageWeakRef | None = None) -> "_Layout":
        """From the gradient if it is a view of the bucket, otherwise from the parameter, as DDP
        does."""
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
    """Whether the elements fill their memory without overlap."""
    expected = 1
    for step, length in sorted(zip(stride, shape, strict=True)):
        if length == 1:
            continue
        if step != expected:
            return False
        expected *= length
    return True


def _storage_of(x: torch.Tensor) -> StorageWeakRef:
    """An identity of the memory of x, unique for all time, that keeps nothing alive."""
    return StorageWeakRef(x.untyped_storage())


class _Residual(NamedTuple):
    flat: torch.Tensor
    layout: _Layout
    bucket: StorageWeakRef | None = None
    """Identity of the memory from which the layout was taken, if any."""

    @classmethod
    def from_shape(cls, value: torch.Tensor, layout: _Layout) -> "_Residual":
        flat = value.new_empty(value.numel(), dtype=torch.float32)
        flat.as_strided(*layout).copy_(value)
        return cls(flat, layout)

    def moved_to(self, bucket: StorageWeakRef, layout: _Layout) -> "_Residual":
        moved = self if layout == self.layout else self.from_shape(self.in_shape(), layout)
        return moved._replace(bucket=bucket)

    def in_shape(self) -> torch.Tensor:
        """The residual in the parameter's shape, contiguous, in memory of its own."""
        return self.flat.as_strided(*self.layout).clone(memory_format=torch.contiguous_format)


def _is_residual(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.is_floating_point() and bool(value.float().isfinite().all())


class Residuals:
    """Keyed by parameter, not by bucket, since DDP rebuilds its buckets after a step.

    Residuals of freed parameters are dropped.
    """

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()
        self.bound = torch.zeros(1, device="cpu")
        """At least the largest magnitude of all residuals, so that nobody must look for it."""

    def __len__(self) -> int:
        return len(self._of)

    def pieces(
        self, parameters: Sequence[torch.Tensor], buffer: torch.Tensor
    ) -> list[torch.Tensor]:
        """The flat residuals (length,) float32 of a bucket's parameters, to be changed in place."""
        found, bucket = [], _storage_of(buffer)
        for parameter in parameters:
            kept = self._of.get(parameter)
            # A bucket keeps its original order, even if the parameter's memory changes.
            if kept is None or kept.bucket is None or kept.bucket != bucket:
                layout = _Layout.of(parameter, bucket)
                if kept is None:
                    zeros = buffer.new_zeros(numel_of(parameter), dtype=torch.float32)
                    kept = _Residual(zeros, layout)
                kept = self._of[parameter] = kept.moved_to(bucket, layout)
            if kept.flat.device != buffer.device:
                moved = kept.flat.to(buffer.device)
                kept = self._of[parameter] = kept._replace(flat=moved)
            found.append(kept.flat)
        return found

    def by_parameter(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The parameters and their residuals, in the parameters' shapes."""
        return [(parameter, kept.in_shape()) for parameter, kept in pairs_in(self._of)]

    def by_name(self, model: nn.Module | None) -> dict[str, torch.Tensor]:
        """The residuals of a model's parameters, in their shapes.

        Raises:
            ValueError: the model is missing; or there are residuals, but none for this model.
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
        """Replace all by the result of `by_parameter`."""
        found, bound = WeakTensorKeyDictionary(), torch.zeros(1, device="cpu")
        for parameter, value in pairs:
            # They come from a file, and move to the parameter's device when they are needed.
            value = value.float().cpu()
            raise_bound_(bound, value)
            found[parameter] = _Residual.from_shape(value, _Layout.of(parameter))
        self._of, self.bound = found, bound  # if something raised, nothing has changed

    def load(self, model: nn.Module | None, saved: Mapping[str, torch.Tensor]) -> None:
        """Replace all by the result of `by_name`.

        Raises:
            ValueError: the model is missing, lacks one of the parameters, or has it with another
                shape, or the values are not residuals; then nothing has changed.
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
