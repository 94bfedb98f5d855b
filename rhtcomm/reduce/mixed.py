"""Tensors with some segments sent exactly and the rest compressed."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

from rhtcomm.reduce.job import Job
from rhtcomm.reduce.residual import Update

__all__ = ["Mixed", "compressed_numel"]

Run = Callable[[Job, torch.Tensor], int | None]


def compressed_numel(lengths: Sequence[int], exact: Sequence[bool]) -> int:
    """Number of coordinates in segments that are not exact."""
    return sum(length for length, kept in zip(lengths, exact, strict=True) if not kept)


class Mixed:
    """Averages tensors with segments of these `lengths`; those marked in `exact` are sent exactly.

    The others are concatenated and exchanged by `run`, the exact ones by `run_exact`. If a job
    scatters, each of the `shards` shards has these segments.
    """

    def __init__(
        self,
        run: Run,
        run_exact: Run,
        lengths: Sequence[int],
        exact: Sequence[bool],
        shards: int = 1,
    ) -> None:
        self._run, self._run_exact, self._shards = run, run_exact, shards
        edges = [0, *accumulate(lengths)]
        segments = [slice(*ends) for ends in pairwise(edges)]
        self._compressed = [s for s, kept in zip(segments, exact, strict=True) if not kept]
        self._kept = [s for s, kept in zip(segments, exact, strict=True) if kept]

    def __call__(self, job: Job, used: torch.Tensor) -> int | None:
        kept = self._part(job, self._kept)
        self._run_exact(kept, used[:0])
        _put_back_(job.result, self._kept, kept.result)
        compressed = self._part(job, self._compressed)
        compressed.rotations = job.rotations
        if job.update is not None:
            compressed.update = Update.of(torch.zeros_like(compressed.flat))
        wanted = self._run(compressed, used)
        _put_back_(job.result, self._compressed, compressed.result)
        if job.update is not None and compressed.update is not None:
            _put_back_(job.update.left, self._compressed, compressed.update.left)
        return wanted

    def _part(self, job: Job, segments: Sequence[slice]) -> Job:
        """The same for some of the segments."""
        shards = job.flat.view(self._shards, -1)
        joined = torch.cat([shards[:, segment] for segment in segments], dim=1)
        output = None if job.output is None else job.output.new_empty(joined.shape[1])
        return Job(joined.view(-1), job.key, job.clock, output=output)


def _put_back_(flat: torch.Tensor, segments: Sequence[slice], values: torch.Tensor) -> None:
    lengths = [segment.stop - segment.start for segment in segments]
    for segment, part in zip(segments, values.split(lengths), strict=True):
        flat[segment] = part
