"""The update of a residual in the course of an exchange, chunk by chunk."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rhtcomm.kernels import Residual
from rhtcomm.segments import Segments

__all__ = ["Update"]

# Decoding adds less than a factor of 2^33 per hop, so no mean of numbers below this overflows.
_SMALL = 2.0**40
_NOTE_BYTES = 4  # keeps rows of messages aligned


class Update:
    """Decides which chunks of a residual (numel,) are updated; see `rhtcomm.reduce.feedback`.

    Args:
        residual: to update.
        segments: of the tensor; None: all of them are updated, whatever the mean is.
    """

    def __init__(self, residual: Residual, segments: Segments | None = None) -> None:
        self.residual, self._segments = residual, segments
        self._open = segments is None
        self._used: torch.Tensor | None = None  # if some segments are unused
        self._before: torch.Tensor | None = None
        self._bound_before: torch.Tensor | None = None

    @classmethod
    def of(cls, left: torch.Tensor) -> "Update":
        """For a residual in one piece, all of which is updated."""
        return cls(Residual.of([left]))

    @property
    def left(self) -> torch.Tensor:
        """The first piece of the residual."""
        return self.residual.pieces[0]

    def announce(self, flat: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """What to send in place of `used`: before an exchange of `flat`."""
        if not _are_predictable(flat):
            return used
        tensors, bound = [flat], self.residual.bound
        if bound is None or not _is_small(bound):
            tensors += self.residual.views(flat.numel())
        note = used.new_full((_NOTE_BYTES,), 0 if all(map(_is_small, tensors)) else 255)
        return torch.cat([used, note])

    def begin(self, flat: torch.Tensor, used: torch.Tensor) -> None:
        """Allow updates, once what the ranks announced is merged in `used`."""
        if self._segments is None:
            return
        if not _are_predictable(flat) or bool(used[-_NOTE_BYTES:].any()):
            self._before = self.residual.read(flat.numel()).clone()
            bound = self.residual.bound
            self._bound_before = None if bound is None else bound.clone()
        elif not self._segments.all_used(used):
            self._used = used
        self._open = True

    @contextmanager
    def chunk(self, offset: int, length: int) -> Iterator[Residual | None]:
        """A context that updates the residual of a chunk; None: it must not be updated."""
        if not self._open:
            yield None
            return
        residual, unused, before = self.residual.at(offset), None, None
        if self._segments is not None and self._used is not None:
            unused = self._segments.unused(self._used, offset, length)
            before = residual.read(length).clone() if unused.any() else None
        try:
            yield residual
        finally:
            if before is not None and unused is not None:
                residual.write(torch.where(unused, before, residual.read(length)))

    def finish(self, mean: torch.Tensor, used: torch.Tensor) -> None:
        """Undo the update, all or of unused segments, if that could not be decided before."""
        before = self._before
        if before is None or self._segments is None:
            return
        after = self.residual.read(before.numel())
        self._segments.restore_(after, used, before)
        finite = mean.isfinite().all()
        self.residual.write(torch.where(finite, after, before))
        if self._bound_before is not None and not finite:  # there is none on devices
            self._restore_bound()

    def stop(self) -> None:
        """Allow no more updates after a failure, and undo what can be undone."""
        self._open = False
        if self._before is not None:
            self.residual.write(self._before)
            self._restore_bound()

    def _restore_bound(self) -> None:
        """After the whole residual has its old values, of which none may be NaN."""
        if self._bound_before is not None and self.residual.bound is not None:
            self.residual.bound.copy_(self._bound_before)


def _are_predictable(flat: torch.Tensor) -> bool:
    """Whether the host can know before an exchange that the mean will be finite."""
    return flat.is_cpu and flat.dtype != torch.float16


def _is_small(x: torch.Tensor) -> bool:
    if x.numel() == 0:
        return True
    least, most = torch.aminmax(x)
    return bool((least > -_SMALL) & (most < _SMALL))  # NaN is neither
