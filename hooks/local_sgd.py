"""Outer steps: ranks train apart, and average now and then what their parameters changed by."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from ..floating_point import default_mode
from .anchors import CALL, difference, everything_in, followed_in, mirror_of, parts_of
from .engines import Future
from .models import named_parameters
from .outer import OuterState, check_schedule, digest, outer_optimizer, warn_of_ddp
from .outer_checkpoint import read, saved_optimizer, to_torch
from .policy import Bits
from .register import Handle
from .stats import Stats
from .summary import log_summary

__all__ = ["OuterAverager"]

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _diloco(anchors: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(anchors, lr=0.7, momentum=0.9, nesterov=True)


@dataclass(slots=True, eq=False)
class _Flight:
    """An exchange whose result has not been applied."""

    fragment: int
    due: int
    """After which inner step it is applied."""
    starts: list[torch.Tensor]
    """By part: the model's tensors when it began; none where it is applied at once."""
    changes: list[torch.Tensor]
    """By part: what they had changed by; when the futures are done, the mean over ranks."""
    futures: list[Future]


class OuterAverager:
    """Local SGD and DiLoCo, with compressed exchanges.

    Each rank trains with its own inner optimizer. With a the anchors, which are the same on all
    ranks, and w_i the parameters of rank i, every `period` inner steps

        a <- outer optimizer(a, with the gradient mean over ranks of (a - w_i)),    w_i <- a.

    What travels are these pseudo-gradients, compressed as `rhtcomm.hooks.RHTState` says: all of a
    fragment in one exchange. Parameters themselves are never compressed.

    With `delay` d an exchange begins after inner step t, and its result is applied after t + d,
    while training goes on; what the rank learned meanwhile stays:

        w_i(t + d) <- a + (w_i(t + d) - w_i(t)).

    So every inner step counts in exactly one pseudo-gradient. The fragments of Streaming DiLoCo
    (arXiv 2501.18512) are runs of parameters; fragment p of P is exchanged `period` (P - 1 - p) / P
    steps before the last one.

    Anchors have the parameters' names, and are float32 (float64 for float64 parameters, pairs of
    numbers for complex ones). Of bfloat16 and float16 parameters they are the master weights:
    pseudo-gradients count from the anchors as they were rounded into the model, so that a rank that
    learned nothing sends zeros. Followed are the parameters that require a gradient now, and the
    persistent buffers of floating point, such as BatchNorm's statistics: what buffers changed by is
    averaged exactly, with the last fragment, and added up without the outer optimizer. All other
    parameters and buffers are left alone.

    All ranks begin with the same parameters and followed buffers, which they compare. From then on
    they apply the same means by the same arithmetic, so that anchors stay identical by bits; where
    their processors round differently, a warning says so.

    Args:
        model: it may be wrapped in DistributedDataParallel over other ranks than those that
            exchange. Its weights are the same on all ranks.
        optimizer: makes the outer optimizer of the list of anchors. By default that of DiLoCo
            (arXiv 2311.08105), `torch.optim.SGD(anchors, lr=0.7, momentum=0.9, nesterov=True)`;
            `lambda anchors: torch.optim.SGD(anchors, lr=1.0)` takes the mean of the models.
        period: inner steps between two exchanges of a fragment.
        fragments: in how many parts the model is exchanged, at most `period`.
        delay: inner steps from the beginning of an exchange to its use, less than `period`.
        bits: per coordinate, see `RHTState`.
        options: of `RHTState`, but for `equalize`; by default without warm-up. `process_group` or
            `communicator` name the ranks that exchange, by default the world. Ranks that train one
            model by DDP exchange best by a `HierarchicalCommunicator`: each sends a shard.

    Raises:
        TypeError, ValueError: an argument is of another type or out of its range, the model has
            nothing to train, or its parameters have no memory of their own (FSDP).
        RuntimeError: another rank did not come.
        DisagreementError: on all ranks, where their arguments or models differ.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MakeOptimizer | None = None,
        *,
        period: int,
        fragments: int = 1,
        delay: int = 0,
        bits: Bits = 4,
        **options: Any,
    ) -> None:
        self._model = model
        self._period, self._delay = check_schedule(period, fragments, delay)
        trained, buffers = followed_in(model)
        followed = named_parameters(model) | buffers
        self._fragments = parts_of(trained, buffers, fragments)
        self._parts = [part for parts in self._fragments for part in parts]
        named = {
            name: anchor
            for part in self._parts
            if not part.exact
            for name, anchor in zip(part.names, part.anchors, strict=True)
        }
        self.anchors = mirror_of({name: named[name] for name in trained})
        """A module that has the anchors, under the names of the model's parameters."""
        self.optimizer = outer_optimizer(optimizer or _diloco, self.anchors)
        self.inner_steps = 0
        """How often `step` was called."""
        self._began = [0] * fragments  # after which inner step each was last exchanged
        self._flights: list[_Flight] = []
        self.state = OuterState(self._facts(followed), bits, **options)
        self._handle = Handle(self.anchors, self.state)
        self._engine = self.state.begin(self._parts, followed)
        warn_of_ddp(model, self._engine.topology)
        self._closed = False
        reductions = [
            (self._engine.reducer, p.flat.dtype, p.flat.numel(), False) for p in self._parts
        ]
        what = f"changes of parameters in {period} steps"
        log_summary(self.state, self._device, reductions, what=what, step="period")

    def __repr__(self) -> str:
        return (
            f"OuterAverager({self.state.codec}, period={self._period}, "
            f"fragments={len(self._fragments)}, delay={self._delay}, "
            f"inner_steps={self.inner_steps})"
        )

    @property
    def _device(self) -> torch.device:
        return self._parts[0].flat.device

    # The beginning ------------------------------------------------------------------------------

    def _facts(self, followed: Mapping[str, torch.Tensor]) -> dict[str, object]:
        forms = [(name, tuple(x.shape), x.dtype) for name, x in followed.items()]
        return {
            "period": self._period,
            "fragments": len(self._fragments),
            "delay": self._delay,
            "outer optimizer": self.optimizer,
            "parameters and buffers": forms,
            "what is trained": [part.names for part in self._parts],
        }

    # Steps --------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> bool:
        """Call it after each step of the inner optimizer, on all ranks alike.

        Also where a gradient scaler skipped that step: ranks count these calls.

        Returns:
            Whether an outer step was applied, which changed the parameters.

        Raises:
            RuntimeError: the exchange failed, or the averager was closed.
        """
        self._check_open("step")
        with self._failures_told():
            self.inner_steps += 1
            now, count = self.inner_steps, len(self._fragments)
            begins = [
                i
                for i in range(count)
                if (now - self._period * (i + 1) // count) % self._period == 0
            ]
            if not begins and all(flight.due > now for flight in self._flights):
                return False
            self._look_at_model()
            applied = self._land(now)
            for i in begins:
                self._send(i, now + self._delay)
            return self._land(now) or applied

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange what was trained since its last exchange; then parameters are the anchors.

        For the end of training, on all ranks alike. What is in flight is applied before. It takes
        outer steps as `step` does, of fragments that were not exchanged after this very step.

        Raises:
            RuntimeError: the exchange failed, or the averager was closed.
        """
        self._check_open("synchronize")
        with self._failures_told():
            self._look_at_model()
            self._land(self.inner_steps + self._delay)
            for i, began in enumerate(self._began):
                if began < self.inner_steps:
                    self._send(i, self.inner_steps)
            self._land(self.inner_steps)

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise RuntimeError(f"{CALL}.{call}: the averager was closed; create a new one")

    def _look_at_model(self) -> None:
        """Follow tensors that took the place of others: load_state_dict(assign=True) does that."""
        present = everything_in(self._model)
        for part in self._parts:
            missing = [name for name in part.names if name not in present]
            if missing:
                raise RuntimeError(
                    f"{CALL}: the model has no {missing[0]} any more; create a new averager"
                )
            part.tensors = [present[name] for name in part.names]
        self.state.learn(self._parts)

    def _send(self, fragment: int, due: int) -> None:
        parts = self._fragments[fragment]
        starts = [part.read() for part in parts]
        changes = [part.change(start) for part, start in zip(parts, starts, strict=True)]
        futures = self.state.send(parts, changes)
        if due == self.inner_steps:
            starts.clear()
        self._began[fragment] = self.inner_steps
        self._flights.append(_Flight(fragment, due, starts, changes, futures))

    def _land(self, now: int) -> bool:
        """Apply what is due after inner step `now`; returns whether anything was."""
        due = [flight for flight in self._flights if flight.due <= now]
        for flight in due:
            self._wait_for(flight)
            with default_mode(pool=True):
                self._apply(flight)
            self._flights.remove(flight)
        return bool(due)

    def _wait_for(self, flight: _Flight) -> None:
        """Until the means are there; raises what went wrong."""
        self.state.wait(flight.futures)
        flight.futures.clear()

    def _apply(self, flight: _Flight) -> None:
        parts = self._fragments[flight.fragment]
        for part, mean in zip(parts, flight.changes, strict=True):
            if part.exact:
                part.flat.sub_(mean)
                continue
            for anchor, gradient in zip(part.anchors, part.views(mean), strict=True):
                anchor.grad = gradient
        self.optimizer.step()  # of anchors that have a gradient
        self.optimizer.zero_grad()
        for part, start in zip_longest(parts, flight.starts):
            part.write(part.flat if start is None else part.flat + difference(part.read(), start))

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Within it, the other ranks hear of errors."""
        try:
            yield
        except BaseException as failure:
            self._engine.fail(failure)
            raise

    # Figures, checkpoints, the end --------------------------------------------------------------

    def stats(self) -> Stats:
        """Totals, see `Stats`; `steps` are exchanges of one fragment that began."""
        return self._handle.stats()

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on where it is, as copies: plain values and tensors.

        It waits for exchanges in flight, and has their results. Anchors, buffers' anchors and the
        outer optimizer's state are the same on all ranks. Residuals and what is in flight are this
        rank's, under names of its own. The model's parameters are not in it, and differ between
        ranks except right after an outer step without `delay` and fragments: save them for each
        rank.
        """
        for flight in self._flights:
            self._wait_for(flight)
        saved = self._handle.state_dict() | {
            "inner_steps": self.inner_steps,
            "anchors": {name: x.clone() for name, x in self.anchors.state_dict().items()},
            "buffers": {name: x.clone() for name, x in self._anchors_of_buffers().items()},
            "optimizer": copy.deepcopy(saved_optimizer(self.optimizer, self.anchors)),
            "exchanged": [*self._began],
            "in_flight": [[flight.fragment, flight.due] for flight in self._flights],
        }
        if self._flights:
            saved[self._name_of_flights()] = {
                str(i): copy.deepcopy({"starts": flight.starts, "changes": flight.changes})
                for i, flight in enumerate(self._flights)
            }
        return saved

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; call it on all ranks alike, between steps.

        Before the next exchange the ranks compare the anchors. Load the model's parameters too,
        after the averager was made: ranks that saved between outer steps have different ones.

        Args:
            state: what `state_dict` returned on this rank.

        Raises:
            ValueError: it is no saved state, or of another model, optimizer or rank; nothing has
                changed then.
        """
        lengths = [[part.flat.numel() for part in parts] for parts in self._fragments]
        saved = read(
            state,
            dict(self.anchors.state_dict()),
            self._anchors_of_buffers(),
            saved_optimizer(self.optimizer, self.anchors),
            self._name_of_flights(),
            lengths,
        )
        for flight in self._flights:
            self._wait_for(flight)
        self._handle.load_state_dict(state)
        self.optimizer.load_state_dict(to_torch(saved.optimizer, self.optimizer, self.anchors))
        self.anchors.load_state_dict(dict(saved.anchors))
        for name, anchor in self._anchors_of_buffers().items():
            anchor.copy_(saved.buffers[name])
        self.inner_steps, self._began = saved.inner_steps, saved.began
        self._flights = [
            _Flight(i, due, self._placed(i, starts), self._placed(i, changes), [])
            for i, due, starts, changes in saved.flights
        ]
        self.state.facts |= {
            "inner steps that were loaded": self.inner_steps,
            "anchors that were loaded": [digest(part.flat).hex() for part in self._parts],
            "exchanges in flight that were loaded": state["in_flight"],
        }
        self._engine.agreed = False  # before the next exchange the ranks compare them

    def _placed(self, fragment: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies, where the parts of a fragment lie."""
        parts = self._fragments[fragment]
        return [x.to(part.flat, copy=True) for part, x in zip(parts, tensors, strict=True)]

    def _anchors_of_buffers(self) -> dict[str, torch.Tensor]:
        return {
            name: anchor.detach()
            for part in self._parts
            if part.exact
            for name, anchor in zip(part.names, part.anchors, strict=True)
        }

    def _name_of_flights(self) -> str:
        rank, world_size = self.state.place() or (0, 1)
        return f"in flight of rank {rank} of {world_size}"

    def close(self) -> None:
        """End the worker thread and the averager's own connections, on all ranks alike.

        What is in flight is finished, but not applied: see `synchronize`. Call it before
        `destroy_process_group`.
        """
        if self._closed:
            return
        self._end()
        if self.stats().steps == 0 and self._engine.topology.world_size > 1:
            warnings.warn(
                f"{CALL}: it was closed before the first exchange, after {self.inner_steps} calls "
                f"of step() with period={self._period}: the ranks were never averaged. Call "
                "step() after each step of the inner optimizer, and synchronize() at the end",
                stacklevel=2,
            )

    def _end(self) -> None:
        self._closed = True
        self.state.close()

    def __enter__(self) -> "OuterAverager":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # which says more than a warning
            self._end()
