"""Launches the Triton kernels of ECDQ, whose codes go unit by unit, bit for bit the reference.

Blocks are rotated and quantized one per program, as those of other quantizers, and leave a byte for
each coordinate, the column of the entropy code's table. A warp for each unit makes the bytes of the
payload from these. What does not fit is known on the device alone, and the host does not wait for
it: attempts with all factors are launched, and units that have been encoded take no part in them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rhtcomm.floating_point import default_mode
from rhtcomm.kernels import gpu, reference
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
from rhtcomm.quantizers.ecdq import FACTORS
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
    """

    section: Section
    rows: slice
    blocks: Blocks
    shard: int
    each: int

    @property
    def count(self) -> int:
        return self.blocks.count // self.each

    @property
    def numel(self) -> int:
        """Coordinates of a unit."""
        return self.each * self.blocks.size


def units_of(task: Task, quantizer: ECDQ) -> Iterator[Units]:
    for section, shard, blocks in gpu.launches(task):
        most = quantizer.unit(blocks.size)
        whole = blocks.count // most * most
        for rows, each in ((slice(0, whole), most), (slice(whole, blocks.count), None)):
            count = rows.stop - rows.start
            if count:
                part = Blocks(blocks.offset + rows.start * blocks.size, count, blocks.size)
                yield Units(section, rows, part, shard, each or count)


@default_mode()  # of what the host computes
def encode(
    task: Task,
    key: Key,
    offset: int,
    rank: int,
    world_size: int,
    x: torch.Tensor,
    payloads: torch.Tensor,
    moments: torch.Tensor | None = None,
) -> None:
    if gpu.too_large(task):
        reference.encode(task, key, offset, rank, world_size, x, payloads, moments)
        return
    rotation, quantizer, done = task.rotation, task.quantizer, 0
    assert isinstance(quantizer, ECDQ)
    table, device = quantizer.table, x.device
    entries, _ = _tables(quantizer, device)
    with torch.cuda.device_of(x):
        for units in units_of(task, quantizer):
            blocks, nbytes = units.blocks, quantizer.unit_bytes(units.numel)
            room = nbytes // 2 - 2 * LANES
            coordinates = x[blocks.offset : min(blocks.stop, (units.shard + 1) * task.numel)]
            scales, codes = units.section.part(payloads[units.shard], units.rows, quantizer)
            columns = torch.empty(blocks.count * blocks.size, dtype=torch.uint8, device=device)
            buffer = torch.empty(units.count * room, dtype=torch.int16, device=device)
            words = torch.full((units.count,), -1, dtype=torch.int32, device=device)
            for factor in (*FACTORS, 0.0):  # zero for the scales alone
                gpu.launch(
                    quantize_block,
                    blocks.count,
                    _shape(task, blocks) | {"WHOLE": _whole(blocks, coordinates)},
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
                    INVERSE_BOUND=table.inverse_bound,
                    PER_STEP=table.per_step,
                    QUARTER_STEP=table.quarter_step,
                    LARGEST=table.largest,
                    CLASS_BITS=table.classes.bit_length() - 1,
                    UNIT=units.each,
                )
                if factor:
                    unit = (nbytes, units.numel // LANES, room)
                    gpu.run(
                        encode_unit,
                        (units.count,),
                        *(columns, entries, codes, buffer, words, *unit),
                        PRECISION=table.precision,
                        num_warps=1,
                    )
            of_unit = (codes, buffer, words, nbytes, room)
            gpu.run(finish_unit, (units.count,), *of_unit, num_warps=1)
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
) -> None:
    if gpu.too_large(task):
        reference.decode(task, key, offset, rank, world_size, payloads, out)
        return
    quantizer, ranks, device = task.quantizer, len(payloads), out.device
    assert isinstance(quantizer, ECDQ)
    table = quantizer.table
    _, slots = _tables(quantizer, device)
    with torch.cuda.device_of(out):
        for units in units_of(task, quantizer):
            blocks, nbytes = units.blocks, quantizer.unit_bytes(units.numel)
            target = out[blocks.offset : min(blocks.stop, (units.shard + 1) * task.numel)]
            scales, codes = units.section.part(payloads[:, units.shard], units.rows, quantizer)
            numel, shape = blocks.count * blocks.size, _shape(task, blocks)
            dithers = torch.empty(numel, dtype=torch.uint8, device=device)
            columns = torch.empty(ranks, numel, dtype=torch.uint8, device=device)
            words = gpu.words_of(key, offset + blocks.offset)
            gpu.run(
                dither_block,
                (blocks.count,),
                *(dithers, *words),
                SIZE=blocks.size,
                WARPS=shape["num_warps"],
                num_warps=shape["num_warps"],
            )
            gpu.run(
                decode_unit,
                (units.count, ranks),
                *(codes, slots, dithers, columns, rank, world_size, codes.stride(0), numel),
                *(nbytes, units.numel // LANES, nbytes // 2 - 2 * LANES),
                PRECISION=table.precision,
                CLASS_BITS=table.classes.bit_length() - 1,
                num_warps=1,
            )
            gpu.launch(
                mean_block,
                blocks.count,
                shape | {"WHOLE": _whole(blocks, target)},
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


def _whole(blocks: Blocks, x: torch.Tensor) -> bool:
    return x.numel() == blocks.count * blocks.size


def _shape(task: Task, blocks: Blocks) -> dict[str, Any]:
    """What kernels of blocks are compiled for."""
    return {
        "ROTATIONS": task.rotation.rotations,
        "SIZE": blocks.size,
        "LOG_SIZE": blocks.size.bit_length() - 1,
        "num_warps": gpu.warps_for(blocks.size),
        "enable_fp_fusion": False,
    }


@once
def _tables(quantizer: ECDQ, device: torch.device) -> tuple[torch.Tensor, ...]:
    table = quantizer.table
    return gpu.on_device(device, table.entries.view(np.int32).ravel(), table.slots.view(np.int32))
