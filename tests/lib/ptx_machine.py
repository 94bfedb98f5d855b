"""Instructions of PTX that move values between registers, memory and threads, and branches."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from ptx_arithmetic import DTYPES, Fault, width_of

if TYPE_CHECKING:
    from ptx import Instruction, Program

__all__ = ["MACHINE"]

Array = npt.NDArray[Any]
WARP = 32


def names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def move(program: "Program", one: "Instruction") -> None:
    """Also the halves of a register, and a register from its halves; the low one first."""
    to, of = one.operands
    if to.startswith("{"):
        parts = names(to)
        values = program.read(of, one.type).view(np.uint8).reshape(len(program.active), -1)
        for part, value in zip(parts, np.split(values, len(parts), axis=1), strict=True):
            program.write(part, np.ascontiguousarray(value).view(f"u{value.shape[1]}").ravel())
    elif of.startswith("{"):
        parts = names(of)
        type = f"b{width_of(one.type) // len(parts)}"
        values = np.stack([program.read(part, type) for part in parts], axis=1)
        program.write(to, values.view(DTYPES[one.type]).ravel())
    else:
        program.write(to, program.read(of, one.type))


def permute(program: "Program", one: "Instruction") -> None:
    """Each byte of the result is one of the eight of two words."""
    low, high, choice = (program.read(operand, "b32") for operand in one.operands[1:])
    octets = np.stack([low, high], axis=1).view(np.uint8)
    nibbles = choice[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    if (nibbles > 7).any():
        raise Fault("the emulator does not know signs of bytes")
    program.write(
        one.operands[0],
        np.take_along_axis(octets, nibbles.astype(np.int64), 1).view(np.uint32).ravel(),
    )


def branch(program: "Program", one: "Instruction") -> None:
    program.next[program.active] = program.kernel.labels[one.operands[0]]


def end(program: "Program", one: "Instruction") -> None:
    program.next[program.active] = len(program.kernel.instructions)


def barrier(program: "Program", one: "Instruction") -> None:
    if len(program.active) != program.threads:
        raise Fault("not all threads come to the barrier")
    program.shared.barrier()


def barrier_of_warp(program: "Program", one: "Instruction") -> None:
    program.whole_warps()


def load_parameter(program: "Program", one: "Instruction") -> None:
    index = int(one.operands[1].strip("[]").rsplit("_", 1)[1])
    dtype = DTYPES[one.type]
    bits = program.arguments[index] & ((1 << 8 * dtype.itemsize) - 1)
    values = np.full(len(program.active), bits, f"u{dtype.itemsize}").view(dtype)
    program.write(one.operands[0], values, widen=True)


def load(program: "Program", one: "Instruction") -> None:
    registers, space = names(one.operands[0]), "shared" if one.has("shared") else "global"
    nbytes = len(registers) * width_of(one.type) // 8
    addresses = program.addresses(one.operands[1], space, nbytes)
    memory = program.shared if space == "shared" else program.memory
    values = memory.load(addresses, nbytes, program.active // WARP)
    for register, value in zip(registers, values.view(DTYPES[one.type]).T, strict=True):
        program.write(register, np.ascontiguousarray(value), widen=True)


def store(program: "Program", one: "Instruction") -> None:
    registers, space = names(one.operands[1]), "shared" if one.has("shared") else "global"
    nbytes = len(registers) * width_of(one.type) // 8
    addresses = program.addresses(one.operands[0], space, nbytes)
    memory = program.shared if space == "shared" else program.memory
    values = np.stack([program.read(name, one.type, narrow=True) for name in registers], axis=1)
    memory.store(addresses, values.view(np.uint8), program.active // WARP)


def matrices(program: "Program", one: "Instruction") -> None:
    """`ldmatrix` and `stmatrix`: of each 8 x 8 matrix of 16 bits, a thread has two neighbours.

    Threads 8 i to 8 i + 7 of a warp have the addresses of the rows of matrix i.
    """
    warps, loads = program.whole_warps(), one.name.startswith("ldmatrix")
    registers, address = one.operands if loads else one.operands[::-1]
    many = names(registers)
    each = program.addresses(address, "shared", 16).reshape(len(warps), WARP)
    rows = each[:, : 8 * len(many)].ravel()
    of_rows = np.repeat(warps, 8 * len(many))
    shape = (len(warps), len(many), 8, 8)
    if loads:
        found = program.shared.load(rows, 16, of_rows).view(np.uint16).reshape(shape)
        found = np.ascontiguousarray(found.swapaxes(2, 3) if one.has("trans") else found)
        words = found.view(np.uint32).reshape(len(warps), len(many), WARP)
        for index, register in enumerate(many):
            program.write(register, words[:, index].ravel())
    else:
        words = [program.read(name, "b32").reshape(len(warps), WARP) for name in many]
        found = np.stack(words, axis=1).view(np.uint16).reshape(shape)
        found = np.ascontiguousarray(found.swapaxes(2, 3) if one.has("trans") else found)
        program.shared.store(rows, found.view(np.uint8).reshape(len(rows), 16), of_rows)


def shuffle(program: "Program", one: "Instruction") -> None:
    """Reads the register of another lane, or the own one where that is out of the segment."""
    warps, mode = program.whole_warps(), one.name.split(".")[2]
    to, of = one.operands[:2]
    value, by, limits, mask = (
        program.read(operand, "s32").reshape(len(warps), WARP).astype(np.int64)
        for operand in (of, *one.operands[2:])
    )
    if (mask != -1).any():
        raise Fault("the emulator does not know shuffles of some lanes")
    lane, segment, clamp = np.arange(WARP), limits >> 8 & 31, limits & 31
    highest = lane & segment | clamp & ~segment
    lowest = lane & segment
    other = {
        "bfly": lane ^ by,
        "up": lane - by,
        "down": lane + by,
        "idx": lowest | by & ~segment & 31,
    }[mode]
    inside = other >= highest if mode == "up" else other <= highest
    found = np.take_along_axis(value, np.where(inside, other, lane), axis=1)
    target, _, predicate = to.partition("|")
    program.write(target, found.astype(np.int32).ravel())
    if predicate:
        program.write(predicate, inside.ravel())


def reduce(program: "Program", one: "Instruction") -> None:
    warps, function = program.whole_warps(), one.name.split(".")[2]
    if (program.read(one.operands[2], "s32") != -1).any():
        raise Fault("the emulator does not know reductions of some lanes")
    values = program.read(one.operands[1], one.type).reshape(len(warps), WARP)
    result = {"max": np.max, "min": np.min, "add": np.sum}[function](values, axis=1)
    program.write(one.operands[0], np.repeat(result.astype(values.dtype), WARP))


Run = Callable[["Program", "Instruction"], None]


def machine() -> dict[str, Run]:
    found: dict[str, Run] = {
        "bra": branch,
        "bra.uni": branch,
        "ret": end,
        "bar.sync": barrier,
        "bar.warp.sync": barrier_of_warp,
        "prmt.b32": permute,
        "mov.pred": move,
    }
    for type in [f"{kind}{width}" for kind in "bus" for width in (8, 16, 32, 64)] + ["f32"]:
        found |= {f"mov.{type}": move, f"ld.param.{type}": load_parameter}
        for space in ("global", "shared"):
            for vector in ("", ".v2", ".v4"):
                found |= {
                    f"ld.{space}{vector}.{type}": load,
                    f"st.{space}{vector}.{type}": store,
                }
    for mode in ("bfly", "up", "down", "idx"):
        found[f"shfl.sync.{mode}.b32"] = shuffle
    for name in ("max.s32", "max.u32", "min.s32", "min.u32", "add.s32", "add.u32"):
        found[f"redux.sync.{name}"] = reduce
    for name in ("ldmatrix", "stmatrix"):
        for count in ("x1", "x2", "x4"):
            for trans in ("", ".trans"):
                found[f"{name}.sync.aligned.m8n8.{count}{trans}.shared.b16"] = matrices
    return found


MACHINE = machine()
