"""The memory of a program in PTX: that of tensors, and the one its warps share."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ptx_arithmetic import Fault

__all__ = ["Global", "Shared"]

Addresses = npt.NDArray[np.int64]  # (n,)
Octets = npt.NDArray[np.uint8]  # (n, length)


def within(addresses: Addresses, length: int) -> npt.NDArray[Any]:
    """(n, length)"""
    return addresses[:, None] + np.arange(length)


class Global:
    """What tensors hold, each from its first coordinate to its last."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.segments = []
        for x in tensors:
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            nbytes = (last + 1) * x.element_size() if x.numel() else 0
            first = x.storage_offset() * x.element_size()
            storage = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
            self.segments.append((x.data_ptr(), nbytes, storage[first : first + nbytes].numpy()))

    def load(self, addresses: Addresses, length: int, warps: Addresses) -> Octets:
        octets, offsets = self._at(addresses, length)
        return octets[within(offsets, length)]

    def store(self, addresses: Addresses, values: Octets, warps: Addresses) -> None:
        octets, offsets = self._at(addresses, values.shape[1])
        octets[within(offsets, values.shape[1])] = values

    def _at(self, addresses: Addresses, length: int) -> tuple[Octets, Addresses]:
        for base, nbytes, octets in self.segments:
            offsets = addresses - base
            if offsets.min() >= 0 and offsets.max() + length <= nbytes:
                return octets, offsets
        raise Fault("out of the bounds of every tensor")


class Shared:
    """Shared memory, which knows what warps did with each byte since the last barrier.

    The threads of a warp are in step. Warps are not: what one reads between two barriers, no other
    may change. Storing what a byte already holds is no change; Triton's threads do so.
    """

    def __init__(self, nbytes: int, random: np.random.Generator) -> None:
        self.octets = random.integers(0, 256, nbytes, dtype=np.uint8)
        self.written = np.zeros(nbytes, np.bool_)
        self.readers, self.writers = np.zeros((2, nbytes), np.uint32)  # a bit for each warp

    def barrier(self) -> None:
        self.readers[:] = self.writers[:] = 0

    def load(self, addresses: Addresses, length: int, warps: Addresses) -> Octets:
        at, warp = self._at(addresses, length, warps)
        if not self.written[at].all():
            raise Fault("reads shared memory that was never written")
        if (self.writers[at] & ~warp).any():
            raise Fault("race: reads what another warp wrote since the last barrier")
        np.bitwise_or.at(self.readers, at, warp)
        return self.octets[at]

    def store(self, addresses: Addresses, values: Octets, warps: Addresses) -> None:
        at, warp = self._at(addresses, values.shape[1], warps)
        used = (self.readers[at] | self.writers[at]) & ~warp
        if ((used != 0) & (self.octets[at] != values)).any():
            raise Fault("race: changes what another warp used since the last barrier")
        self.octets[at] = values
        if (self.octets[at] != values).any():
            raise Fault("race: several threads write different values to one place")
        self.written[at] = True
        np.bitwise_or.at(self.writers, at, warp)

    def _at(
        self, addresses: Addresses, length: int, warps: Addresses
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint32]]:
        if addresses.min() < 0 or addresses.max() + length > len(self.octets):
            raise Fault(f"out of the {len(self.octets)} bytes of shared memory")
        at = within(addresses, length)
        warp = np.broadcast_to((np.uint32(1) << warps.astype(np.uint32))[:, None], at.shape)
        return at, warp
