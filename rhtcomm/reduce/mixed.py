"""A tensor of which some segments travel exactly and the rest compressed."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

from rhtcomm.communicators import Topology
from rhtcomm.reduce.exact import Exact
from rhtcomm.reduce.job import Job

__all__ = ["Mixed", "compressed_numel"]


def compressed_numel(lengths: Sequence[int], exact: Sequence[bool]) -> int:
    """Coordinates of the segments that are not exact."""
    return sum(length for length, kept in zip(lengths, exact, strict=True) if not kept)


class Mixed:
    """How a tensor travels whose segments have these `lengths`, those marked in `exact` exactly.

    The others are put together, and travel as `run` says.
    """

    def __init__(
        self,
        run: Callable[[Job, torch.Tensor], int | None],
        topology: Topology,
        lengths: Sequence[int],
        exact: Sequence[bool],
    ) -> None:
        self._run, self._exact = run, Exact(topology)
        edges = [0, *accumulate(lengths)]
        segments = [slice(*ends) for ends in pairwise(edges)]
        self._compressed = [s for s, kept in zip(segments, exact, strict=True) if not kept]
        self._kept = [s for s, kept in zip(segments, exact, strict=True) if kept]

    def __call__(self, job: Job, used: torch.Tensor) -> int | None:
        kept = _join(job.flat, self._kept)
        self._exact(Job(kept, job.key, job.clock), used[:0])
        _put_back_(job.flat, self._kept, kept)
        compressed = _join(job.flat, self._compressed)
        left = None if job.left is None else torch.zeros_like(compressed)
        inner = Job(compressed, job.key, job.clock, job.rotations, left)
        wanted = self._run(inner, used)
        _put_back_(job.flat, self._compressed, compressed)
        if job.left is not None and left is not None:
            _put_back_(job.left, self._compressed, left)
        return wanted


def _join(flat: torch.Tensor, segments: Sequence[slice]) -> torch.Tensor:
    return torch.cat([flat[segment] for segment in segments])


def _put_back_(flat: torch.Tensor, segments: Sequence[slice], values: torch.Tensor) -> None:
    lengths = [segment.stop - segment.start for segment in segments]
    for segment, part in zip(segments, values.split(lengths), strict=True):
        flat[segment] = part
