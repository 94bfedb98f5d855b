"""The parameters of each DDP bucket, so that a resumed run can use the same buckets.

The bits of a mean depend on the buckets: on their numbers, which are part of the keys, and on the
offsets of parameters in them. A new DDP model begins with one bucket per dtype. After its first
step (with static_graph, its second) it rebuilds them in the order in which gradients became ready.
So a checkpoint has the buckets of the next step. In a resumed run DDP's first buckets are split
into those, until DDP has rebuilt them.

Each bucket is split on its own, without waiting for others. This works since each of DDP's first
buckets has all parameters of a dtype. If one has only a part of a saved bucket, as in another model
or with bucket_cap_mb_list, the saved buckets are discarded.
"""

import hashlib
import json
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from .buckets import Bucket
from .policy import Policy

__all__ = ["Layout", "Names", "Place"]

_log = logging.getLogger("rhtcomm")

Names = list[str]
"""Names of the parameters in a bucket, in order."""

_Ids = tuple[int, ...]
"""The same as object ids, which compare faster."""


class Place(NamedTuple):
    """The position of a DDP bucket in its step."""

    number: int
    last: bool
    parts: Sequence[tuple[int, list[torch.Tensor]]] = ()
    """Saved buckets into which it is split, with number and parameters; empty: it stays whole."""

    def prepare(self, bucket: Bucket, policy: Policy) -> Bucket:
        """Set the bucket's treatment, or its parts with theirs."""
        step = bucket.key.step
        if not self.parts:
            bucket.treatment = policy.treatment(step, bucket.parameters)
            return bucket
        bucket.parts = [
            Bucket(
                bucket.buffer,
                replace(bucket.key, bucket=number),
                parameters,
                ends=False,
                treatment=policy.treatment(step, parameters),
            )
            for number, parameters in self.parts
        ]
        bucket.parts[-1].ends = bucket.ends
        return bucket


class Layout:
    """The buckets of a model, by parameter names.

    Its string is a digest of the loaded buckets, which the ranks compare.
    """

    def __init__(self, saved: Sequence[Names] = ()) -> None:
        self._names = WeakTensorKeyDictionary()
        self._model: Callable[[], nn.Module | None] = lambda: None
        self.load(saved)

    def __reduce__(self) -> tuple[type["Layout"], tuple[list[Names]]]:
        """A copy belongs to another model, which begins with DDP's first buckets."""
        return Layout, (self.buckets(),)

    def __str__(self) -> str:
        return self._digest

    def learn(self, model: nn.Module, named: Mapping[str, torch.Tensor]) -> None:
        """Remember a model and its parameters' names."""
        for name, parameter in named.items():
            self._names[parameter] = name
        self._model = weakref.ref(model)

    def load(self, saved: Sequence[Names]) -> None:
        """Load the result of `buckets`; if empty, DDP's buckets stay whole."""
        self._saved = _Saved(saved) if saved else None
        self._digest = hashlib.blake2b(json.dumps(saved).encode(), digest_size=8).hexdigest()
        self._seen: dict[int, tuple[_Ids, list[str | None]]] = {}  # DDP's own, by index
        self._used = 0  # numbers below it were used in this step by discarded saved buckets

    def buckets(self) -> list[Names]:
        """The buckets of the next step; empty if unknown."""
        rebuilds, coming = False, list[list[torch.Tensor]]()
        with suppress(AttributeError):  # torch uses other private names
            rebuilds, coming = _rebuilt(self._model())
        found = [[self._names.get(parameter) for parameter in bucket] for bucket in coming]
        if not found and self._saved is not None:
            found = [[*names] for names in self._saved.buckets]
        if not found and not rebuilds:
            found = [names for _, (_, names) in sorted(self._seen.items())]
        return [] if any(None in names for names in found) else found

    def place(self, index: int, last: bool, parameters: Sequence[torch.Tensor]) -> Place:
        """The place of DDP's bucket with this index; `last` as DDP says."""
        ids, found = tuple(map(id, parameters)), None
        if index == 0:
            self._used = 0
        if self._saved is not None:
            named = {self._names.get(parameter): parameter for parameter in parameters}
            found = self._saved.place(last, ids, named)
            if found is None:
                self._give_up(self._saved)
            elif self._saved.reached:
                self._saved = None
        place = found or Place(self._used + index, last)
        if not place.parts:
            self._note(place.number - self._used, last, ids, parameters)
        return place

    def _note(self, index: int, last: bool, ids: _Ids, parameters: Sequence[torch.Tensor]) -> None:
        known = self._seen.get(index)
        if known is None or known[0] != ids:
            self._seen[index] = ids, [self._names.get(parameter) for parameter in parameters]
        if last and len(self._seen) > index + 1:
            self._seen = {i: bucket for i, bucket in self._seen.items() if i <= index}

    def _give_up(self, saved: "_Saved") -> None:
        _log.warning(
            "rht_hook: DDP's buckets cannot be split into those of the checkpoint, which had "
            "another model, bucket_cap_mb or order of gradients; training continues, but its bits "
            "differ from those of an uninterrupted run"
        )
        # No key may be used twice.
        self._used = len(saved.buckets) if saved.done else 0
        self._saved = None


class _Saved:
    """The buckets of a checkpoint, while DDP's buckets differ from them."""

    def __init__(self, buckets: Sequence[Names]) -> None:
        self.buckets = buckets
        self.done: set[int] = set()
        """Numbers done in the current step."""
        self.reached = False
        """Whether DDP had the same buckets throughout a step."""
        self._number_of = {name: i for i, names in enumerate(buckets) for name in names}
        self._first: set[_Ids] = set()  # DDP's in its first step
        self._steps = self._count = 0  # whole steps; DDP's buckets in the current one
        self._apart = False  # whether one of these was split

    def place(
        self, last: bool, ids: _Ids, named: Mapping[str | None, torch.Tensor]
    ) -> Place | None:
        """The place of DDP's bucket with these parameters; None if it does not consist of saved
        buckets."""
        numbers = sorted({self._number_of.get(name or "", -1) for name in named})
        if -1 in numbers or sum(len(self.buckets[i]) for i in numbers) != len(named):
            return None
        if not self.done.isdisjoint(numbers):  # DDP had left out the last ones
            self._end_step()
        number = self._count
        whole = numbers == [number] and self.buckets[number] == [*named]
        if self._steps == 0:
            self._first.add(ids)
        elif not whole and ids not in self._first:
            return None  # DDP has rebuilt its buckets since
        self.done.update(numbers)
        self._count += 1
        self._apart = self._apart or not whole
        # With static_graph all buckets of the first step have index 0, and none is marked as the
        # last.
        last = last or len(self.done) == len(self.buckets)
        if last:
            self._end_step()
        if whole:
            return Place(number, last)
        parts = [(i, [named[name] for name in self.buckets[i]]) for i in numbers]
        return Place(number, last, parts)

    def _end_step(self) -> None:
        self.reached = not self._apart
        self.done.clear()
        self._steps, self._count, self._apart = self._steps + 1, 0, False


def _rebuilt(model: nn.Module | None) -> tuple[bool, list[list[torch.Tensor]]]:
    """Whether DDP will still rebuild its buckets, and the new buckets if the order of gradients is
    known.

    DDP rebuilds them before the next forward pass, by the order on rank 0. torch has no public
    interface for this; the names are those of torch 2.11 to 2.15.
    """
    if not isinstance(model, DistributedDataParallel):
        return False, []
    ddp: Any = model
    if ddp._has_rebuilt_buckets or (ddp.find_unused_parameters and not ddp.static_graph):
        return False, []
    ddp.logger.set_runtime_stats_and_log()
    known = ddp._get_ddp_logging_data()
    if int(known.get("has_rebuilt_buckets", 0)):
        return False, []
    order = known.get("prev_iteration_grad_ready_order_indices", "")
    indices = [int(index) for index in order.split(",") if index.strip()]
    parameters = [p for p in ddp._module_parameters if p.requires_grad]
    if sorted(indices) != [*range(len(parameters))]:
        return True, []
    private: Any = dist
    first, then = private._DEFAULT_FIRST_BUCKET_BYTES, ddp.bucket_bytes_cap
    caps = [first if ddp.bucket_bytes_cap_default else then, then]
    ordered, dense = [parameters[i] for i in indices], [False] * len(indices)
    buckets, _ = private._compute_bucket_assignment_by_size(ordered, caps, dense, indices)
    return True, [[parameters[i] for i in bucket] for bucket in buckets]
