"""On which thread and stream a bucket's exchange happens.

On Gloo and MPI an exchange makes its thread wait. So autograd's thread hands each bucket to one
worker thread and goes on with the backward pass; the worker encodes, exchanges and decodes bucket
after bucket in the order in which DDP launched them, over connections of its own, and completes the
future that DDP waits for. (Collectives issued from a future's callback hang or mix up their data on
Gloo.)

NCCL and its like queue exchanges on a stream, and must be called by one thread, in one order on
all ranks, on one communicator. So there autograd's own thread enqueues everything on a side stream,
over the group that DDP itself uses, and waits for nothing.

Engines refer to no state, which could not be collected then.
"""

import logging
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch

from ..codec import DTYPES
from ..deferred import DeferredChecks
from ..kernels import Residual
from ..randomness import Key
from ..reduce import Reducer
from .buckets import Bucket
from .cuda import Cuda, Future
from .failures import clear_frames, explain, text_of
from .residuals import Residuals
from .scales import SCALED, Scales
from .stats import BucketReport, Totals, error_of
from .turns import Turn

__all__ = ["Cuda", "Engine", "Future", "StreamEngine", "ThreadEngine", "engine_for"]

_log = logging.getLogger("rhtcomm")


class Engine:
    """What an RHTState runs on, from its first bucket or `register` on.

    Args:
        reducer: with the communicator that buckets travel over.
        facts: what the ranks compare before the first bucket, in addition to keys and wishes.
        name: of the state, for errors.
        totals: where reports are added.
        residuals: for error feedback.
        nmse_every: see `RHTState`.
        scales: for equalize.
    """

    owner = "rht_hook"  # for errors

    def __init__(
        self,
        reducer: Reducer,
        facts: Mapping[str, object],
        name: str,
        totals: Totals,
        residuals: Residuals | None = None,
        nmse_every: int = 0,
        scales: Scales | None = None,
        cuda: Cuda | None = None,
    ) -> None:
        self.reducer, self.topology = reducer, reducer.topology
        self.failure: str | None = None
        """What the first error said. The error itself would keep frames, and so the state."""
        self.checks = DeferredChecks()
        self.agreed = False  # on what every rank is configured to
        self.turn = Turn(reducer.topology, name)
        self.ended = False
        self._facts, self._totals, self._residuals = facts, totals, residuals
        self._nmse_every, self._scales = nmse_every, scales
        self.cuda = cuda or Cuda()
        self._streams: dict[torch.device, Any] = {}

    def submit(self, bucket: Bucket) -> Future:
        """A future that completes with the bucket's mean over ranks, in its buffer."""
        raise NotImplementedError

    def fail(self, failure: BaseException) -> None:
        """Tell the other ranks, which wait for this one, of a failure outside of any exchange."""
        raise NotImplementedError

    def close(self, wait: bool = True) -> None:
        """Finish what is in flight, with `wait` before it returns; leave its own connections."""
        self.ended = True
        topology = self.topology
        # The levels of a topology may differ in whether they are its own.
        if topology.private or topology.within is not None:
            topology.close()

    def agree(self, key: Key, device: torch.device) -> None:
        """Compare configurations, the next key and wishes with the other ranks.

        Raises:
            DisagreementError: on all ranks, naming the fields in which they differ.
        """
        facts = {
            **self._facts,
            "seed": key.seed,
            "step": key.step,
            "rotations by bucket": sorted(self.reducer.wishes.items()),
        }
        if self._scales is not None:
            facts["scales"] = self._scales.digest()
        self.reducer.agree(facts, device)
        self.agreed = True

    @contextmanager
    def beginning(self, key: Key, device: torch.device) -> Iterator[None]:
        """Compare the ranks' arguments; what fails then or within it ends the engine on all ranks.

        They are compared again before the first bucket, as a checkpoint may be loaded until then.

        Raises:
            DisagreementError: see `agree`.
        """
        try:
            self.agree(key, device)
            self.agreed = False
            yield
        except BaseException as failure:
            self.fail(failure)
            self.close()
            raise

    def _mean_(self, bucket: Bucket) -> None:
        """Replace the bucket's buffer by its mean over ranks."""
        if bucket.parts:
            bucket.by_parts_(self._mean_)
            return
        reducer, buffer, key = self.reducer, bucket.buffer, bucket.key
        if self.failure is not None:
            # The other ranks are in an unknown state by now, so the first error ends it.
            raise RuntimeError(f"{self.owner}: an earlier bucket failed: {self.failure}")
        self.checks.raise_failed()
        if not self.agreed:
            self.agree(key, buffer.device)
        compressible = buffer.dtype in DTYPES
        residual = None
        if self._residuals is not None and compressible:
            gradients = buffer if bucket.gradients is None else bucket.gradients
            residual = self._residuals.pieces(bucket.parameters, gradients)
        exact = None
        if self._nmse_every and compressible and key.step % self._nmse_every == 0:
            exact = self._exact_mean(buffer, residual)
        # Where others may use the connections after this step, they must be settled before.
        settle = bucket.ends and not self.topology.private
        lengths, rows = bucket.lengths_and_rows()
        how: Any = {
            "lengths": lengths,
            "rows": rows,
            "treatment": bucket.treatment,
            "settle": settle,
        }
        with self._equalized(bucket, lengths, residual):
            if bucket.output is None:
                given = self._with_bound(residual, buffer)
                mean, report = buffer, reducer.mean_(buffer, key, residual=given, **how)
            else:
                mean, report = bucket.output, reducer.scatter_(bucket.output, buffer, key, **how)
        if self._scales is not None:
            self._scales.learn(bucket.parameters, mean)
        self._totals.add(report)
        error = norm = 0.0
        if exact is not None:
            if bucket.output is not None:
                exact = exact.view(self.topology.world_size, -1)[self.topology.rank]
            error, norm = error_of(mean, exact)
            self._totals.add_error(error, norm)
        if bucket.reports is not None:
            made = BucketReport.of(report, self.topology.rank, key, buffer.numel(), error, norm)
            bucket.reports.append(made)

    def _equalized(
        self, bucket: Bucket, lengths: tuple[int, ...], residual: list[torch.Tensor] | None
    ) -> AbstractContextManager[None]:
        """Within it, a bucket that travels compressed is divided by its scales."""
        buffer, treatment = bucket.buffer, bucket.treatment
        if (
            self._scales is None
            or buffer.dtype not in SCALED
            or not self.reducer.compresses(buffer, lengths, treatment)
        ):
            return nullcontext()
        exact = treatment.exact if treatment is not None else None
        return self._scales.applied(bucket.parameters, [buffer], exact, residual)

    def _with_bound(
        self, residual: list[torch.Tensor] | None, buffer: torch.Tensor
    ) -> Residual | None:
        """The residual of a bucket; with its bound, unless a device or the scales change it."""
        if residual is None or self._residuals is None:
            return None
        if self._scales is not None or not buffer.is_cpu:
            self._residuals.bound.fill_(math.inf)
            return Residual.of(residual)
        return Residual.of(residual, self._residuals.bound)

    def _exact_mean(
        self, buffer: torch.Tensor, residual: list[torch.Tensor] | None
    ) -> torch.Tensor:
        exact = buffer.float() / self.topology.world_size
        if residual is not None:
            exact += torch.cat(residual) / self.topology.world_size
        self.reducer.clock.to("exchange")
        self.topology.all_reduce_(exact)
        self.reducer.clock.to(None)
        return exact

    def _abort(self) -> None:
        # A rank may live on after its error. On Gloo nobody would tell the others, which wait.
        # (NCCL's watchdog does that, and destroying its group might block.)
        try:
            self.topology.abort()
        except Exception as error:  # what it was called for says more
            _log.warning(
                "%s: the other ranks wait for their timeout, as they could not be told that this "
                "one gave up: %s",
                self.owner,
                text_of(error),
            )
        finally:
            self.turn.give_back()

    def _failed(self, error: BaseException, key: Key) -> BaseException:
        """Note an error of a bucket, and tell the others; returns what to raise."""
        with suppress(Exception):  # of a communicator that cannot even say who it is
            error = explain(error, self.reducer, key, self.agreed, self.owner)
        self.failure = self.failure or text_of(error)
        self._abort()
        return error

    def _refuse_capture(self, device: torch.device) -> None:
        if self.cuda.is_capturing(device):
            raise RuntimeError(
                f"{self.owner}: a CUDA graph is being captured, which would replay the randomness "
                "and the checks of one step for ever; leave the backward pass out of the graph, or "
                "train without the hook"
            )

    @contextmanager
    def _side_stream(self, buffer: torch.Tensor, ready: Any) -> Iterator[None]:
        """Work on a stream of its own, which waits for `ready`; checks are deferred."""
        device = buffer.device
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = self.cuda.new_stream(device)
        stream.wait_event(ready)
        self.cuda.record_stream(buffer, stream)
        with self.cuda.stream(stream), self.checks.deferring():
            yield


class ThreadEngine(Engine):
    """One worker thread, for transports that make the host wait."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._worker_ident = 0
        self.worker = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="rhtcomm", initializer=self._begin
        )

    def _begin(self) -> None:
        self._worker_ident = threading.get_ident()

    def submit(self, bucket: Bucket) -> Future:
        device = bucket.buffer.device
        ready: Any = None
        done: Future = torch.futures.Future()
        if self.cuda.queues(device):
            self._refuse_capture(device)
            ready, done = self.cuda.ready(device), self.cuda.future(device)
        if self.failure is None:  # else the bucket is refused on its way
            self.turn.take()
        self.worker.submit(self._run, bucket, ready, done)
        return done

    def _run(self, bucket: Bucket, ready: Any, done: Future) -> None:
        """One bucket, on the worker thread."""
        try:
            if ready is None:
                self._complete(bucket, done)
            else:
                with self._side_stream(bucket.buffer, ready):
                    self._complete(bucket, done)
        except BaseException as error:
            self._complete_with(error, bucket.key, done)

    def _complete_with(self, error: BaseException, key: Key, done: Future) -> None:
        error = self._failed(error, key)
        clear_frames(error)
        if not isinstance(error, Exception):  # futures take no others
            error = RuntimeError(f"{self.owner}: {error!r} on the worker thread")
        if not done.done():
            done.set_exception(error)  # type: ignore[arg-type]

    def _complete(self, bucket: Bucket, done: Future) -> None:
        self._mean_(bucket)
        self.turn.finish_bucket()
        done.set_result(bucket.buffer)
        # The next bucket shows that the others have this one, but after a step a rank may leave.
        if bucket.ends and self.topology.private:
            self.reducer.clock.to("exchange")
            self.topology.settle()
            self.reducer.clock.to(None)

    def fail(self, failure: BaseException) -> None:
        self.failure = self.failure or text_of(failure)
        try:
            self.worker.submit(self._abort)  # behind the buckets before
        except RuntimeError:  # the worker has ended
            self._abort()

    def close(self, wait: bool = True) -> None:
        self.worker.shutdown(wait=wait and threading.get_ident() != self._worker_ident)
        super().close(wait)


class StreamEngine(Engine):
    """The calling thread and a side stream, for transports that enqueue exchanges.

    Once the ranks have agreed, the host waits for nothing but what rotations="auto" and
    `nmse_every` read from the device. So an error of the transport comes out where it reports
    errors (NCCL: the watchdog ends the process, or the next call raises), and a payload that was
    not what it should be is found out one bucket or more later.
    """

    def submit(self, bucket: Bucket) -> Future:
        device = bucket.buffer.device
        try:
            self._refuse_capture(device)
            done = self.cuda.future(device)
            with self._side_stream(bucket.buffer, self.cuda.ready(device)):
                self._mean_(bucket)
                done.set_result(bucket.buffer)
        except BaseException as error:
            raise self._failed(error, bucket.key)  # noqa: B904  it has its cause
        return done

    def fail(self, failure: BaseException) -> None:
        self.failure = self.failure or text_of(failure)
        self._abort()


def engine_for(device: torch.device, reducer: Reducer) -> type[Engine]:
    """The engine that fits a reducer's transport, for buckets on a device."""
    return StreamEngine if reducer.topology.enqueues(device.type) else ThreadEngine
