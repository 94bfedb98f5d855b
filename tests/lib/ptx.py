"""Runs the PTX of Triton kernels without a GPU, for tests of what is compiled for one.

All threads of a program run in lockstep: those that are behind, by their next instruction, go
first, until a branch or the target of one. A `Fault` names the instruction that does what no GPU
does reliably (races, bounds, alignment, what was never written), and what this emulator does not
know. Of arithmetic it knows what rounds to nearest, or to zero where it makes integers.

Warps are faithful (shuffles, reductions, matrices in shared memory); what one program writes while
another reads it is not noticed, since programs run one after the other.
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from ptx_arithmetic import DTYPES, OPERATIONS, Fault, width_of
from ptx_machine import MACHINE
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
