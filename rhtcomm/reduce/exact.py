"""Uncompressed exchanges."""

import torch

from rhtcomm.communicators import Topology
from rhtcomm.floating_point import assign_
from rhtcomm.reduce.job import Job
from rhtcomm.segments import pack, unpack

__all__ = ["Exact"]


class Exact:
    """The mean by the transport's own all-reduce, in float32.

    float64 is summed as it is, without `used`.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def __call__(self, job: Job, used: torch.Tensor) -> None:
        job.clock.to("exchange")
        flat = job.flat
        total = flat.float() if flat.element_size() < 4 else flat
        if used.numel():
            total = torch.cat([total, unpack(used).float()])
        self.topology.all_reduce_(total)
        if flat.dtype == torch.float64:
            flat /= self.topology.world_size
            return
        assign_(flat, total[: flat.numel()] / self.topology.world_size)
        if used.numel():
            used.copy_(pack(total[flat.numel() :] != 0))
