"""Powers of two that bring the coordinates of a bucket to similar size before compression.

A codec adds noise of the same size to all coordinates of a block, but a block may hold columns of a
matrix, or parameters, whose gradients differ much in size. Adam divides each coordinate by its own
size, so the noise of large ones becomes steps of small ones. Therefore ranks divide a bucket by
scales s before the exchange, and multiply the mean by them:

    mean = s * decode_mean(encode(x_1 / s), ..., encode(x_n / s)).

This is as unbiased as the codec, and the noise of coordinate i is s_i times that of its block. Let
g (rows, length) be the mean gradient of a parameter in the order of its memory, L a running mean
over steps of log2 max |g| over a row, a column or the whole parameter, and "largest" the parameter
of the bucket with the largest L. Then

    s_ij = 2^(RANGE - min(RANGE, d_i + d_j)),
    d_i = round(L_largest - L_row_i),  d_j = round(L_parameter - L_column_j),  both at least 0.

So d_i + d_j is the distance of log2 |g_ij| from the largest of the bucket, if rows and columns of g
differ by factors. Only ratios within a block matter, so the largest is that of the bucket and not
of the model. It is found again in each step, and nothing is stored per bucket, since DDP rebuilds
them. The L are integers, and largest magnitudes do not depend on an order of summation, so all
ranks get the same scales without communication.

Since s is at least 1, no finite input overflows. The division loses low bits of numbers below
2^(RANGE - 126) (in bfloat16 as well); everything else is exact. float16 has too few exponents, and
is left alone.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..floating_point import GRAIN, default_mode
from .models import model_given, named_parameters, numel_of, pairs_in

__all__ = ["RANGE", "SCALED", "Pairs", "Scales", "read_scales"]

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""Parameters and their logarithms, see `Scales`."""

RANGE = 6
"""The largest distance. A coordinate that was small and suddenly is large adds to its block's error
as if it were up to 2^RANGE times as large. On a regression whose inputs differ 160 times in size, 4
bits increase AdamW's excess loss by 25%; with a range of 4 by 10%, of 6 by 4.5%, of 8 by 4.0%."""

_POINT = 8  # fractional bits of a logarithm
_MEMORY = 3  # a step has weight 2^-3 in a running mean
# By dtype: an integer type of its size, a mask of all bits except the sign, and the left shift
# (negative: right) that turns a magnitude's bits into its logarithm: the exponent + 127, then bits
# of the mantissa.
_BITS = {torch.float32: (torch.int32, 0x7FFFFFFF, -15), torch.bfloat16: (torch.int16, 0x7FFF, 1)}
SCALED = frozenset(_BITS)
_INFINITE = 255 << _POINT
_RUN = 1 << 17  # coordinates


class _Parameter(NamedTuple):
    """The position of a parameter in a bucket, and its logarithms."""

    start: int
    rows: int
    length: int
    """Length of each row."""
    logarithms: torch.Tensor | None
    """See `Scales`; None: unknown so far."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Its slice of flat x, as a view (rows, length)."""
        run = x[self.start : self.start + self.rows * self.length]
        return run.view(self.rows, self.length)


class Scales:
    """For each parameter, log2 of its largest gradients + 127 in units of 1/256; 0 if unknown.

    (1 + rows + length,) int32, for the parameter, its rows and its columns, if it has several of
    both; otherwise (1,). Columns are those of the gradient's memory: if a checkpoint is loaded into
    a model with another memory layout, scales are wrong for some steps, equally on all ranks.
    Scales of freed parameters are dropped.
    """

    def __init__(self, pairs: Pairs | None = None) -> None:
        self.replace(pairs or [])

    def _parameters(
        self, parameters: Sequence[torch.Tensor], device: torch.device
    ) -> Iterator[_Parameter]:
        start = 0
        for parameter in parameters:
            kept = self._of.get(parameter)
            yield _Parameter(
                start, *_shape_of(parameter), None if kept is None else kept.to(device)
            )
            start += numel_of(parameter)

    @contextmanager
    def applied(
        self,
        parameters: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        exact: Sequence[bool] | None,
        pieces: Sequence[torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """A context in which flat tensors of a bucket's parameters (numel,) are divided by their
        scales.

        Args:
            parameters: of the bucket.
            tensors: changed in place, float32 or bfloat16, of the same layout.
            exact: which parameters are sent exactly and left alone; None: none.
            pieces: one tensor for each parameter, changed as well.
        """
        device, numel = tensors[0].device, tensors[0].numel()
        with default_mode(pool=numel > GRAIN):
            chosen = [i for i in range(len(parameters)) if not (exact and exact[i])]
            placed = [*self._parameters(parameters, device)]
            placed = [placed[i] for i in chosen]
            depths = _depths(placed)
            parts = [[one.of(x) for one in placed] for x in tensors]
            if pieces is not None:
                shapes = [(one.rows, one.length) for one in placed]
                parts.append([pieces[i].view(s) for i, s in zip(chosen, shapes, strict=True)])
            for of_one in parts:
                _shift(of_one, depths, -1)
        try:
            yield
        finally:  # the pieces outlive a failure
            with default_mode(pool=numel > GRAIN):
                for of_one in parts:
                    _shift(of_one, depths, 1)

    def learn(self, parameters: Sequence[torch.Tensor], mean: torch.Tensor) -> None:
        """Update the scales from the flat mean of a bucket, which is the same on all ranks.

        Rows, columns and parameters that are zero, and parameters with non-finite numbers, keep
        their scales.
        """
        if mean.dtype not in SCALED:
            return
        placed = self._parameters(parameters, mean.device)
        for parameter, one in zip(parameters, placed, strict=True):
            if one.rows * one.length == 0:
                continue
            seen = _logarithms(one.of(mean))
            kept = torch.zeros_like(seen) if one.logarithms is None else one.logarithms
            moved = torch.where(kept == 0, seen, kept + ((seen - kept) >> _MEMORY))
            unusable = (seen == 0) | (seen[0] >= _INFINITE)
            self._of[parameter] = torch.where(unusable, kept, moved)

    def digest(self) -> str:
        """A digest of all scales: ranks with different scales would decode wrong means."""
        found = hashlib.blake2b(digest_size=8)
        for logarithms in self._of.values():
            found.update(logarithms.cpu().numpy().tobytes())
        return found.hexdigest()

    # Copies and checkpoints -----------------------------------------------------------------------

    def by_parameter(self) -> Pairs:
        return [(parameter, kept.clone()) for parameter, kept in pairs_in(self._of)]

    def replace(self, pairs: Pairs) -> None:
        """Replace all by these."""
        self._of = WeakTensorKeyDictionary()
        for parameter, logarithms in pairs:
            self._of[parameter] = logarithms.to("cpu", torch.int32, copy=True)

    def by_name(self, model: nn.Module | None) -> dict[str, torch.Tensor]:
        """The logarithms of all trained parameters of a model; zeros if unknown.

        Raises:
            ValueError: the model is missing.
        """
        model = model_given(model, "state_dict(model)")
        return {
            name: self._of[parameter].clone() if parameter in self._of else _nothing(parameter)
            for name, parameter in named_parameters(model).items()
            if parameter.requires_grad
        }


def read_scales(model: nn.Module | None, saved: Mapping[str, torch.Tensor]) -> Pairs:
    """The result of `Scales.by_name`, checked, by parameter, in the model's order.

    Raises:
        ValueError: the model is missing, lacks one of the parameters, or has it with another shape,
            or the values are not scales.
    """
    if not saved:
        return []
    named = named_parameters(model_given(model, "load_state_dict(state, model)"))
    for name, value in saved.items():
        expected = _nothing(named[name]) if name in named else None
        if not _are_logarithms(value) or expected is None or value.shape != expected.shape:
            this = f"has no {name}" if expected is None else f"needs {expected.numel()} of {name}"
            raise ValueError(
                "RHTState.load_state_dict: scales must be integers from 0 to 65279, one for each "
                f"parameter and for each of its rows and columns, but what was saved for {name} is "
                f"{value!r:.80}, and the model {this}; use the model that it was saved for, or "
                'drop them on all ranks: state["scales"] = {}'
            )
    return [(parameter, saved[name]) for name, parameter in named.items() if name in saved]


def _are_logarithms(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    if value.is_floating_point() or value.is_complex() or value.dim() != 1:
        return False
    return bool(((value >= 0) & (value < _INFINITE)).all())


def _shape_of(parameter: torch.Tensor) -> tuple[int, int]:
    """Number and length of rows. If one of them were 1, each coordinate would have its own
    scale."""
    numel = numel_of(parameter)
    rows = parameter.shape[0] if parameter.dim() > 1 else 1
    return (rows, numel // rows) if 1 < rows < numel else (1, numel)


def _nothing(parameter: torch.Tensor) -> torch.Tensor:
    rows, length = _shape_of(parameter)
    return torch.zeros(1 if rows == 1 else 1 + rows + length, dtype=torch.int32)


def _logarithms(part: torch.Tensor) -> torch.Tensor:
    """Logarithms of the largest numbers in part (rows, length), as in `Scales`; NaN counts as the
    largest.

    By their bits, since comparisons of floats may flush subnormals.
    """
    integer, mask, left = _BITS[part.dtype]
    if len(part) == 1:
        largest = (part.view(integer) & mask).amax().view(1)
    else:
        runs = (run.view(integer) & mask for run in _in_runs(part))
        pairs = [(run.amax(dim=1), run.amax(dim=0)) for run in runs]
        rows = torch.cat([of_rows for of_rows, _ in pairs])
        columns = torch.stack([of_columns for _, of_columns in pairs]).amax(dim=0)
        largest = torch.cat([rows.amax().view(1), rows, columns])
    largest = largest.to(torch.int32)
    return largest << left if left > 0 else largest >> -left


_Depth = tuple[torch.Tensor, torch.Tensor | None]


def _depths(placed: Sequence[_Parameter]) -> list[_Depth | None]:
    """How many powers of two rows (rows, 1) and columns (length,) lie below the largest one.

    Integers from 0 to RANGE, 0 if unknown. The distance of a coordinate is their sum.
    """
    known = [one.logarithms for one in placed if one.logarithms is not None]
    if not known:
        return [None] * len(placed)
    largest = torch.stack([logarithms[0] for logarithms in known]).amax()

    def below(logarithms: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        depth = ((top - logarithms + (1 << _POINT >> 1)) >> _POINT).clamp_(0, RANGE)
        return depth.masked_fill_(logarithms == 0, 0)

    depths: list[_Depth | None] = []
    for one in placed:
        if one.logarithms is None:
            depths.append((torch.zeros_like(largest).view(1, 1), None))
        elif one.rows == 1:
            depths.append((below(one.logarithms, largest).view(1, 1), None))
        else:
            whole, rows, columns = one.logarithms.split([1, one.rows, one.length])
            depths.append((below(rows, largest).view(-1, 1), below(columns, whole)))
    return depths


def _shift(parts: Sequence[torch.Tensor], depths: Sequence[_Depth | None], sign: int) -> None:
    """Multiply parts (rows, length) by 2^(sign (RANGE - depth))."""
    for part, depth in zip(parts, depths, strict=True):
        if depth is None:
            continue
        rows, columns = depth
        by_row = _power(sign * (RANGE - rows), part.dtype)
        if columns is None:
            part.mul_(by_row)
        else:
            by_column = _power(-sign * columns, part.dtype)
            for some, factor in zip(_in_runs(part), _in_runs(by_row, part), strict=True):
                both = factor * by_column
                # The sum of both depths is at most RANGE.
                some.mul_(both.clamp_(max=1) if sign < 0 else both.clamp_(min=1))
        if sign > 0 and part.dtype == torch.bfloat16:
            _make_nans_alike_(part)


def _in_runs(x: torch.Tensor, like: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Groups of rows of x (rows, length), small enough for a processor's cache; with `like`, x is
    split as `like` is. On other devices there is one group."""
    rows, length = (x if like is None else like).shape
    runs: tuple[torch.Tensor, ...]
    runs = x.split(max(1, _RUN // length) if x.device.type == "cpu" else rows)
    return runs


def _make_nans_alike_(x: torch.Tensor) -> None:
    """In bfloat16, products with NaN depend on position and processor."""
    bits = x.view(torch.int16)
    magnitudes = bits & 0x7FFF
    if x.device.type != "cpu" or (magnitudes.numel() and magnitudes.amax() > 0x7F80):
        bits.masked_fill_(magnitudes > 0x7F80, 0x7FC0)


def _power(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2^exponent, exactly."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32).to(dtype)
