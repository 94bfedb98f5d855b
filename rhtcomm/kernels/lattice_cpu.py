"""The lattice's steps in C (native/lattice.h): the bits of rhtcomm/kernels/lattice.py."""

import ctypes
from functools import lru_cache

import torch

from rhtcomm.kernels.cpu import DTYPES, NO_MEMORY, Library, Plan
from rhtcomm.kernels.lattice import LatticeTask
from rhtcomm.memory import address_of
from rhtcomm.randomness import Key

__all__ = ["LatticeLibrary", "of", "plans_of"]


class LatticeLibrary:
    """The lattice's kernels of the library's instruction set."""

    def __init__(self, library: Library) -> None:
        address, number, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32
        call = (address, ctypes.c_int, ctypes.c_uint64, word, word, word, number)
        tensor, threads = (address, ctypes.c_int), ctypes.c_int
        self._rotate = library.function("lattice_rotate")
        self._rotate.argtypes = (*call, *tensor, address, address, address, threads)
        self._encode = library.function("lattice_encode")
        self._encode.argtypes = (
            *(*call, number, number),
            *(address, address, address, address, threads),
        )
        self._decode = library.function("lattice_decode")
        self._decode.argtypes = (*call, number, address, address, *tensor, threads)

    def rotate(
        self,
        task: LatticeTask,
        key: Key,
        offset: int,
        x: torch.Tensor,
        y: torch.Tensor,
        exponents: torch.Tensor,
        bounds: torch.Tensor,
    ) -> None:
        _check(
            self._rotate(
                *_call(task, key, offset),
                address_of(x),
                DTYPES.index(x.dtype),
                address_of(y),
                address_of(exponents),
                address_of(bounds),
                torch.get_num_threads(),
            )
        )

    def encode(
        self,
        task: LatticeTask,
        key: Key,
        offset: int,
        rank: int,
        y: torch.Tensor,
        exponents: torch.Tensor,
        bounds: torch.Tensor,
        words: torch.Tensor,
    ) -> None:
        _check(
            self._encode(
                *_call(task, key, offset),
                rank,
                task.world_size,
                address_of(y),
                address_of(exponents),
                address_of(bounds),
                address_of(words),
                torch.get_num_threads(),
            )
        )

    def decode(
        self,
        task: LatticeTask,
        key: Key,
        offset: int,
        words: torch.Tensor,
        bounds: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        _check(
            self._decode(
                *_call(task, key, offset),
                task.world_size,
                address_of(words),
                address_of(bounds),
                address_of(out),
                DTYPES.index(out.dtype),
                torch.get_num_threads(),
            )
        )


@lru_cache(maxsize=16)
def of(library: Library) -> LatticeLibrary:
    return LatticeLibrary(library)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError(NO_MEMORY)


def _call(task: LatticeTask, key: Key, offset: int) -> "tuple[ctypes.Array[Plan] | int, ...]":
    plans = plans_of(task)
    return plans, len(plans), key.seed, key.step, key.bucket, key.hop, offset


@lru_cache(maxsize=1024)
def plans_of(task: LatticeTask) -> "ctypes.Array[Plan]":
    lattice, plans, before, words = task.lattice, [], 0, 0
    for blocks in task.sections:
        m = lattice.words(blocks.size, task.world_size)
        plans.append(
            Plan(
                size=blocks.size,
                shards=1,
                numel=task.numel,
                offset=blocks.offset,
                blocks=blocks.count,
                unit=1,
                unit_bytes=4 * m,
                last_unit_bytes=4 * m,
                scales=4 * before,
                codes=4 * words,
                normalization=blocks.size**-lattice.rotations,
                rotations=lattice.rotations,
                bits=lattice.bits,
                middle=(2**lattice.bits - 1) * 32768,
                per_step=lattice.per_step,
            )
        )
        before, words = before + blocks.count, words + blocks.count * m
    return (Plan * len(plans))(*plans)
