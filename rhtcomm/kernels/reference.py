"""What the kernels compute, in plain torch: the oracle of all others, on any device.

The arithmetic is part of the wire contract, so that all ranks end with the same bits whatever
kernels they run:

* A block is multiplied by the power of two 2^(127 - e), e the biased exponent of its largest
  magnitude clamped to 1 .. 253, so that no finite input overflows or loses bits on the way.
* Decoding does the same with the largest scale of the ranks, multiplies values by scales, adds them
  in rank order, undoes the rotation, and then multiplies by d^(-k/2) / K and by 2^(e - 127).
"""

from collections.abc import Iterator

import torch

from rhtcomm.bitpack import pack, unpack
from rhtcomm.floating_point import assign_, default_mode
from rhtcomm.kernels.task import Task
from rhtcomm.quantizers import QuicFL
from rhtcomm.rotation import Blocks, block_moments

__all__ = ["decode", "encode"]

# Blocks are worked on in pieces of about this many coordinates: such that they stay in a core's
# cache, or on other devices such that a launch has enough to do.
_PIECE = {"cpu": 1 << 17}
_LARGE_PIECE = 1 << 24


@default_mode(pool=True)
def encode(
    task: Task,
    x: torch.Tensor,
    payloads: torch.Tensor,
    moments: torch.Tensor | None = None,
) -> None:
    rotation, quantizer, key, section, _, rank, world_size = task
    blocks = task.blocks(len(payloads))
    scales, codes = section.views(payloads)
    x = section.coordinates(x, len(payloads))
    for run, rows, piece in _pieces(blocks, len(payloads), x.device):
        start = piece.start - blocks.start
        part = piece.rows(x[start : start + piece.count * piece.size].float())
        down, up, finite = _powers_of_two(part)
        part = torch.where(finite[:, None], part * down[:, None], 0.0)
        if moments is not None:
            moments.view(*scales.shape, -1)[run, rows] = block_moments(part, up)
        signs_of = rank if quantizer.rotation == "one_a_rank" else 0
        y = rotation.rotate(part, key, piece.start, signs_of)
        drawn, scale_of_y = quantizer.encode(y, key, piece.start, rank, world_size)
        scale = scale_of_y * piece.size ** (-rotation.rotations / 2) * up
        scale = scale.clamp(max=torch.finfo(torch.float32).max)  # Eden's can exceed it
        scales[run, rows] = torch.where(finite, scale, torch.nan)
        packed = pack(drawn, quantizer.bits * quantizer.group)
        if isinstance(quantizer, QuicFL) and quantizer.exact_fraction:
            exact = quantizer.encode_exact(y, scale_of_y, key, piece.start, rank, world_size)
            packed = torch.cat([packed, exact], dim=1)
        codes[run, rows] = packed


@default_mode(pool=True)
def decode(task: Task, payloads: torch.Tensor, out: torch.Tensor) -> None:
    rotation, quantizer, key, section, _, first_rank, world_size = task
    ranks, parts, _ = payloads.shape
    blocks = task.blocks(parts)
    scales, codes = section.views(payloads)
    out = section.coordinates(out, parts)
    shared = quantizer.rotation == "shared"
    for run, rows, piece in _pieces(blocks, parts, scales.device):
        down, up, finite = _powers_of_two(scales[:, run, rows].t())
        total = None
        for row in range(ranks):
            rank = first_rank + row
            packed = codes[row, run, rows]
            width, count = quantizer.bits * quantizer.group, piece.size // quantizer.group
            drawn = unpack(packed, width, count)
            values = quantizer.decode(drawn, key, piece.start, rank, world_size)
            if isinstance(quantizer, QuicFL) and quantizer.exact_fraction:
                exact = packed[:, piece.size * quantizer.bits // 8 :]
                quantizer.decode_exact(values, exact)
            values = values * (scales[row, run, rows] * down)[:, None]
            if not shared:
                values = rotation.unrotate(values, key, piece.start, rank)
            total = values if total is None else total + values
        assert total is not None
        if shared:
            total = rotation.unrotate(total, key, piece.start)
        mean = total * (piece.size ** (-rotation.rotations / 2) / ranks) * up[:, None]
        mean = torch.where(finite[:, None], mean, torch.nan)
        target = out[piece.start - blocks.start :][: mean.numel()]
        assign_(target, mean.flatten()[: target.numel()])


def _pieces(blocks: Blocks, runs: int, device: torch.device) -> Iterator[tuple[int, slice, Blocks]]:
    """Blocks to work on at once: which run they belong to, and where they are in it."""
    step = max(1, _PIECE.get(device.type, _LARGE_PIECE) // blocks.size)
    for number, run in enumerate(blocks.split(runs)):
        for row in range(0, run.count, step):
            count = min(step, run.count - row)
            piece = Blocks(run.start + row * run.size, count, run.size)
            yield number, slice(row, row + count), piece


def _powers_of_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """2^(127 - e), 2^(e - 127) and whether all is finite, of each row of x (B, n) float32.

    e is the biased exponent of the row's largest magnitude, clamped so that both are normal.
    """
    peak = (x.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(dim=1)
    exponent = (peak >> 23).clamp(1, 253)
    down, up = ((254 - exponent) << 23).view(torch.float32), (exponent << 23).view(torch.float32)
    return down, up, peak < 0x7F800000
