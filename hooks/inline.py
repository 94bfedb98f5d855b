"""Exchanges whose caller needs the result on return."""

from ..randomness import Key
from .buckets import Bucket
from .engines import Engine
from .failures import text_of

__all__ = ["InlineEngine"]


class InlineEngine(Engine):
    """Runs on the calling thread and its current stream.

    FSDP2 calls it on its reduction stream, and uses the result at once. If the transport enqueues
    exchanges (NCCL), the host never waits, as with `StreamEngine`; if it blocks the host (Gloo), so
    does the call.
    """

    owner = "rhtcomm.hooks.compress_fsdp"

    def run(self, bucket: Bucket) -> None:
        """Exchange a bucket; `Bucket` says where its mean is written."""
        device = bucket.buffer.device
        try:
            self._refuse_capture(device)
            if bucket.output is None and self.cuda.queues(device):
                # The caller may free it before the queued work is done.
                self.cuda.record_stream(bucket.buffer, self.cuda.current_stream(device))
            with self.checks.deferring():
                self._mean_(bucket)
        except BaseException as error:
            raise self._failed(error, bucket.key)  # noqa: B904  it has its cause
        if bucket.ends:
            self.settle(bucket.key)

    def settle(self, key: Key) -> None:
        """Wait until the others have received everything: this rank may leave after a step.

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
