"""Launches the lattice's Triton kernels: the bits of rhtcomm/kernels/lattice.py."""

import torch

from rhtcomm.floating_point import default_mode
from rhtcomm.kernels import gpu, lattice
from rhtcomm.kernels.lattice import Batch, LatticeTask, batches, in_codes
from rhtcomm.kernels.triton_kernels.lattice import (
    mean_block,
    pack_block,
    quantize_block,
    rotate_block,
)
from rhtcomm.randomness import Key

__all__ = ["decode", "encode", "rotate"]


def rotate(
    task: LatticeTask,
    key: Key,
    offset: int,
    x: torch.Tensor,
    y: torch.Tensor,
    exponents: torch.Tensor,
    bounds: torch.Tensor,
) -> None:
    if _too_large(task):
        lattice.rotate(task, key, offset, x, y, exponents, bounds)
        return
    with torch.cuda.device_of(x):
        for blocks, rows, _ in _sections(task):
            coordinates = x[blocks.offset : blocks.stop]
            gpu.launch(
                rotate_block,
                blocks.count,
                gpu.shape_of(task.lattice.rotation, blocks, coordinates.numel()),
                coordinates,
                y[blocks.offset : blocks.stop],
                exponents[rows],
                bounds[rows],
                coordinates.numel(),
                *gpu.words_of(key, offset + blocks.offset),
            )


def encode(
    task: LatticeTask,
    key: Key,
    offset: int,
    rank: int,
    y: torch.Tensor,
    exponents: torch.Tensor,
    bounds: torch.Tensor,
    words: torch.Tensor,
) -> None:
    if _too_large(task):
        lattice.encode(task, key, offset, rank, y, exponents, bounds, words)
        return
    codes = torch.empty(task.padded, dtype=torch.uint8, device=y.device)
    with torch.cuda.device_of(y):
        for blocks, rows, where in _sections(task):
            part = slice(blocks.offset, blocks.stop)
            gpu.launch(
                quantize_block,
                blocks.count,
                gpu.shape_of(task.lattice.rotation, blocks, blocks.count * blocks.size),
                y[part],
                exponents[rows],
                bounds[rows],
                codes[part],
                *gpu.words_of(key, offset + blocks.offset),
                65536 * rank // task.world_size,
                BITS=task.lattice.bits,
                PER_STEP=task.lattice.per_step,
            )
            lanes = _lanes(task, blocks.size)
            gpu.run(pack_block, (blocks.count,), codes[part], words[where], **lanes)


@default_mode()  # for numbers that the host computes
def decode(
    task: LatticeTask,
    key: Key,
    offset: int,
    words: torch.Tensor,
    bounds: torch.Tensor,
    out: torch.Tensor,
) -> None:
    if _too_large(task):
        lattice.decode(task, key, offset, words, bounds, out)
        return
    with torch.cuda.device_of(out):
        for blocks, rows, where in _sections(task):
            target = out[blocks.offset : blocks.stop]
            shape = gpu.shape_of(task.lattice.rotation, blocks, target.numel())
            gpu.launch(
                mean_block,
                blocks.count,
                shape | _lanes(task, blocks.size),
                words[where],
                bounds[rows],
                target,
                target.numel(),
                *gpu.words_of(key, offset + blocks.offset),
                task.world_size,
                *in_codes(task),
                float(blocks.size) ** -task.lattice.rotations,
            )


def _too_large(task: LatticeTask) -> bool:
    return any(section.size > gpu.MAX_BLOCK for section in task.sections)


def _sections(task: LatticeTask) -> list[Batch]:
    return list(batches(task, task.padded))


def _lanes(task: LatticeTask, size: int) -> dict[str, int]:
    lattice, n = task.lattice, task.world_size
    return {"M": lattice.words(size, n), "WIDTH": lattice.lane_bits(n), "SIZE": size}
