"""The mean of each rank's shard, by one all-to-all of encoded shards."""

import torch

from rhtcomm.codec import Codec
from rhtcomm.communicators import Communicator
from rhtcomm.floating_point import GRAIN, assign_, default_mode
from rhtcomm.randomness import Key
from rhtcomm.reduce.clock import Clock
from rhtcomm.reduce.job import Job
from rhtcomm.reduce.payloads import Course, pipeline
from rhtcomm.reduce.reducer import Report, settle_failed
from rhtcomm.reduce.split import check_streams, split_into_chunks
from rhtcomm.wire import PayloadError

__all__ = ["scatter_mean_"]


def scatter_mean_(
    output: torch.Tensor,
    flat: torch.Tensor,
    codec: Codec,
    key: Key,
    communicator: Communicator,
    min_numel: int,
) -> Report:
    """output (m,) becomes the mean over n ranks of this rank's shard of flat (n m,), contiguous."""
    sent, numel, world_size = communicator.bytes_sent, output.numel(), communicator.world_size
    clock = Clock()
    wanted = None
    compressed = flat.numel() >= min_numel and world_size > 1
    if compressed:
        # Shards begin at whole blocks, as far as randomness is concerned.
        stride = -(-numel // codec.block) * codec.block
        check_streams(world_size * stride, world_size)
        chunks = [
            _Chunk(codec, communicator, chunk, output, stride)
            for chunk in split_into_chunks(numel, codec.block, 1)
        ]
        nothing = flat.new_empty(0, dtype=torch.uint8)
        try:
            wanted = pipeline(chunks, Job(flat, key, clock), nothing)
        except PayloadError as error:
            settle_failed(error, communicator, clock)
            raise
    else:
        clock.to("exchange")
        _sum_exactly(output, flat, communicator)
    clock.to("exchange")
    communicator.settle()
    clock.to(None)
    return Report(
        bytes_sent=communicator.bytes_sent - sent,
        bytes_uncompressed=communicator.ring_bytes(flat.nbytes) // 2,
        rotations=codec.default_rotations if compressed else None,
        wanted_rotations=wanted,
        encode_seconds=clock.seconds["encode"],
        exchange_seconds=clock.seconds["exchange"],
        decode_seconds=clock.seconds["decode"],
    )


class _Chunk:
    """A chunk of every shard, which are `stride` coordinates apart."""

    def __init__(
        self,
        codec: Codec,
        communicator: Communicator,
        chunk: slice,
        output: torch.Tensor,
        stride: int,
    ) -> None:
        self._communicator, self._chunk, self._output = communicator, chunk, output
        self._stride = stride
        self._coder = codec.coder(chunk.stop - chunk.start, 1, output.device)

    def course(self, job: Job, used: torch.Tensor) -> Course:
        rank, world_size = self._communicator.rank, self._communicator.world_size
        offset, coder = self._chunk.start, self._coder
        job.clock.to("encode")
        outgoing = job.flat.new_empty(world_size, 1, coder.nbytes, dtype=torch.uint8)
        for shard, x in enumerate(job.flat.view(world_size, -1)):
            coder.encode(
                x[self._chunk],
                job.key,
                shard * self._stride + offset,
                rank,
                world_size,
                outgoing[shard],
            )
        incoming = yield self._communicator.start_all_to_all, outgoing.flatten(1)
        job.clock.to("decode")
        mean, offset = self._output[self._chunk], rank * self._stride + offset
        return coder.decode(incoming.unsqueeze(1), job.key, offset, 0, world_size, mean)


def _sum_exactly(output: torch.Tensor, flat: torch.Tensor, communicator: Communicator) -> None:
    """The same uncompressed, as float32, summed in the order of ranks."""
    with default_mode(pool=flat.numel() > GRAIN):
        rows = flat.float().view(communicator.world_size, -1)
        received = communicator.start_all_to_all(rows.view(torch.uint8))()
        total = torch.zeros(output.numel(), dtype=torch.float32, device=output.device)
        for x in received.view(torch.float32):
            total += x
        assign_(output, total / communicator.world_size)
