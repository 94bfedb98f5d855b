"""Launches the Triton kernels of ECDQ, which codes unit by unit, bit for bit the reference.

One program per block rotates and quantizes, as for other quantizers, and writes a byte per
coordinate: its column in the entropy code's table. Then one warp per unit makes the bytes of the
payload. Only the device knows which units do not fit, and the host does not wait for it: attempts
with all factors are launched, and units that are already encoded skip them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rhtcomm.floating_point import default_mode
from rhtcomm.kernels import gpu, reference
from rhtcomm.kernels.feedback import Feedback, Residual, decode_with_feedback, with_residual
from rhtcomm.kernels.task import Task
from rhtcomm.kernels.triton_kernels.ecdq import (
    decode_unit,
    dither_block,
    encode_unit,
    finish_unit,
    mean_block,
    quantize_block,
)
from rhtcomm.once import once
from rhtcomm.quantizers import ECDQ
from rhtcomm.quantizers.ecdq import FACTORS, Table
from rhtcomm.randomness import Key, stratum
from rhtcomm.rans import LANES
from rhtcomm.rotation import Blocks
from rhtcomm.wire import Section

__all__ = ["decode", "encode"]


@dataclass(frozen=True)
class Units:
    """Units of one length, with the blocks of one launch.

    Args:
        rows: of the section.
        blocks: by their offset in the tensor.
        shard: that they belong to.
        each: blocks of a unit.
        nbytes: of a unit's codes.
    """

    section: Section
    rows: slice
    blocks: Blocks
    shard: int
    each: int
    nbytes: int

    @property
    def count(self) -> int:
        return self.blocks.count // self.each

    @property
    def steps(self) -> int:
        """Steps of the coder for a unit."""
        return self.each * self.blocks.size // LANES

    @property
    def room(self) -> int:
        """Words of a unit, after the states of its lanes."""
        return self.nbytes // 2 - 2 * LANES


def units_of(task: Task, quantizer: ECDQ) -> Iterator[Units]:
    for section, shard, blocks in gpu.launches(task):
        for rows, each in quantizer.units(blocks.count, blocks.size):
            offset = blocks.offset + rows.start * blocks.size
            part = Blocks(offset, rows.stop - rows.start, blocks.size)
            nbytes = quantizer.unit_bytes(each * blocks.size)
            yield Units(section, rows, part, shard, each, nbytes)


@default_mode()  # for tables that the host computes
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
    if gpu.too_large(task):
        reference.encode(task, key, offset, rank, world_size, x, payloads, moments)
        return
    rotation, quantizer, done = task.rotation, task.quantizer, 0
    assert isinstance(quantizer, ECDQ)
    table, device = quantizer.table, x.device
    entries, _ = _tables(quantizer, device)
    grid = _grid(table)
    with torch.cuda.device_of(x):
        for units in units_of(task, quantizer):
            blocks = units.blocks
            coordinates = x[gpu.coordinates_of(task, units.shard, blocks)]
            scales, codes = units.section.part(payloads[units.shard], units.rows, quantizer)
            shape = gpu.shape_of(rotation, blocks, coordinates.numel())
            columns = torch.empty(blocks.count * blocks.size, dtype=torch.uint8, device=device)
            buffer = torch.empty(units.count * units.room, dtype=torch.int16, device=device)
            words = torch.full((units.count,), -1, dtype=torch.int32, device=device)
            for factor in (*FACTORS, 0.0):  # zero for the scales alone
                gpu.launch(
                    quantize_block,
                    blocks.count,
                    shape,
                    coordinates,
                    scales,
                    columns,
                    words,
                    None if moments is None else moments[done:],
                    coordinates.numel(),
                    *gpu.words_of(key, offset + blocks.offset),
                    stratum(rank, world_size),
                    factor,
                    blocks.size ** (-rotation.rotations / 2),
                    UNIT=units.each,
                    **grid,
                )
                if factor:
                    gpu.run(
                        encode_unit,
                        (units.count,),
                        *(columns, entries, codes, buffer, words),
                        *(units.nbytes, units.steps, units.room),
                        PRECISION=table.precision,
                        num_warps=1,
                    )
            moved = (codes, buffer, words, units.nbytes, units.room)
            gpu.run(finish_unit, (units.count,), *moved, num_warps=1)
            done += blocks.count


@default_mode()
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
    if gpu.too_large(task):
        reference.decode(task, key, offset, rank, world_size, payloads, out)
        return
    quantizer, ranks, device = task.quantizer, len(payloads), out.device
    assert isinstance(quantizer, ECDQ)
    table = quantizer.table
    _, slots = _tables(quantizer, device)
    with torch.cuda.device_of(out):
        for units in units_of(task, quantizer):
            blocks = units.blocks
            target = out[gpu.coordinates_of(task, units.shard, blocks)]
            scales, codes = units.section.part(payloads[:, units.shard], units.rows, quantizer)
            shape = gpu.shape_of(task.rotation, blocks, target.numel())
            numel = blocks.count * blocks.size
            words = gpu.words_of(key, offset + blocks.offset)
            dithers = _dithers(blocks, words, device)
            columns = torch.empty(ranks, numel, dtype=torch.uint8, device=device)
            gpu.run(
                decode_unit,
                (units.count, ranks),
                *(codes, slots, dithers, columns, rank, world_size, codes.stride(0), numel),
                *(units.nbytes, units.steps, units.room),
                PRECISION=table.precision,
                CLASS_BITS=table.class_bits,
                num_warps=1,
            )
            gpu.launch(
                mean_block,
                blocks.count,
                shape,
                scales,
                columns,
                dithers,
                target,
                target.numel(),
                *words,
                rank,
                ranks,
                scales.stride(0),
                numel,
                world_size,
                blocks.size ** (-task.rotation.rotations / 2) / ranks,
                LARGEST=table.largest,
            )


def _dithers(blocks: Blocks, words: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The dither bytes of blocks that the ranks share, one per coordinate."""
    dithers = torch.empty(blocks.count * blocks.size, dtype=torch.uint8, device=device)
    warps = gpu.warps_for(blocks.size)
    shape = {"SIZE": blocks.size, "WARPS": warps, "num_warps": warps}
    gpu.run(dither_block, (blocks.count,), dithers, *words, **shape)
    return dithers


def _grid(table: Table) -> dict[str, Any]:
    """The constants of the quantization."""
    return {
        "INVERSE_BOUND": table.inverse_bound,
        "PER_STEP": table.per_step,
        "QUARTER_STEP": table.quarter_step,
        "LARGEST": table.largest,
        "CLASS_BITS": table.class_bits,
    }


@once
def _tables(quantizer: ECDQ, device: torch.device) -> tuple[torch.Tensor, ...]:
    table = quantizer.table
    return gpu.on_device(device, table.entries.view(np.int32).ravel(), table.slots.view(np.int32))
