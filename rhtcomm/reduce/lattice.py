"""The mean by codes that can be summed: one integer all-reduce; see rhtcomm/lattice.py."""

import hashlib

import torch

from rhtcomm.communicators import Communicator
from rhtcomm.floating_point import assign_
from rhtcomm.lattice import Lattice
from rhtcomm.reduce.job import Job
from rhtcomm.segments import pack, unpack
from rhtcomm.wire import PayloadError

__all__ = ["LatticeSum"]


class LatticeSum:
    """Averages tensors as codes: `numel` coordinates, starting at `offset` of their bucket."""

    def __init__(
        self, lattice: Lattice, communicator: Communicator, numel: int, offset: int = 0
    ) -> None:
        self._lattice, self._communicator = lattice, communicator
        self._sections = lattice.blocks(numel)
        self._in_bucket = [section.shifted(offset) for section in self._sections]
        # Words of codes have no header: a hash of what the ranks must share is sent along as +h and
        # -h.
        self._common = (lattice, offset, numel)

    def __call__(self, job: Job, used: torch.Tensor) -> None:
        lattice, communicator, flat = self._lattice, self._communicator, job.flat
        rank, world_size = communicator.rank, communicator.world_size
        job.clock.to("encode")
        rotated = [
            lattice.rotate(flat[section.offset : section.stop], job.key, blocks)
            for section, blocks in zip(self._sections, self._in_bucket, strict=True)
        ]
        bounds, flags = self._common_bounds(job, rotated, used)
        used.copy_(pack(flags != 0))
        job.clock.to("encode")
        codes = [
            lattice.codes(y, bound, job.key, blocks.offset, rank, world_size).flatten()
            for y, bound, blocks in zip(rotated, bounds, self._in_bucket, strict=True)
        ]
        words = lattice.pack(torch.cat(codes), world_size)
        job.clock.to("exchange")
        communicator.all_reduce_(words)
        job.clock.to("decode")
        lengths = [section.count * section.size for section in self._sections]
        totals = lattice.unpack(words, sum(lengths), world_size).split(lengths)
        for total, bound, section, blocks in zip(
            totals, bounds, self._sections, self._in_bucket, strict=True
        ):
            rows = total.view(section.count, section.size)
            mean = lattice.mean(rows, bound, job.key, blocks, world_size).flatten()
            target = flat[section.offset : section.stop]
            assign_(target, mean[: target.numel()])

    def _common_bounds(
        self, job: Job, rotated: list[torch.Tensor], used: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The blocks' largest magnitudes over all ranks, and which segments any rank uses."""
        mark = self._mark(job)
        ends = torch.tensor([mark, -mark], dtype=torch.float64, device=job.flat.device)
        bound = torch.cat([*(y.abs().amax(dim=1) for y in rotated), ends, unpack(used).double()])
        job.clock.to("exchange")
        self._communicator.all_reduce_(bound, "max")
        counts = [section.count for section in self._sections]
        *bounds, ends, flags = bound.split([*counts, 2, 8 * used.numel()])
        if ends[0] != -ends[1]:
            raise PayloadError(
                "rhtcomm.all_reduce: another rank has codes that cannot be added to those for "
                f"{job.key}: the ranks are out of step or configured differently"
            )
        return bounds, flags

    def _mark(self, job: Job) -> int:
        """Below 2^53, so that float64 holds it."""
        lattice, offset, numel = self._common
        common = repr((lattice, job.key, offset, numel)).encode()
        return int.from_bytes(hashlib.blake2b(common, digest_size=6).digest(), "little")
