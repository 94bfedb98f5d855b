"""Exchanges whose caller needs the result when they return."""

from ..randomness import Key
from .buckets import Bucket
from .engines import Engine
from .failures import text_of

__all__ = ["InlineEngine"]


class InlineEngine(Engine):
    """The calling thread, and the stream that is current there.

    FSDP2 calls on a stream of its own for reductions, and goes on with the result. Where the
    transport enqueues exchanges (NCCL), the host waits for nothing, as with `StreamEngine`; where
    it makes the host wait (Gloo), so does the call.
    """

    owner = "rhtcomm.hooks.compress_fsdp"

    def run(self, bucket: Bucket) -> None:
        """Exchange a bucket; see `Bucket` for where its mean goes."""
        device = bucket.buffer.device
        try:
            self._refuse_capture(device)
            if bucket.output is None and self.cuda.queues(device):
                # Its caller may free it before what is queued here is done.
                self.cuda.record_stream(bucket.buffer, self.cuda.current_stream(device))
            with self.checks.deferring():
                self._mean_(bucket)
        except BaseException as error:
            raise self._failed(error, bucket.key)  # noqa: B904  it has its cause
        if bucket.ends:
            self.settle(bucket.key)

    def settle(self, key: Key) -> None:
        """Wait until the others have all that this rank sent, as it may leave after a step.

        `key` is of the last bucket.
        """
        if self.failure is not None or not self.topology.private:
            return
        try:
            self.reducer.clock.to("exchange")
            self.topology.settle()
            self.reducer.clock.to(None)
        except BaseException as error:
            raise self._failed(error, key)  # noqa: B904  it has its cause

    def fail(self, failure: BaseException) -> None:
        self.failure = self.failure or text_of(failure)
        self._abort()
