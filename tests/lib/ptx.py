"""Runs the PTX of Triton kernels without a GPU, for tests of what is compiled for one.

All threads of a program run in lockstep: those that are behind, by their next instruction, go
first, until a branch or the target of one. A `Fault` names the instruction that does what no GPU
does reliably (races, bounds, alignment, what was never written), and what this emulator does not
know. Of arithmetic it knows what rounds to nearest, or to zero where it makes integers.

Warps are faithful (shuffles, reductions, matrices in shared memory); what one program writes while
another reads it is not noticed, since programs run one after the other.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from ptx_arithmetic import DTYPES, OPERATIONS, Fault, width_of
from ptx_memory import Global, Shared

__all__ = ["Fault", "Instruction", "Kernel", "Program", "parse"]

Array = npt.NDArray[Any]
WARP = 32
MOST_STEPS = 100_000  # of stretches of instructions, behind which a program is taken for endless


@dataclass(frozen=True)
class Instruction:
    name: str  # with all modifiers and types
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None  # the predicate, and what it has to be
    line: int
    text: str

    @property
    def type(self) -> str:
        return self.name.rsplit(".", 1)[1]

    def has(self, modifier: str) -> bool:
        return modifier in self.name.split(".")


@dataclass
class Kernel:
    """The instructions of an entry.

    Args:
        parameters: their types.
        registers: types of the classes of registers, such as {"%rd": "b64"}.
        labels: by the index of the instruction that follows.
    """

    parameters: list[str] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)

    def stretches(self) -> dict[int, int]:
        """{begin: end} of instructions that all threads which begin them also end together."""
        jumps = {"bra", "bra.uni", "ret"}
        ends = {i + 1 for i, one in enumerate(self.instructions) if one.name in jumps}
        marks = sorted({0, len(self.instructions), *ends, *self.labels.values()})
        return dict(pairwise(marks))


def parse(ptx: str) -> Kernel:
    kernel, entered = Kernel(), False
    for number, line in enumerate(ptx.splitlines(), 1):
        line = line.split("//")[0].strip()
        entered = entered or ".entry" in line
        if found := re.match(r"\.param\s+\.(\w+)", line):
            kernel.parameters.append(found[1])
        elif found := re.match(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<", line):
            kernel.registers[found[2]] = found[1]
        elif found := re.match(r"(\$\w+):", line):
            kernel.labels[found[1]] = len(kernel.instructions)
        elif entered and line.startswith(".section"):
            break
        elif entered and line.endswith(";") and not line.startswith("."):
            kernel.instructions += [
                instruction(text.strip(), number) for text in line.split(";") if text.strip()
            ]
    return kernel


def instruction(text: str, line: int) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
    if found is None:
        raise Fault(f"line {line} is no instruction: {text}")
    negated, predicate, name, operands = found.groups()
    split = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[\s])+", operands)
    guard = (predicate, not negated) if predicate else None
    return Instruction(name.replace("::cta", ""), tuple(split), guard, line, text)


class Program:
    """A program of a grid: the registers of its threads, and its memory.

    Args:
        place: of the program in the grid, x and y.
        arguments: bits of the kernel's parameters.
    """

    def __init__(
        self,
        kernel: Kernel,
        warps: int,
        place: tuple[int, int],
        arguments: list[int],
        memory: Global,
        shared: int,
    ) -> None:
        self.kernel, self.arguments, self.threads = kernel, arguments, warps * WARP
        self.random = np.random.default_rng(place)
        self.memory, self.shared = memory, Shared(shared, self.random)
        self.registers: dict[str, Array] = {}
        self.symbols = {
            "%tid.x": np.arange(self.threads, dtype=np.uint32),
            "%ntid.x": np.uint32(self.threads),
            "%ctaid.x": np.uint32(place[0]),
            "%ctaid.y": np.uint32(place[1]),
            "%laneid": np.arange(self.threads, dtype=np.uint32) % np.uint32(WARP),
            "global_smem": np.uint32(0),
        }
        self.next = np.zeros(self.threads, np.int64)  # instruction of each thread
        self.active = np.arange(self.threads)  # threads that take part in the instruction

    def run(self) -> None:
        stretches, done = self.kernel.stretches(), 0
        with np.errstate(all="ignore"):
            while (begin := int(self.next.min())) < len(self.kernel.instructions):
                together, end = np.flatnonzero(self.next == begin), stretches[begin]
                self.next[together] = end
                for one in self.kernel.instructions[begin:end]:
                    self.step(one, together)
                done += 1
                if done > MOST_STEPS:
                    raise Fault("the program does not end")

    def step(self, one: Instruction, threads: Array) -> None:
        try:
            self.active = threads
            if one.guard:
                predicate, wanted = one.guard
                self.active = threads[self.read(predicate, "pred") == wanted]
            if not len(self.active):
                return
            if one.name in OPERATIONS:
                operation = OPERATIONS[one.name]
                operands = zip(one.operands[1:], operation.operands, strict=True)
                values = [self.read(operand, type) for operand, type in operands]
                self.write(one.operands[0], operation.function(*values))
            elif one.name in MACHINE:
                MACHINE[one.name](self, one)
            else:
                raise Fault("the emulator does not know this instruction")
        except Fault as fault:
            raise Fault(f"line {one.line}: {one.text}: {fault}") from None

    def read(self, operand: str, type: str, narrow: bool = False) -> Array:
        """Of the active threads. A register that was never written has random bits.

        Args:
            narrow: the low bits of a register that may be wider.
        """
        dtype, count = DTYPES[type], len(self.active)
        if operand in self.symbols:
            values = np.broadcast_to(self.symbols[operand], self.threads)[self.active]
        elif operand.startswith("%"):
            values = self._register(operand)[self.active]
        elif operand.startswith("0f"):
            values = np.full(count, int(operand[2:], 16), np.uint32)
        elif type == "pred":
            values = np.full(count, int(operand) != 0)
        else:
            bits = int(operand.rstrip("U"), 0) & ((1 << width_of(type)) - 1)
            values = np.full(count, bits, f"u{dtype.itemsize}")
        if narrow or (dtype.itemsize == 1 and values.dtype != np.bool_):  # has wider registers
            values = values.astype(f"u{dtype.itemsize}")
        if values.dtype.itemsize != dtype.itemsize:
            raise Fault(f"{operand} does not have the width of {type}")
        return values.view(dtype)

    def write(self, register: str, values: Array, widen: bool = False) -> None:
        """To the active threads' register, which may be wider."""
        if register == "_":
            return
        to = self._register(register)
        widen = widen or (values.dtype.itemsize == 1 and values.dtype != np.bool_)
        if widen and values.dtype.itemsize < to.dtype.itemsize:
            values = values.astype(f"{values.dtype.kind}{to.dtype.itemsize}")
        if values.dtype.itemsize != to.dtype.itemsize:
            raise Fault(f"{register} does not have the width of the result")
        to[self.active] = values.view(to.dtype)

    def _register(self, name: str) -> Array:
        if name not in self.registers:
            type = self.kernel.registers[name.rstrip("0123456789")]
            bits = self.random.bytes(self.threads * DTYPES[type].itemsize)
            values = np.frombuffer(bits, np.uint8 if type == "pred" else DTYPES[type])
            self.registers[name] = values & 1 != 0 if type == "pred" else values.copy()
        return self.registers[name]

    def addresses(self, operand: str, space: str, alignment: int) -> Array:
        found = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise Fault(f"{operand} is no address")
        base = self.read(found[1], "b32" if space == "shared" else "b64")
        addresses = base.astype(np.int64) + int(found[2] or 0)
        if (addresses % alignment).any():
            raise Fault(f"an address that is no multiple of {alignment}")
        return addresses

    def whole_warps(self) -> Array:
        """The warps of the active threads, which have to be all of a warp."""
        warps, counts = np.unique(self.active // WARP, return_counts=True)
        if (counts != WARP).any():
            raise Fault("only a part of a warp takes part")
        return warps


def names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def move(program: Program, one: Instruction) -> None:
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


def permute(program: Program, one: Instruction) -> None:
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


def branch(program: Program, one: Instruction) -> None:
    program.next[program.active] = program.kernel.labels[one.operands[0]]


def end(program: Program, one: Instruction) -> None:
    program.next[program.active] = len(program.kernel.instructions)


def barrier(program: Program, one: Instruction) -> None:
    if len(program.active) != program.threads:
        raise Fault("not all threads come to the barrier")
    program.shared.barrier()


def barrier_of_warp(program: Program, one: Instruction) -> None:
    program.whole_warps()


def load_parameter(program: Program, one: Instruction) -> None:
    index = int(one.operands[1].strip("[]").rsplit("_", 1)[1])
    dtype = DTYPES[one.type]
    bits = program.arguments[index] & ((1 << 8 * dtype.itemsize) - 1)
    values = np.full(len(program.active), bits, f"u{dtype.itemsize}").view(dtype)
    program.write(one.operands[0], values, widen=True)


def load(program: Program, one: Instruction) -> None:
    registers, space = names(one.operands[0]), "shared" if one.has("shared") else "global"
    nbytes = len(registers) * width_of(one.type) // 8
    addresses = program.addresses(one.operands[1], space, nbytes)
    memory = program.shared if space == "shared" else program.memory
    values = memory.load(addresses, nbytes, program.active // WARP)
    for register, value in zip(registers, values.view(DTYPES[one.type]).T, strict=True):
        program.write(register, np.ascontiguousarray(value), widen=True)


def store(program: Program, one: Instruction) -> None:
    registers, space = names(one.operands[1]), "shared" if one.has("shared") else "global"
    nbytes = len(registers) * width_of(one.type) // 8
    addresses = program.addresses(one.operands[0], space, nbytes)
    memory = program.shared if space == "shared" else program.memory
    values = np.stack([program.read(name, one.type, narrow=True) for name in registers], axis=1)
    memory.store(addresses, values.view(np.uint8), program.active // WARP)


def matrices(program: Program, one: Instruction) -> None:
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


def shuffle(program: Program, one: Instruction) -> None:
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


def reduce(program: Program, one: Instruction) -> None:
    warps, function = program.whole_warps(), one.name.split(".")[2]
    if (program.read(one.operands[2], "s32") != -1).any():
        raise Fault("the emulator does not know reductions of some lanes")
    values = program.read(one.operands[1], one.type).reshape(len(warps), WARP)
    result = {"max": np.max, "min": np.min, "add": np.sum}[function](values, axis=1)
    program.write(one.operands[0], np.repeat(result.astype(values.dtype), WARP))


MACHINE: dict[str, Callable[[Program, Instruction], None]] = {
    **dict.fromkeys(("bra", "bra.uni"), branch),
    "ret": end,
    "bar.sync": barrier,
    "bar.warp.sync": barrier_of_warp,
    "prmt.b32": permute,
}
WIDTHS = [f"{kind}{width}" for kind in "bus" for width in (8, 16, 32, 64)] + ["f32"]
for _type in WIDTHS:
    MACHINE[f"mov.{_type}"] = move
    MACHINE[f"ld.param.{_type}"] = load_parameter
    for _space in ("global", "shared"):
        for _vector in ("", ".v2", ".v4"):
            MACHINE[f"ld.{_space}{_vector}.{_type}"] = load
            MACHINE[f"st.{_space}{_vector}.{_type}"] = store
MACHINE["mov.pred"] = move
MACHINE |= {f"shfl.sync.{mode}.b32": shuffle for mode in ("bfly", "up", "down", "idx")}
MACHINE |= {
    f"redux.sync.{how}.{type}": reduce for how in ("max", "min", "add") for type in ("s32", "u32")
}
MACHINE |= {
    f"{name}.sync.aligned.m8n8.{count}{trans}.shared.b16": matrices
    for name in ("ldmatrix", "stmatrix")
    for count in ("x1", "x2", "x4")
    for trans in ("", ".trans")
}
