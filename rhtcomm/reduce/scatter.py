"""The mean of each rank's shard, by one all-to-all of encoded shards.

A tensor of n m coordinates consists of n adjacent shards of m; rank i gets the mean over ranks of
shard i.
"""

import torch

from rhtcomm.codec import AUTO, Codec
from rhtcomm.communicators import Communicator
from rhtcomm.floating_point import assign_
from rhtcomm.reduce.job import Job
from rhtcomm.reduce.payloads import Course, pipeline
from rhtcomm.reduce.split import check_streams, split_into_chunks
from rhtcomm.segments import merge_

__all__ = ["ExactScatter", "Scatter"]


class Scatter:
    """Averages shards of `numel` coordinates each, by payloads to their owners.

    For the randomness, shards begin at whole blocks.
    """

    def __init__(
        self, codec: Codec, communicator: Communicator, numel: int, device: torch.device
    ) -> None:
        stride = -(-numel // codec.block) * codec.block
        check_streams(communicator.world_size * stride, communicator.world_size)
        self._chunks = [
            _Chunk(codec, communicator, chunk, device, stride)
            for chunk in split_into_chunks(numel, codec.block, 1)
        ]

    def __call__(self, job: Job, used: torch.Tensor) -> int | None:
        """`used` has a row per shard; this rank's row becomes the union over ranks."""
        return pipeline(self._chunks, job, used)


class _Chunk:
    """A chunk of every shard; shards are `stride` coordinates apart."""

    def __init__(
        self,
        codec: Codec,
        communicator: Communicator,
        chunk: slice,
        device: torch.device,
        stride: int,
    ) -> None:
        self._communicator, self._chunk, self._stride = communicator, chunk, stride
        length = chunk.stop - chunk.start
        # If this chunk has all of each shard, in whole blocks, one call encodes all shards.
        self._together = communicator.world_size if length == stride else 1
        self._encoder = codec.coder(self._together * length, self._together, device)
        self._decoder = codec.coder(length, 1, device)
        self.in_flight = 2 * communicator.world_size * self._decoder.nbytes
        self._auto = codec.rotations == AUTO

    def course(self, job: Job, used: torch.Tensor) -> Course:
        communicator, chunk, nbytes = self._communicator, self._chunk, self._decoder.nbytes
        rank, world_size = communicator.rank, communicator.world_size
        job.clock.to("encode")
        behind = used.shape[-1] if used.nbytes else 0
        outgoing = job.flat.new_empty(world_size, nbytes + behind, dtype=torch.uint8)
        shards = job.flat.view(world_size, -1)
        for first in range(0, world_size, self._together):
            some = slice(first, first + self._together)
            x, offset = shards[some, chunk].view(-1), first * self._stride + chunk.start
            self._encoder.encode(
                x, job.key, offset, rank, world_size, outgoing[some], job.rotations
            )
        if self._auto:
            # Each row holds the number requested for its own shard. Write the maximum to all of
            # them, so that all owners get the same. (The lower bits, the number of rotations, are
            # equal.)
            outgoing[:, 3] = outgoing[:, 3].max()
        if behind:
            outgoing[:, nbytes:] = used
        incoming = yield communicator.start_all_to_all, outgoing
        job.clock.to("decode")
        if behind:
            merge_(used[rank], incoming[:, nbytes:])
        offset, mean = rank * self._stride + chunk.start, job.result[chunk]
        return self._decoder.decode(incoming.unsqueeze(1), job.key, offset, 0, world_size, mean)


class ExactScatter:
    """The same uncompressed: shards are sent in their own dtype.

    They are summed in rank order, in float32 unless they are float64.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator

    def __call__(self, job: Job, used: torch.Tensor) -> None:
        world_size, flat = self._communicator.world_size, job.flat
        job.clock.to("exchange")
        shards = flat.view(world_size, -1).view(torch.uint8)
        received = self._communicator.start_all_to_all(shards)().view(flat.dtype)
        job.clock.to("decode")
        wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
        total = torch.zeros(job.result.numel(), dtype=wide, device=flat.device)
        for shard in received:
            total += shard
        total /= world_size
        if wide == torch.float64:
            job.result.copy_(total)
        else:
            assign_(job.result, total)
