"""What all kernels compute, in plain torch, on any device.

The arithmetic is part of the specification, so that all ranks end with the same bits, whichever
kernels they run:

* A block is multiplied by the power of two 2^(127 - e), e the biased exponent of its largest
  magnitude clamped to 1 .. 253, so that no finite input overflows or loses bits on the way.
* Decoding does the same with the largest scale of the ranks, multiplies values by scales, adds them
  in rank order, undoes the rotation, and then multiplies by d^(-k/2) / K and by 2^(e - 127).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from rhtcomm.floating_point import assign_, default_mode
from rhtcomm.kernels.feedback import Feedback, Residual, decode_with_feedback, with_residual
from rhtcomm.kernels.task import Task
from rhtcomm.moments import block_moments
from rhtcomm.randomness import Key
from rhtcomm.rotation import Blocks
from rhtcomm.wire import Section

__all__ = ["decode", "encode", "powers_of_two"]

# Blocks are processed in batches of about this many coordinates: few enough for a core's cache or,
# on other devices, enough work for a launch.
_BATCH = {"cpu": 1 << 17}
_LARGE_BATCH = 1 << 24
_UNITS = 32


@default_mode(pool=True)
def encode(
    task: Task,
    key: Key,
    offset: int,
    rank: int,
    world_size: int,
    x: torch.Tensor,
    payloads: torch.Tensor,
    moments: torch.Tensor | None = None,
    residual: Residual | None = None,
) -> None:
    x = with_residual(x, residual)
    quantizer, rotation = task.quantizer, task.rotation
    signs_of = rank if quantizer.rotation == "per_rank" else 0
    done = 0
    for section, shard, rows, coordinates, blocks in _batches(task, offset, x.device):
        values = blocks.rows(x[coordinates].float())
        down, up, finite = powers_of_two(values)
        values = torch.where(finite[:, None], values * down[:, None], 0.0)
        if moments is not None:
            moments[done : done + blocks.count] = block_moments(values, up)
        y = rotation.rotate(values, key, blocks.offset, signs_of)
        octets, scale = quantizer.compress(y, key, blocks.offset, rank, world_size)
        scale = scale * blocks.size ** (-rotation.rotations / 2) * up
        scale = scale.clamp(max=torch.finfo(torch.float32).max)  # Eden's can exceed it
        scales, codes = section.part(payloads[shard], rows, quantizer)
        scales[:] = torch.where(finite, scale, torch.nan)
        codes[:] = octets
        done += blocks.count


@default_mode(pool=True)
def decode(
    task: Task,
    key: Key,
    offset: int,
    rank: int,
    world_size: int,
    payloads: torch.Tensor,
    out: torch.Tensor,
    feedback: Feedback | None = None,
) -> None:
    if feedback is not None:
        decode_with_feedback(
            *(decode, task, key, offset, rank, world_size, payloads, out), feedback
        )
        return
    ranks, rotation, quantizer = len(payloads), task.rotation, task.quantizer
    shared = quantizer.rotation == "shared"
    for section, shard, rows, coordinates, blocks in _batches(task, offset, out.device):
        scales, codes = section.part(payloads[:, shard], rows, quantizer)
        down, up, finite = powers_of_two(scales.t())
        total = None
        for i in range(ranks):
            values = quantizer.expand(codes[i], blocks, key, rank + i, world_size)
            values = values * (scales[i] * down)[:, None]
            if not shared:
                values = rotation.unrotate(values, key, blocks.offset, rank + i)
            total = values if total is None else total + values
        assert total is not None
        if shared:
            total = rotation.unrotate(total, key, blocks.offset)
        mean = total * (blocks.size ** (-rotation.rotations / 2) / ranks) * up[:, None]
        mean = torch.where(finite[:, None], mean, torch.nan)
        target = out[coordinates]
        assign_(target, mean.flatten()[: target.numel()])


class _Batch(NamedTuple):
    """Number of blocks per batch."""

    section: Section
    shard: int
    rows: slice  # of the section
    coordinates: slice  # of the tensor, without padding
    blocks: Blocks  # by their offset in the bucket


def _batches(task: Task, offset: int, device: torch.device) -> Iterator[_Batch]:
    for section in task.sections:
        size = section.blocks.size
        unit = task.quantizer.unit(size)
        step = max(1, _BATCH.get(device.type, _LARGE_BATCH) // size)
        if unit > 1:  # the steps of a unit are sequential, so process many units at once
            step = _UNITS * unit
        for shard in range(task.shards):
            end = (shard + 1) * task.numel
            for row in range(0, section.blocks.count, step):
                count = min(step, section.blocks.count - row)
                begin = shard * task.numel + section.blocks.offset + row * size
                coordinates = slice(begin, min(end, begin + count * size))
                blocks = Blocks(offset + begin, count, size)
                yield _Batch(section, shard, slice(row, row + count), coordinates, blocks)


def powers_of_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """2^(127 - e), 2^(e - 127) and whether all values are finite, for each row of x (B, n) float32.

    e is the biased exponent of the row's largest magnitude, clamped so that both are normal.
    """
    peak = (x.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(dim=1)
    exponent = (peak >> 23).clamp(1, 253)
    down, up = ((254 - exponent) << 23).view(torch.float32), (exponent << 23).view(torch.float32)
    return down, up, peak < 0x7F800000
