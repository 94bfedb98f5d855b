"""A second rank in the same process, for what must run on one device without a network."""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist

from rhtcomm import Codec, Key
from rhtcomm.communicators import Communicator
from rhtcomm.reduce.split import split_into_chunks
from rhtcomm.wire import HEADER_BYTES, Headers

__all__ = ["Bucket", "Twin", "mean_of_twins"]


def _headers(codec: Codec) -> Headers:
    return Headers(codec.fingerprint, codec.configuration, codec.default_rotations, auto=False)


class Twin(Communicator):
    """Two ranks, the other of which sends the codes that this one does, under a header of its own.

    Call `expect` before each bucket, for the headers. Nothing leaves the device.

    Args:
        group: of one rank: what this rank sends takes its way through the group's all-gather.
    """

    rank, world_size, bytes_sent = 0, 2, 0

    def __init__(
        self, codec: Codec, enqueues: bool, group: dist.ProcessGroup | None = None
    ) -> None:
        self._codec, self._enqueues, self._group = codec, enqueues, group
        self._headers = _headers(codec)
        self._expected = deque[tuple[Key, slice, int]]()

    def expect(self, key: Key, numel: int, parameters: int = 1) -> None:
        """The next bucket has this key and length, and so many parameters."""
        chunks = split_into_chunks(numel, self._codec.block, 1)
        # One bit for each parameter, in words of 32, travels behind the first payload.
        used = [4 * -(-parameters // 32) if parameters > 1 else 0, *[0] * len(chunks)]
        for chunk, behind in zip(chunks, used, strict=False):
            nbytes = self._codec.nbytes(chunk.stop - chunk.start) + behind
            self._expected.append((key, chunk, nbytes))

    def ring_bytes(self, nbytes: int) -> int:
        return nbytes

    def enqueues(self, device: str) -> bool:
        return self._enqueues

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        gathered = x.new_empty(2, x.numel())
        work = None
        if self._group is None:
            gathered[0] = x
        else:
            work = self._group.allgather([[gathered[0]]], [x])
        expected = None
        # What the ranks compare before the first bucket has another length.
        if self._expected and self._expected[0][2] == x.numel():
            expected = self._expected.popleft()

        def finish() -> torch.Tensor:
            if work is not None:
                work.wait()
            gathered[1] = gathered[0]
            if expected is not None:
                key, chunk, _ = expected
                rotations, numel = self._headers.rotations, chunk.stop - chunk.start
                row = gathered[1:]
                self._headers.write(row, rotations, None, key, chunk.start, 1, 2, numel)
            return gathered

        return finish

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.start_all_gather(x)()

    def all_reduce_(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> None:
        if op == "sum":
            x.mul_(2)


def mean_of_twins(codec: Codec, x: torch.Tensor, key: Key) -> torch.Tensor:
    """What becomes of a bucket x (numel,) on the CPU, in its own dtype."""
    out = torch.empty_like(x)
    for chunk in split_into_chunks(x.numel(), codec.block, 1):
        part, offset = x[chunk], chunk.start
        payloads = torch.stack([codec.encode(part, key, i, 2, offset=offset) for i in range(2)])
        payloads[1, HEADER_BYTES:] = payloads[0, HEADER_BYTES:]
        codec.decode_mean(payloads, key, part.numel(), offset=offset, out=out[chunk])
    return out


class Bucket(SimpleNamespace):
    """What the hook uses of DDP's GradBucket, which Python cannot make."""

    @classmethod
    def of(
        cls, tensor: torch.Tensor, index: int = 0, last: bool = True, parameters: int = 1
    ) -> Any:
        """A bucket of so many parameters; by default the step's only one."""
        views = list(tensor.tensor_split(parameters)) if parameters > 1 else [tensor]
        return cls(
            buffer=lambda: tensor,
            index=lambda: index,
            is_last=lambda: last,
            parameters=lambda: views,
        )
