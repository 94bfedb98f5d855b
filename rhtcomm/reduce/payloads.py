"""The mean by payloads: all_gather, two_shot and gather, chunk by chunk.

A chunk's course is a generator. It yields an exchange and the data to send, and receives the
exchange's result. It returns how many rotations the ranks want next, None if that is fixed. While
one chunk is being exchanged, others are encoded or decoded.

The bits of used segments follow the payloads of the first chunk, in messages that reach all ranks.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch

from rhtcomm.codec import Codec
from rhtcomm.communicators import Communicator
from rhtcomm.kernels import Feedback
from rhtcomm.randomness import Key
from rhtcomm.reduce.job import Job
from rhtcomm.reduce.split import Algorithm, choose_algorithm, split_into_chunks, split_into_shards
from rhtcomm.segments import merge_
from rhtcomm.wire import PayloadError

__all__ = ["IN_FLIGHT_BYTES", "Course", "Payloads", "most", "pipeline"]

# A tensor's chunks wait for each other while those in flight hold more than this. Enough for all of
# a bucket of 25 MiB with 8 bits, among the ranks for which "auto" chooses all_gather.
IN_FLIGHT_BYTES = 1 << 25

_Finish = Callable[[], Any]
Course = Generator[tuple[Callable[[torch.Tensor], _Finish], torch.Tensor], Any, int | None]
_InFlight = tuple[Course, _Finish]


class Payloads:
    """Averages tensors of `numel` coordinates on a device by payloads.

    `offset` is that of the tensor in its bucket.
    """

    def __init__(
        self,
        codec: Codec,
        communicator: Communicator,
        algorithm: Algorithm,
        numel: int,
        device: torch.device,
        offset: int = 0,
    ) -> None:
        world_size = communicator.world_size
        chosen = choose_algorithm(algorithm, world_size, codec.nbytes(numel))
        course = _COURSES[chosen]
        shards = world_size if chosen == "two_shot" else 1
        self._chunks = [
            course(codec, communicator, chunk, device, offset)
            for chunk in split_into_chunks(numel, codec.block, shards)
        ]

    def __call__(self, job: Job, used: torch.Tensor) -> int | None:
        return pipeline(self._chunks, job, used)


class _Chunk(Protocol):
    @property
    def in_flight(self) -> int:
        """Bytes that it holds in the course of its exchanges, the same number on all ranks."""
        ...

    def course(self, job: Job, used: torch.Tensor) -> Course: ...


def pipeline(
    chunks: Sequence[_Chunk], job: Job, used: torch.Tensor, ahead: int | None = None
) -> int | None:
    """Run the chunks' courses, each in turn up to its next exchange.

    The order depends only on the number of chunks and on the bytes that they hold, so all ranks
    make the same exchanges in the same order. These end in the order in which they began, as
    transports may expect; with `ahead`, first ones end first.

    Args:
        chunks: of the tensor; the first one holds the most bytes. At least two are in flight,
            otherwise as many as `IN_FLIGHT_BYTES` allows.
        job: with the tensor.
        used: bits of used segments.
        ahead: number of chunks whose first exchange is in flight when another begins, for
            all-reduces, the first of which are too short to keep the link busy; by default as many
            chunks as there is room for make theirs first.

    Raises:
        PayloadError: the first one of a chunk, after all exchanges.
    """
    # A nested function would keep what it refers to as long as an error's traceback lives.
    clock, first = job.clock, deque[_InFlight]()
    later = first if ahead is None else deque[_InFlight]()
    pending, window = deque(chunks), max(2, IN_FLIGHT_BYTES // chunks[0].in_flight)
    running = 0
    wanted: int | None = None
    failure = None
    while pending or first or later:
        if pending and running < window and (ahead is None or len(first) <= ahead):
            course = pending.popleft().course(job, used)
            start, x = next(course)
            clock.to("exchange")
            first.append((course, start(x)))
            running += 1
            used = used[:0] if used.nbytes else used
            continue
        # With others pending, half of the window is for each kind of exchange.
        ending = not first or (pending and 2 * len(later) >= window)
        course, finish = (later if ending else first).popleft()
        clock.to("exchange")
        arrived = finish()
        try:
            start, x = course.send(arrived)
        except StopIteration as end:
            running -= 1
            wanted = most(wanted, end.value)
        except PayloadError as error:  # the other ranks still wait for the other chunks
            running -= 1
            failure = failure or error
            if job.update is not None:
                job.update.stop()
        else:
            clock.to("exchange")
            later.append((course, start(x)))
    if failure is not None:
        raise failure
    return wanted


def most(one: int | None, other: int | None) -> int | None:
    """The larger of two requested numbers of rotations; None if the number is fixed."""
    if one is None or other is None:
        return one or other
    return max(one, other)


class _Shards:
    """Adjacent shards of a tensor, of equal length, which the codec processes in one call.

    `length` is their total length, `offset` their offset in the tensor, `bucket_offset` in the
    bucket, and `owner` the rank that owns the first shard.
    """

    __slots__ = (
        *("bucket_offset", "coder", "count", "length", "nbytes", "offset", "owner", "rank"),
        "world_size",
    )

    def __init__(
        self,
        codec: Codec,
        communicator: Communicator,
        where: slice,
        device: torch.device,
        offset: int,
        owners: range = range(1),
    ) -> None:
        self.offset, self.length = where.start, where.stop - where.start
        self.bucket_offset = offset + self.offset
        self.owner, self.count = owners.start, len(owners)
        self.rank, self.world_size = communicator.rank, communicator.world_size
        self.coder = codec.coder(self.length, self.count, device)
        self.nbytes = self.coder.nbytes

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Their slice of the tensor."""
        if self.length == x.numel():
            return x
        return x[self.offset : self.offset + self.length]

    def encode(self, job: Job, out: torch.Tensor) -> None:
        """Write this rank's payloads to out (count, >= nbytes)."""
        job.clock.to("encode")
        x, offset = self.of(job.flat), self.bucket_offset
        residual = None if job.update is None else job.update.residual.at(self.offset)
        self.coder.encode(
            *(x, job.key, offset, self.rank, self.world_size, out, job.rotations),
            residual=residual,
        )

    def decode(self, job: Job, payloads: torch.Tensor, own: torch.Tensor) -> int | None:
        """Write the mean of all ranks' payloads (n, 1, >= nbytes) to `job.flat`.

        `own` (1, >= nbytes) is what this rank encoded.
        """
        job.clock.to("decode")
        return self._decode(job, payloads, job.key, self.world_size, own)

    def _decode(
        self,
        job: Job,
        payloads: torch.Tensor,
        key: Key,
        world_size: int,
        own: torch.Tensor,
        mean: torch.Tensor | None = None,
        first: int = 0,
    ) -> int | None:
        """Decode to `job.flat`, and update the residual; `mean` begins at `first` of the shards."""
        x, offset = self.of(job.flat), self.bucket_offset
        if job.update is None:
            return self.coder.decode(payloads, key, offset, 0, world_size, x)
        with job.update.chunk(self.offset, self.length) as residual:
            feedback = None
            if residual is not None:
                ranks = (self.rank, self.world_size)
                feedback = Feedback(residual, job.key, *ranks, own, mean, first, self.world_size)
            return self.coder.decode(payloads, key, offset, 0, world_size, x, feedback)

    def encode_mean(
        self, job: Job, payloads: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor | PayloadError:
        """Return the mean of all ranks' payloads, and write a payload of it to `out`.

        Without a residual it may take the place of what this rank had, which nobody needs then. On
        an error, return that instead, and write zeros to `out`, since the other ranks wait for it.
        """
        job.clock.to("decode")
        offset, world_size = self.bucket_offset, self.world_size
        mean = self.of(job.flat)
        if job.update is not None or mean.dtype != torch.float32:
            mean = torch.empty(self.length, dtype=torch.float32, device=out.device)
        try:
            wanted = self.coder.decode(payloads, job.key, offset, 0, world_size, mean)
        except PayloadError as error:
            out.zero_()
            return error
        job.clock.to("encode")
        self.coder.encode(mean, job.key.next_hop(), offset, 0, 1, out, job.rotations, wanted)
        return mean

    def decode_again(
        self,
        job: Job,
        payloads: torch.Tensor,
        own: torch.Tensor,
        mine: "_Shards",
        mean: torch.Tensor | None,
    ) -> int | None:
        """Decode what the owners encoded by `encode_mean`, (count, >= nbytes), to `job.flat`.

        `own` (count, >= nbytes) is what this rank encoded before, and `mean` that of the shards
        `mine` that it owns, if any.
        """
        job.clock.to("decode")
        first = mine.offset - self.offset
        if not 0 <= first < self.length:
            mean = None
        try:
            key = job.key.next_hop()
            return self._decode(job, payloads.unsqueeze(0), key, 1, own, mean, first)
        except PayloadError:
            for rank, payload in enumerate(payloads[:, : self.nbytes], self.owner):
                if not payload.any():
                    raise PayloadError(
                        f"rhtcomm.all_reduce: rank {rank} could not decode the payloads that it "
                        f"received for {job.key}: the ranks are out of step or configured "
                        "differently; see the error on that rank"
                    ) from None
            raise


class _AllGather:
    """Every rank decodes all payloads."""

    def __init__(
        self,
        codec: Codec,
        communicator: Communicator,
        chunk: slice,
        device: torch.device,
        offset: int,
    ) -> None:
        self._all_gather = communicator.start_all_gather
        self._whole = _Shards(codec, communicator, chunk, device, offset)
        self.in_flight = (communicator.world_size + 1) * self._whole.nbytes

    def course(self, job: Job, used: torch.Tensor) -> Course:
        whole = self._whole
        message = _message(job, whole, used)
        messages = yield self._all_gather, message
        if used.nbytes:
            merge_(used, messages[:, whole.nbytes :])
            job.know(used)
        return whole.decode(job, messages.unsqueeze(1), message.unsqueeze(0))


class _Gather:
    """Rank 0 decodes all payloads, and encodes the mean for the others."""

    def __init__(
        self,
        codec: Codec,
        communicator: Communicator,
        chunk: slice,
        device: torch.device,
        offset: int,
    ) -> None:
        self._gather, self._broadcast = communicator.start_gather, communicator.start_broadcast
        self._whole = _Shards(codec, communicator, chunk, device, offset)
        self.in_flight = (communicator.world_size + 2) * self._whole.nbytes

    def course(self, job: Job, used: torch.Tensor) -> Course:
        whole = self._whole
        message = _message(job, whole, used)
        own = message if job.update is None else message.clone()
        messages = yield self._gather, message
        mean = None
        if messages is not None:
            mean = whole.encode_mean(job, messages.unsqueeze(1), message.unsqueeze(0))
            merge_(message[whole.nbytes :], messages[:, whole.nbytes :])
        yield self._broadcast, message
        if isinstance(mean, PayloadError):
            raise mean
        if used.nbytes:
            used.copy_(message[whole.nbytes :])
            job.know(used)
        return whole.decode_again(job, message.unsqueeze(0), own.unsqueeze(0), whole, mean)


def _message(job: Job, whole: _Shards, used: torch.Tensor) -> torch.Tensor:
    """This rank's payload, followed by `used`."""
    message = job.flat.new_empty(whole.nbytes + used.nbytes, dtype=torch.uint8)
    whole.encode(job, message.unsqueeze(0))
    if used.nbytes:
        message[whole.nbytes :] = used
    return message


class _TwoShot:
    """Every rank decodes all payloads of its own shard, and encodes their mean for the others."""

    def __init__(
        self,
        codec: Codec,
        communicator: Communicator,
        chunk: slice,
        device: torch.device,
        offset: int,
    ) -> None:
        self._all_to_all = communicator.start_all_to_all
        self._all_gather = communicator.start_all_gather
        shards = split_into_shards(chunk.stop - chunk.start, codec.block, communicator.world_size)
        shards = [slice(chunk.start + s.start, chunk.start + s.stop) for s in shards]
        alike = sum(s.stop - s.start == shards[0].stop - shards[0].start for s in shards)

        def owned_by(owners: range) -> _Shards:
            where = slice(shards[owners.start].start, shards[owners.stop - 1].stop)
            return _Shards(codec, communicator, where, device, offset, owners)

        # First all shards that are as long as the first one, then the rest one by one.
        self._calls = [owned_by(range(alike))]
        self._calls += [owned_by(range(i, i + 1)) for i in range(alike, len(shards))]
        self._mine = owned_by(range(communicator.rank, communicator.rank + 1))
        # A shorter shard may take more bytes, if it has a tail (ECDQ).
        longest = max(shards.nbytes for shards in self._calls)
        self._shape = (communicator.world_size, longest)
        self.in_flight = (2 * communicator.world_size + 1) * longest

    def course(self, job: Job, used: torch.Tensor) -> Course:
        mine, width = self._mine, self._shape[1]
        outgoing = job.flat.new_empty(self._shape, dtype=torch.uint8)
        for shards in self._calls:
            shards.encode(job, outgoing[shards.owner : shards.owner + shards.count])
        message = job.flat.new_empty(width + used.nbytes, dtype=torch.uint8)
        out = message[:width].unsqueeze(0)
        # What arrives gets no name, so that its memory is free during the second exchange.
        mean = mine.encode_mean(job, (yield self._all_to_all, outgoing).unsqueeze(1), out)
        if used.nbytes:
            message[width:] = used
        gathered = yield self._all_gather, message
        if isinstance(mean, PayloadError):
            raise mean
        if used.nbytes:
            merge_(used, gathered[:, width:])
            job.know(used)
        wanted: int | None = None
        for shards in self._calls:
            owned = slice(shards.owner, shards.owner + shards.count)
            found = shards.decode_again(job, gathered[owned], outgoing[owned], mine, mean)
            wanted = most(wanted, found)
        return wanted


_COURSES: dict[str, Callable[..., _Chunk]] = {
    "all_gather": _AllGather,
    "two_shot": _TwoShot,
    "gather": _Gather,
}
