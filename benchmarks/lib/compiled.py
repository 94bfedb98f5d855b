"""The Triton kernels compiled for a GPU that is not there, and what their instructions do."""

import re
import subprocess
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import rhtcomm
from rhtcomm.kernels import gpu

__all__ = ["Counts", "compiled", "count", "source_of"]

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TYPES |= {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32"}
KINDS = {  # of SASS instructions, by the beginnings of their names
    "float": ("FADD", "FMUL", "FFMA", "HADD2", "HFMA2", "MUFU"),
    "memory": ("LDG", "STG", "LDL", "STL"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "SHFL", "REDUX", "BAR", "ATOMS"),
    "control": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "WARPSYNC", "NOP"),
}


def compiled(
    codec: rhtcomm.Codec, dtype: torch.dtype, encode: bool, capability: int = 90, **options: Any
) -> CompiledKernel:
    """The kernel that encodes or decodes whole blocks of a tensor, as `gpu` would launch it.

    Args:
        capability: 10 times the compute capability.
        options: of the launch, in place of its own.
    """
    name = "encode_block" if encode else "decode_block"
    kernel, launches = getattr(gpu, name), []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *args, **named: launches.append(
                {**dict(zip(kernel.arg_names, args, strict=False)), **named}
            )

    x = torch.zeros(16 * codec.block, dtype=dtype)
    payload = torch.zeros(1, 1, codec.nbytes(x.numel()), dtype=torch.uint8)
    task, origin = codec.task(x.numel()), (rhtcomm.Key(1), 0, 0, 1)
    with (
        mock.patch.object(gpu, name, Recorder()),
        mock.patch.object(torch.cuda, "device_of", return_value=nullcontext()),
    ):
        if encode:
            gpu.encode(task, *origin, x, payload[0])
        else:
            gpu.decode(task, *origin, payload, x)
    (launch,) = launches
    launch |= options
    launch["WARPS"] = launch["num_warps"]
    source, own = source_of(kernel, launch)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=own)


def source_of(kernel: Any, launch: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for the arguments of a launch, and the launch's options."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = launch[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    options = {name: value for name, value in launch.items() if name not in kernel.arg_names}
    return ASTSource(kernel, signature, constants, attributes), options


@dataclass(frozen=True)
class Counts:
    """What the code of a block does, in instructions of a thread per coordinate of the block.

    Loops count as not entered, and code behind the first exit as not reached: that is what happens
    with finite blocks, one rank and no exact mode.

    Args:
        names: how often each instruction occurs.
        words: of 4 bytes, that a coordinate moves to or from shared memory or between threads, or
            looks up in a table in memory.
        looked_up: those of tables, from which threads read one word each.
        registers: of a thread.
        spilled: bytes of a thread that do not fit in registers.
        shared: bytes of a program's shared memory.
        threads: of a program.
    """

    names: Counter[str]
    words: float
    looked_up: float
    registers: int
    spilled: int
    shared: int
    threads: int

    @property
    def total(self) -> float:
        return sum(self.names.values())

    def kind(self, kind: str) -> float:
        """Of a kind of KINDS, or "integer": all others."""
        if kind == "integer":
            return self.total - sum(self.kind(other) for other in KINDS)
        return sum(self.names[name] for name in KINDS[kind])


def count(kernel: CompiledKernel, size: int) -> Counts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = run("nvdisasm", "-c", file.name)
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
    threads = 32 * kernel.metadata.num_warps
    names: Counter[str] = Counter()
    words = looked_up = 0.0
    for instruction in executed(sass):
        name, *modifiers = instruction.split(".")
        names[name] += threads / size
        if name in ("LDS", "STS", "SHFL", "LDG"):
            wide = 4 if "128" in modifiers else 2 if "64" in modifiers else 1
            words += threads / size * wide * (name != "LDG" or wide == 1)
            looked_up += threads / size * (wide == 1 and name in ("LDS", "LDG"))
        elif name in ("LDSM", "STSM"):
            words += threads / size * (int(modifiers[-1]) if modifiers[-1].isdigit() else 1)
    registers, spilled = (
        int(found[1]) if (found := re.search(rf"{name}:(\d+)", usage)) else 0
        for name in ("REG", "STACK")
    )
    return Counts(names, words, looked_up, registers, spilled, kernel.metadata.shared, threads)


def run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def executed(sass: str) -> list[str]:
    """The instructions of a kernel until it ends, without the bodies of loops."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)(.*)", line):
            guard, name, rest = match.groups()
            if name == "EXIT" and not guard:
                break
            target = re.search(r"\.L_x_\d+", rest) if name == "BRA" else None
            if target and target[0] in labels:  # backwards
                del found[labels[target[0]] :]
            else:
                found.append(name)
    return found
