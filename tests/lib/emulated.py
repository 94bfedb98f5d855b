"""The Triton kernels as compiled for a GPU of compute capability 9.0, run by `ptx`."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from ptx import Kernel, Program, parse
from ptx_memory import Global

__all__ = ["emulated"]

KERNELS = {
    "gpu": ("encode_block", "decode_block"),
    "gpu_units": (
        *("quantize_block", "encode_unit", "finish_unit"),
        *("dither_block", "decode_unit", "mean_block"),
    ),
    "lattice_gpu": ("rotate_block", "quantize_block", "pack_block", "mean_block"),
}
_compiled: dict[str, tuple[str, int, int]] = {}  # PTX, warps, and bytes of shared memory


@contextmanager
def emulated(
    warps: int | None = None, changed: Callable[[str], str] = lambda ptx: ptx
) -> Iterator[list[str]]:
    """Within it `gpu`, `gpu_units` and `lattice_gpu` take CPU tensors.

    Args:
        warps: of kernels of blocks, instead of the guess.
        changed: what becomes of the PTX before it runs.

    Yields:
        The names of the kernels that were launched.
    """
    from rhtcomm.kernels import gpu, gpu_units, lattice_gpu

    launched: list[str] = []

    class Emulated:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: object, **named: object) -> None:
                named |= dict(zip(self.kernel.arg_names, arguments, strict=False))
                if warps and "WARPS" in named:
                    named |= {"WARPS": warps, "num_warps": warps}
                launched.append(self.kernel.fn.__name__)
                run(self.kernel, grid, named, changed)

            return launch

    with mock.patch.object(torch.cuda, "device_of", return_value=nullcontext()):
        patches = [
            mock.patch.object(module, name, Emulated(getattr(module, name)))
            for module, names in zip((gpu, gpu_units, lattice_gpu), KERNELS.values(), strict=True)
            for name in names
        ]
        for patch in patches:
            patch.start()
        try:
            yield launched
        finally:
            for patch in patches:
                patch.stop()


def run(
    kernel: Any, grid: tuple[int, ...], launch: dict[str, Any], changed: Callable[[str], str]
) -> None:
    ptx, warps, shared = compiled(kernel, launch)
    parsed: Kernel = parse(changed(ptx))
    values = [launch[p.name] for p in kernel.params if not p.is_constexpr]
    values = [value for value in values if value is not None]
    memory = Global([value for value in values if isinstance(value, torch.Tensor)])
    # Triton's two scratch buffers, which no kernel uses, come last.
    arguments = [bits_of(value) for value in values]
    arguments += [0] * (len(parsed.parameters) - len(arguments))
    columns, rows = (*grid, 1)[:2]
    for x in range(columns):
        for y in range(rows):
            Program(parsed, warps, (x, y), arguments, memory, shared).run()


def bits_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value)


def compiled(kernel: Any, launch: dict[str, Any]) -> tuple[str, int, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    from lib.compiled import source_of

    source, options = source_of(kernel, launch)
    key = repr((source.hash(), options))
    if key not in _compiled:
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        _compiled[key] = made.asm["ptx"], made.metadata.num_warps, made.metadata.shared
    return _compiled[key]
