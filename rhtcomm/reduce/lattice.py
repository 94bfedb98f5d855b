"""The mean by codes that can be summed, see rhtcomm/lattice.py: two all-reduces of each chunk.

The first, a maximum, is that of the blocks' bounds; the second adds the words of codes. The bits of
used segments travel with the bounds of the first chunk, one number each.
"""

import hashlib
from functools import partial

import torch

from rhtcomm.communicators import Communicator
from rhtcomm.kernels import LatticeTask, lattice_kernel_for
from rhtcomm.lattice import Lattice
from rhtcomm.reduce.job import Job
from rhtcomm.reduce.payloads import Course, pipeline
from rhtcomm.reduce.split import split_into_chunks
from rhtcomm.segments import pack, unpack
from rhtcomm.wire import PayloadError

__all__ = ["LatticeSum"]

_MARKS = 2


class LatticeSum:
    """Averages tensors as codes: `numel` coordinates, starting at `offset` of their bucket.

    The tensor's content is lost if an exchange fails.
    """

    def __init__(
        self,
        lattice: Lattice,
        communicator: Communicator,
        numel: int,
        device: torch.device,
        offset: int = 0,
    ) -> None:
        self._chunks = [
            _Chunk(lattice, communicator, chunk, device, offset + chunk.start)
            for chunk in split_into_chunks(numel, lattice.block, communicator.world_size)
        ]

    def __call__(self, job: Job, used: torch.Tensor) -> None:
        pipeline(self._chunks, job, used, ahead=1)


class _Chunk:
    def __init__(
        self,
        lattice: Lattice,
        communicator: Communicator,
        where: slice,
        device: torch.device,
        offset: int,
    ) -> None:
        self._task = LatticeTask(lattice, where.stop - where.start, communicator.world_size)
        self.in_flight = 8 * self._task.words  # those of this rank, and of its neighbour
        self._kernel = lattice_kernel_for(device)
        self._where, self._offset, self._rank = where, offset, communicator.rank
        self._largest = partial(communicator.start_all_reduce, op="max")
        self._sum = communicator.start_all_reduce

    def course(self, job: Job, used: torch.Tensor) -> Course:
        task, kernel, key, offset = self._task, self._kernel, job.key, self._offset
        x = job.flat[self._where]
        # Rotated coordinates take the place of x, unless they need more room.
        y = x
        if x.dtype != torch.float32 or task.padded > task.numel:
            y = x.new_empty(task.padded, dtype=torch.float32)
        job.clock.to("encode")
        exponents = x.new_empty(task.blocks, dtype=torch.int32)
        message = x.new_empty(task.blocks + 2 * _MARKS + 8 * used.numel(), dtype=torch.int32)
        bounds, marks, flags = message.split([task.blocks, 2 * _MARKS, 8 * used.numel()])
        kernel.rotate(task, key, offset, x, y, exponents, bounds)
        marks.copy_(self._marks(key))
        flags.copy_(unpack(used))
        yield self._largest, message
        largest, smallest = marks.split(_MARKS)
        if not torch.equal(largest, -smallest):  # on a device, the host waits here
            raise PayloadError(
                "rhtcomm.all_reduce: another rank has codes that cannot be added to those for "
                f"{key}: the ranks are out of step or configured differently"
            )
        used.copy_(pack(flags != 0))
        job.clock.to("encode")
        words = x.new_empty(task.words, dtype=torch.int32)
        kernel.encode(task, key, offset, self._rank, y, exponents, bounds, words)
        yield self._sum, words
        job.clock.to("decode")
        kernel.decode(task, key, offset, words, bounds, x)
        return None

    def _marks(self, key: object) -> torch.Tensor:
        """Hashes of what the ranks must share, and minus these: words of codes have no header."""
        task = self._task
        common = repr((task.lattice, key, self._offset, task.numel)).encode()
        digest = hashlib.blake2b(common, digest_size=4 * _MARKS).digest()
        marks = torch.frombuffer(bytearray(digest), dtype=torch.int32) & 0x7FFFFFFF
        return torch.cat([marks, -marks])
