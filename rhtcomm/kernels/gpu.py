"""Launches the Triton kernels: one program per block, bit for bit the reference.

A block is read once, stays in registers through scaling, rotations and quantization, and is written
as packed codes; decoding reverses this. So each direction reads and writes a bucket once. The
number of warps per program is fixed for blocks of 4096, and measured on the device for other sizes.

Matching the bits of the reference (rhtcomm/kernels/__init__.py) rules out some compiler
optimizations: multiplications are not fused with additions (`enable_fp_fusion=False`, which also
reaches ptxas; without it Triton sets no fast-math flag), divisions and square roots must be
correctly rounded ones (`/` and `tl.sqrt` are not), and sums of floats go by pairs, since the layout
decides the order in which `tl.sum` adds more than two.

With TRITON_INTERPRET=1, set before Triton is imported, the same code runs on CPU tensors in NumPy.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton

from rhtcomm.floating_point import default_mode
from rhtcomm.kernels import reference
from rhtcomm.kernels.feedback import Feedback, Residual, decode_with_feedback, with_residual
from rhtcomm.kernels.task import Task
from rhtcomm.kernels.triton_kernels.blocks import decode_block, encode_block
from rhtcomm.kernels.tuning import Tuner
from rhtcomm.once import once
from rhtcomm.quantizers import Eden, Quantizer, QuicFL, VectorQuantizer
from rhtcomm.quantizers.base import tensor_of
from rhtcomm.randomness import Key, stratum
from rhtcomm.rotation import Blocks, RandomizedHadamard
from rhtcomm.wire import Section

__all__ = [
    "MAX_BLOCK",
    "QUANTIZERS",
    "coordinates_of",
    "decode",
    "encode",
    "interpreted",
    "launch",
    "launches",
    "on_device",
    "run",
    "shape_of",
    "too_large",
    "tuner",
    "warps_for",
    "words_of",
]

QUANTIZERS = (QuicFL, Eden, VectorQuantizer)
MAX_BLOCK = 1 << 14  # fits the registers of a program; larger blocks use the reference


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return not isinstance(encode_block, triton.JITFunction)


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
    if too_large(task):
        reference.encode(task, key, offset, rank, world_size, x, payloads, moments)
        return
    rotation, quantizer = task.rotation, task.quantizer
    assert isinstance(quantizer, QUANTIZERS)
    table, thresholds = _tables(quantizer, x.device, encoding=True)
    levels = quantizer.table if isinstance(quantizer, QuicFL) else None
    done = 0
    with torch.cuda.device_of(x):
        for section, shard, blocks in launches(task):
            coordinates = x[coordinates_of(task, shard, blocks)]
            scales, codes = section.views(payloads[shard])
            launch(
                encode_block,
                blocks.count,
                _shape(rotation, quantizer, blocks, coordinates.numel()),
                coordinates,
                scales,
                codes,
                None if moments is None else moments[done:],
                table,
                thresholds,
                coordinates.numel(),
                *words_of(key, offset + blocks.offset),
                rank if quantizer.rotation == "per_rank" else 0,
                stratum(rank, world_size),
                blocks.size ** (-rotation.rotations / 2),
                BIASED=getattr(quantizer, "biased", False),
                INVERSE_BOUND=levels.inverse_bound if levels else 0.0,
                NODES_PER_SIGMA=levels.nodes_per_sigma if levels else 0.0,
                MIDDLE=levels.middle if levels else 0,
            )
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
    if too_large(task):
        reference.decode(task, key, offset, rank, world_size, payloads, out)
        return
    rotation, quantizer, ranks = task.rotation, task.quantizer, len(payloads)
    assert isinstance(quantizer, QUANTIZERS)
    (table,) = _tables(quantizer, out.device, encoding=False)
    with torch.cuda.device_of(out):
        for section, shard, blocks in launches(task):
            target = out[coordinates_of(task, shard, blocks)]
            scales, codes = section.views(payloads[:, shard])
            launch(
                decode_block,
                blocks.count,
                _shape(rotation, quantizer, blocks, target.numel()),
                scales,
                codes,
                target,
                table,
                target.numel(),
                *words_of(key, offset + blocks.offset),
                rank,
                ranks,
                scales.stride(0),
                codes.stride(0),
                world_size,
                blocks.size ** (-rotation.rotations / 2) / ranks,
                SHARED_BITS=quantizer.table.shared_bits if isinstance(quantizer, QuicFL) else 0,
            )


def too_large(task: Task) -> bool:
    return any(section.blocks.size > MAX_BLOCK for section in task.sections)


def launches(task: Task) -> Iterator[tuple[Section, int, Blocks]]:
    """For each launch: the section, the shard, and the offset of its blocks in the tensor."""
    for section in task.sections:
        for shard in range(task.shards):
            yield section, shard, section.blocks.shifted(shard * task.numel)


def coordinates_of(task: Task, shard: int, blocks: Blocks) -> slice:
    """The range of a shard's blocks in the tensor, without the padding."""
    return slice(blocks.offset, min(blocks.stop, (shard + 1) * task.numel))


def words_of(key: Key, offset: int) -> tuple[int, ...]:
    """offset, seed, bucket, step and hop as kernel arguments: int32 with the same bits."""
    words = (
        offset // 16,
        key.seed & 0xFFFFFFFF,
        key.seed >> 32,
        key.bucket,
        key.step,
        16 * key.hop,
    )
    return tuple(word - ((word & 1 << 31) << 1) for word in words)


def _shape(
    rotation: RandomizedHadamard, quantizer: Quantizer, blocks: Blocks, numel: int
) -> dict[str, object]:
    """As `shape_of`, plus what the codes depend on."""
    return {
        "QUANTIZER": type(quantizer).__name__,
        "BITS": quantizer.bits,
        "GROUP": quantizer.group,
        "CAPACITY": quantizer.exact_capacity(blocks.size) if isinstance(quantizer, QuicFL) else 0,
        **shape_of(rotation, blocks, numel),
    }


def shape_of(rotation: RandomizedHadamard, blocks: Blocks, numel: int) -> dict[str, Any]:
    """Compile-time constants of block kernels; `numel` coordinates are not padding."""
    return {
        "ROTATIONS": rotation.rotations,
        "SIZE": blocks.size,
        "LOG_SIZE": blocks.size.bit_length() - 1,
        "WHOLE": numel == blocks.count * blocks.size,
        "num_warps": warps_for(blocks.size),
        "enable_fp_fusion": False,
    }


def warps_for(size: int) -> int:
    """Warps of a program: the largest number for which threads^2 <= size.

    Then a thread can hold a row of as many coordinates as there are threads, see
    `rhtcomm.kernels.triton_kernels.hadamard`. Blocks of 4096, for which this gives two warps, are
    not tuned at run time (`benchmarks/gpu.sh` compares); for other sizes tuning starts with it.
    """
    return max(1, (1 << (size.bit_length() - 1) // 2) // 32)


tuner = Tuner()
_one_at_a_time = Lock() if interpreted() else nullcontext()  # the interpreter has no threads


def launch(
    kernel: Any,
    programs: int,
    shape: dict[str, Any],
    x: torch.Tensor,
    *others: object,
    **constants: object,
) -> None:
    """Run a kernel on so many blocks, with as many warps as are fastest on the device of x.

    The default block, 4096, is not tuned, since that would slow down the first bucket.
    """

    def launched(warps: int) -> None:
        options = shape | constants | {"num_warps": warps, "WARPS": warps}
        run(kernel, (programs,), x, *others, **options)

    warps = shape["num_warps"]
    if shape["SIZE"] != 4096 and programs >= tuner.least:
        dtypes = tuple(t.dtype for t in (x, *others) if isinstance(t, torch.Tensor))
        what = (kernel, x.device, dtypes, *shape.items())
        warps = tuner.warps(what, warps, shape["SIZE"], x.device, launched)
    launched(warps)


def run(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    with _one_at_a_time:
        kernel[grid](*arguments, **options)


@once
def _tables(
    quantizer: QuicFL | Eden | VectorQuantizer, device: torch.device, encoding: bool
) -> tuple[torch.Tensor, ...]:
    """The first one is the lookup table of the codes, padded with zeros to a power of two."""
    tables: tuple[npt.NDArray[Any], ...]
    if isinstance(quantizer, QuicFL):
        # As uint32: the highest bit of a code is the sign bit.
        positions = quantizer.table.positions << (16 - quantizer.bits)
        tables = (positions, positions[:1]) if encoding else (quantizer.table.levels,)
    elif isinstance(quantizer, Eden):
        tables = (quantizer.table.centroids, quantizer.table.boundaries)
    else:
        tables = (quantizer.table.codewords, quantizer.table.half_norms)
    flat = tables[0].ravel()
    padded = np.pad(flat, (0, (1 << (flat.size - 1).bit_length()) - flat.size))
    tables = (padded, *tables[1 : 1 + encoding])
    return on_device(device, *tables)


def on_device(device: torch.device, *tables: npt.NDArray[Any]) -> tuple[torch.Tensor, ...]:
    """Copies of tables on a device, complete on return, so any stream may read them.

    For functions under `once`: cached tensors must not be inference tensors, and a copy must not
    wait for the current stream while `once` holds its lock.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.inference_mode(False), torch.cuda.stream(stream):
        return tuple(tensor_of(table, device) for table in tables)
