"""The C kernels of cpu.c: one pass over the blocks a direction, bit for bit the reference.

The library is loaded by ctypes, so it depends on no version of Python or torch, and a call releases
the GIL. It runs on as many threads as torch does (`torch.set_num_threads`).
"""

import ctypes
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from rhtcomm.floating_point import default_mode
from rhtcomm.kernels.task import Task
from rhtcomm.memory import address_of
from rhtcomm.once import once
from rhtcomm.quantizers import Eden, Quantizer, QuicFL, VectorQuantizer

__all__ = ["DTYPES", "QUANTIZERS", "Library", "library_path", "mode_functions"]

QUANTIZERS = (QuicFL, Eden, VectorQuantizer)  # in the order of cpu.c
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of cpu.c
_NUMBER_OF = {dtype: number for number, dtype in enumerate(DTYPES)}
_ABI = 4  # of cpu.c
_NAME = "rhtcomm_cpu.*"


def library_path() -> Path | None:
    """Where the library lies: beside this module or, in an editable install, in site-packages."""
    for found in Path(__file__).parent.glob(_NAME):
        return found
    try:
        files = metadata.files("rhtcomm") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.match(_NAME)), None)


class _Plan(ctypes.Structure):
    """`Plan` of cpu.c."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("world_size", ctypes.c_int64),
        ("first_rank", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("run", ctypes.c_int64),
        ("run_stride", ctypes.c_int64),
        ("exact_capacity", ctypes.c_int64),
        ("seed_low", ctypes.c_uint32),
        ("seed_high", ctypes.c_uint32),
        ("bucket", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("hop", ctypes.c_uint32),
        ("rotations", ctypes.c_int32),
        ("quantizer", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("shared_bits", ctypes.c_int32),
        ("middle", ctypes.c_int32),
        ("nodes_per_sigma", ctypes.c_float),
        ("inverse_bound", ctypes.c_float),
        ("biased", ctypes.c_int32),
        ("normalization", ctypes.c_float),
        ("levels", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        ("half_norms", ctypes.c_void_p),
    )
    table: object = None
    """Owns what the addresses point to."""


class Library:
    """The kernels of one instruction set.

    Args:
        path: of the shared library.
        variant: "avx512vbmi", "avx512", "avx2" or "baseline"; by default the first of these that
            the processor has.

    Raises:
        ValueError: the variant is unknown.
        RuntimeError: the processor lacks it, it was not built, or the library is another version's.
    """

    def __init__(self, path: Path, variant: str | None = None) -> None:
        library = ctypes.CDLL(str(path))
        _check_abi(library, path)
        variants = {
            name: hasattr(library, f"rhtcomm_encode_{name}")
            and bool(library.rhtcomm_supports(name.encode()))
            for name in ("avx512vbmi", "avx512", "avx2", "baseline")
        }
        if variant is None:
            variant = next(name for name, usable in variants.items() if usable)
        elif variant not in variants:
            raise ValueError(f"RHTCOMM_CPU={variant!r} must be one of {', '.join(variants)}")
        elif not variants[variant]:
            usable = ", ".join(name for name, fine in variants.items() if fine)
            raise RuntimeError(f"RHTCOMM_CPU={variant}, but this machine can run only {usable}")
        self.variant = variant
        long, address, plan = ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(_Plan)
        self._encode = getattr(library, f"rhtcomm_encode_{variant}")
        self._encode.argtypes = (
            *(plan, long, long, address, ctypes.c_int, long, address, address, address),
            ctypes.c_int,
        )
        self._decode = getattr(library, f"rhtcomm_decode_{variant}")
        self._decode.argtypes = (
            *(plan, long, address, address, long, address, ctypes.c_int, long),
            ctypes.c_int,
        )

    def encode(
        self,
        task: Task,
        x: torch.Tensor,
        payloads: torch.Tensor,
        moments: torch.Tensor | None = None,
    ) -> None:
        section = task.section
        parts, start = len(payloads), section.blocks.start
        numel = parts * section.blocks.count * section.blocks.size
        plan, at = _plan(task, 1), address_of(payloads)
        plan.run_stride = payloads.stride(0)
        _check(
            self._encode(
                plan,
                parts * section.blocks.count,
                task.rank,
                address_of(x) + start * x.element_size(),
                _NUMBER_OF[x.dtype],
                min(numel, x.numel() - start),
                at + section.scales,
                at + section.codes,
                None if moments is None else address_of(moments),
                torch.get_num_threads(),
            )
        )

    def decode(self, task: Task, payloads: torch.Tensor, out: torch.Tensor) -> None:
        ranks, parts, _ = payloads.shape
        section = task.section
        start = section.blocks.start
        numel = parts * section.blocks.count * section.blocks.size
        plan, at = _plan(task, ranks), address_of(payloads)
        plan.first_rank, plan.rows, plan.run_stride = task.rank, ranks, payloads.stride(1)
        _check(
            self._decode(
                plan,
                parts * section.blocks.count,
                at + section.scales,
                at + section.codes,
                payloads.stride(0),
                address_of(out) + start * out.element_size(),
                _NUMBER_OF[out.dtype],
                min(numel, out.numel() - start),
                torch.get_num_threads(),
            )
        )


def mode_functions(path: Path) -> tuple[Callable[[], int], Callable[[int], object]]:
    """What `floating_point` needs of the library.

    Raises:
        OSError: it cannot be loaded.
        RuntimeError: it is another version's.
    """
    library = ctypes.PyDLL(str(path))  # so short a call had better keep the GIL
    _check_abi(library, path)
    set_default, give_back = library.rhtcomm_set_default_mode, library.rhtcomm_set_mode
    set_default.argtypes, set_default.restype = (), ctypes.c_uint64
    give_back.argtypes, give_back.restype = (ctypes.c_uint64,), None
    return set_default, give_back


def _check_abi(library: ctypes.CDLL, path: Path) -> None:
    found = library.rhtcomm_abi() if hasattr(library, "rhtcomm_abi") else 0
    if found != (_ABI << 16) + ctypes.sizeof(_Plan):
        raise RuntimeError(
            f"the C kernels in {path} were built from another version of this package; "
            "install it again"
        )


def _plan(task: Task, ranks: int) -> _Plan:
    """What both directions are told."""
    key, blocks, rotations = task.key, task.section.blocks, task.rotation.rotations
    constants = _constants(task.quantizer, rotations, blocks.size, ranks)
    plan = _Plan.from_buffer_copy(constants)
    plan.first = task.first + blocks.start
    plan.run = blocks.count
    plan.world_size = task.world_size
    plan.seed_low, plan.seed_high = key.seed & 0xFFFFFFFF, key.seed >> 32
    plan.bucket, plan.step, plan.hop = key.bucket, key.step, key.hop
    return plan


@once
@default_mode()
def _constants(quantizer: Quantizer, rotations: int, size: int, ranks: int) -> _Plan:
    """Of the plan, what is the same in all calls; it owns the table that it points into."""
    plan = _Plan(
        size=size,
        rotations=rotations,
        quantizer=QUANTIZERS.index(type(quantizer)),
        bits=quantizer.bits,
        group=quantizer.group,
        normalization=size ** (-rotations / 2) / ranks,
    )
    if isinstance(quantizer, QuicFL):
        plan.exact_capacity = quantizer.exact_capacity(size)
        levels = plan.table = quantizer.table
        plan.shared_bits, plan.middle = levels.shared_bits, levels.middle
        plan.nodes_per_sigma, plan.inverse_bound = levels.nodes_per_sigma, levels.inverse_bound
        plan.levels, plan.positions = levels.levels.ctypes.data, levels.positions.ctypes.data
    elif isinstance(quantizer, Eden):
        plan.biased = quantizer.biased
        centroids = plan.table = quantizer.table
        plan.levels = centroids.centroids.ctypes.data
        plan.boundaries = centroids.boundaries.ctypes.data
    elif isinstance(quantizer, VectorQuantizer):
        plan.biased = quantizer.biased
        codebook = plan.table = quantizer.table
        plan.levels = codebook.codewords.ctypes.data
        plan.half_norms = codebook.half_norms.ctypes.data
    return plan


def _check(status: int) -> None:
    if status:
        raise MemoryError("rhtcomm: no memory for the scratch of the C kernels; use smaller blocks")
