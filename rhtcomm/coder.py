"""The hot path of a codec: what is done for every chunk of every step."""

from collections.abc import Mapping

import torch

from rhtcomm.deferred import deferred_on
from rhtcomm.kernels import Feedback, Kernel, Residual, Task
from rhtcomm.moments import MOMENTS, rotations_for
from rhtcomm.randomness import Key
from rhtcomm.wire import HEADER_BYTES, Headers, length_of

__all__ = ["Coder"]


class Coder:
    """Encodes and decodes tensors of one length, in equal shards, on one kind of device.

    `Codec.coder` makes it and makes all checks that are needed only once. Its methods check only
    the headers of payloads. They trust their arguments: in particular, tensors have memory of their
    own (see `rhtcomm.memory.memory_of`), and outputs do not overlap inputs.

    Args:
        tasks: by the number of rotations, in which alone they differ.
        kernel: for the tasks.
        headers: of the codec's payloads.
    """

    def __init__(self, tasks: Mapping[int, Task], kernel: Kernel, headers: Headers) -> None:
        self._tasks, self._kernel, self._headers = tasks, kernel, headers
        task = tasks[headers.rotations]
        self._numel, self._quantizer = task.numel, task.quantizer
        self.nbytes = length_of(task.sections)
        """Bytes of one shard's payload."""

    def encode(
        self,
        x: torch.Tensor,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        out: torch.Tensor,
        rotations: int | None = None,
        wanted: int | None = None,
        residual: Residual | None = None,
    ) -> None:
        """Write the payloads of x to out, as `Codec.encode` does.

        Args:
            x: (numel,) float32, bfloat16 or float16, contiguous.
            offset: of x in its bucket, a multiple of the block.
            out: (shards, at least nbytes) uint8. Rows are contiguous and begin at addresses that 4
                divides.
            rotations: only with "auto": the number of rotations.
            wanted: only with "auto": the least number to request next.
            residual: for error feedback: added to x.
        """
        rotations = rotations or self._headers.rotations
        task, moments = self._tasks[rotations], None
        if self._headers.auto:
            moments = torch.empty(task.blocks, MOMENTS, dtype=torch.float32, device=x.device)
        self._kernel.encode(task, key, offset, rank, world_size, x, out, moments, residual)
        if moments is not None:
            found = rotations_for(moments, self._quantizer.group, self._quantizer.rotations)
            wanted = max(wanted or 1, found)
        self._headers.write(out, rotations, wanted, key, offset, rank, world_size, self._numel)

    def decode(
        self,
        payloads: torch.Tensor,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        out: torch.Tensor,
        feedback: Feedback | None = None,
    ) -> int | None:
        """Write to out the mean of the tensors that K adjacent ranks encoded.

        Args:
            payloads: (K, shards, at least nbytes) uint8. Rows are contiguous and begin at addresses
                that 4 divides.
            offset: as given to `encode`.
            rank: the first of the K.
            out: (numel,) float32, bfloat16 or float16, contiguous.
            feedback: what this rank sent of x, which `out` then holds, and the residual to update.

        Returns:
            The largest number of rotations that a sender wants next; None where it is fixed.

        Raises:
            PayloadError: a header is not the expected one (raised later, by `DeferredChecks`, for
                payloads on CUDA within `deferring`).
        """
        origin = (key, offset, rank, world_size, self._numel)
        checks = None if self._headers.auto else deferred_on(payloads.device)
        if checks:
            headers = payloads[..., :HEADER_BYTES].contiguous()
            checks.add(headers, lambda arrived: self._headers.check(arrived, *origin))
            rotations, wanted = self._headers.rotations, None
        else:
            rotations, wanted = self._headers.check(payloads, *origin)
        task = self._tasks[rotations]
        self._kernel.decode(task, key, offset, rank, world_size, payloads, out, feedback)
        return wanted
