"""The C kernels of cpu.c: one pass over the blocks per direction, the bits of the reference.

The library is loaded by ctypes, so it does not depend on the version of Python or torch, and calls
release the GIL. It uses as many threads as torch (`torch.set_num_threads`).
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rhtcomm.floating_point import default_mode
from rhtcomm.kernels.feedback import Feedback, Residual
from rhtcomm.kernels.task import Task
from rhtcomm.memory import address_of
from rhtcomm.quantizers import ECDQ, Eden, QuicFL, VectorQuantizer
from rhtcomm.randomness import Key
from rhtcomm.wire import Section

__all__ = [
    "ABI",
    "DTYPES",
    "NO_MEMORY",
    "QUANTIZERS",
    "Library",
    "Plan",
    "Plans",
    "library_path",
    "mode_functions",
    "plans_of",
]

QUANTIZERS = (QuicFL, Eden, VectorQuantizer, ECDQ)  # in the order of native/plan.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of native/plan.h
_NUMBER_OF = {dtype: number for number, dtype in enumerate(DTYPES)}
ABI = 12  # of cpu.c
_NAME = "rhtcomm_cpu.*"
NO_MEMORY = "rhtcomm: out of memory for the working space of the C kernels; use smaller blocks"


def library_path() -> Path | None:
    """The path of the library: next to this module or, if installed editable, in site-packages."""
    for found in Path(__file__).parent.glob(_NAME):
        return found
    try:
        files = metadata.files("rhtcomm") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.match(_NAME)), None)


class Plan(ctypes.Structure):
    """`Plan` of native/plan.h."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("shards", ctypes.c_int64),
        ("numel", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("unit", ctypes.c_int64),
        ("unit_bytes", ctypes.c_int64),
        ("last_unit_bytes", ctypes.c_int64),
        ("scales", ctypes.c_int64),
        ("codes", ctypes.c_int64),
        ("exact_capacity", ctypes.c_int64),
        ("normalization", ctypes.c_double),
        ("rotations", ctypes.c_int32),
        ("quantizer", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("shared_bits", ctypes.c_int32),
        ("middle", ctypes.c_int32),
        ("nodes_per_sigma", ctypes.c_float),
        ("inverse_bound", ctypes.c_float),
        ("per_step", ctypes.c_float),
        ("quarter_step", ctypes.c_float),
        ("precision", ctypes.c_int32),
        ("class_bits", ctypes.c_int32),
        ("largest", ctypes.c_int32),
        ("biased", ctypes.c_int32),
        ("levels", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        ("half_norms", ctypes.c_void_p),
        ("symbols", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("registers", ctypes.c_void_p),
    )


class _Residual(ctypes.Structure):
    """`Residual` of native/feedback.h."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
        ("bound", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, residual: Residual) -> "_Residual":
        """Keep what it is made of alive."""
        arrays = (residual.starts.ctypes.data, residual.addresses.ctypes.data)
        bound = None if residual.bound is None else address_of(residual.bound)
        return cls(len(residual.pieces), *arrays, residual.offset, bound)


class _Feedback(ctypes.Structure):
    """`Feedback` of native/feedback.h."""

    _fields_ = (
        ("residual", _Residual),
        ("seed", ctypes.c_uint32 * 2),
        ("bucket", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("hop", ctypes.c_uint32),
        ("offset", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("world_size", ctypes.c_int64),
        ("payloads", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("mean", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("weight", ctypes.c_float),
    )

    @classmethod
    def of(cls, feedback: Feedback, offset: int) -> "_Feedback":
        """For a tensor at `offset` of its bucket. Keep what it is made of alive."""
        key, payloads, mean = feedback.key, feedback.payloads, feedback.mean
        made = cls(
            residual=_Residual.of(feedback.residual),
            seed=(key.seed & 0xFFFFFFFF, key.seed >> 32),
            bucket=key.bucket,
            step=key.step,
            hop=key.hop,
            offset=offset,
            rank=feedback.rank,
            world_size=feedback.world_size,
            payloads=address_of(payloads),
            stride=payloads.stride(0),
            weight=feedback.weight,
        )
        if mean is not None:
            made.mean, made.first = address_of(mean), feedback.first
            made.stop = feedback.first + len(mean)
        return made


class Plans(NamedTuple):
    """The C kernels' description of a task."""

    array: "ctypes.Array[Plan]"
    """One for each section."""
    table: object
    """Keeps the memory that the plans point into."""
    address: int
    """Address of the array."""


@lru_cache(maxsize=1024)
def plans_of(task: Task) -> Plans:
    """Filled once per task. Keep the plans alive while using the address."""
    array = (Plan * len(task.sections))(*(_plan(task, section) for section in task.sections))
    return Plans(array, task.quantizer.table, ctypes.addressof(array))


class Library:
    """The kernels of one instruction set.

    Args:
        path: of the shared library.
        variant: "avx512vbmi", "avx512", "avx2" or "baseline"; by default the first of these that
            the processor has.

    Raises:
        ValueError: the variant is unknown.
        RuntimeError: the processor lacks it, it was not built, or the library belongs to another
            version.
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
            raise RuntimeError(f"RHTCOMM_CPU={variant}, but this machine supports only {usable}")
        self.variant, self._library = variant, library
        address, number, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32
        plans = (address, ctypes.c_int)
        origin = (ctypes.c_uint64, word, word, word, number, number, number)
        self._encode = self.function("encode")
        self._encode.argtypes = (
            *(*plans, *origin),
            *(address, ctypes.c_int, address, number, address, address, ctypes.c_int),
        )
        self._decode = self.function("decode")
        self._decode.argtypes = (
            *(*plans, *origin),
            *(number, address, number, number, address, ctypes.c_int, address, ctypes.c_int),
        )

    def function(self, name: str) -> Any:
        """The library's function of this instruction set."""
        return getattr(self._library, f"rhtcomm_{name}_{self.variant}")

    def encode(
        self,
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
        plans = plans_of(task)
        added = None if residual is None else _Residual.of(residual)
        failed = self._encode(
            plans.address,
            len(plans.array),
            key.seed,
            key.step,
            key.bucket,
            key.hop,
            offset,
            rank,
            world_size,
            address_of(x),
            _NUMBER_OF[x.dtype],
            address_of(payloads),
            payloads.stride(0),
            None if moments is None else address_of(moments),
            None if added is None else ctypes.addressof(added),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(NO_MEMORY)

    def decode(
        self,
        task: Task,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        payloads: torch.Tensor,
        out: torch.Tensor,
        feedback: Feedback | None = None,
    ) -> None:
        plans = plans_of(task)
        updated = None if feedback is None else _Feedback.of(feedback, offset)
        failed = self._decode(
            plans.address,
            len(plans.array),
            key.seed,
            key.step,
            key.bucket,
            key.hop,
            offset,
            rank,
            world_size,
            payloads.shape[0],
            address_of(payloads),
            payloads.stride(0),
            payloads.stride(1),
            address_of(out),
            _NUMBER_OF[out.dtype],
            None if updated is None else ctypes.addressof(updated),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(NO_MEMORY)


def mode_functions(path: Path) -> tuple[Callable[[], int], Callable[[int], object]]:
    """The functions of the library that `floating_point` needs.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeError: the library belongs to another version.
    """
    library = ctypes.PyDLL(
        str(path)
    )  # for such short calls, releasing the GIL costs more than it saves
    _check_abi(library, path)
    set_default, give_back = library.rhtcomm_set_default_mode, library.rhtcomm_set_mode
    set_default.argtypes, set_default.restype = (), ctypes.c_uint64
    give_back.argtypes, give_back.restype = (ctypes.c_uint64,), None
    return set_default, give_back


def _check_abi(library: ctypes.CDLL, path: Path) -> None:
    found = library.rhtcomm_abi() if hasattr(library, "rhtcomm_abi") else 0
    if found != (ABI << 16) + sum(map(ctypes.sizeof, (Plan, _Residual, _Feedback))):
        raise RuntimeError(
            f"the C kernels in {path} were built from another version of this package; reinstall it"
        )


@default_mode()
def _plan(task: Task, section: Section) -> Plan:
    quantizer, blocks, rotations = task.quantizer, section.blocks, task.rotation.rotations
    unit = quantizer.unit(blocks.size)
    plan = Plan(
        size=blocks.size,
        shards=task.shards,
        numel=task.numel,
        offset=blocks.offset,
        blocks=blocks.count,
        unit=unit,
        unit_bytes=quantizer.nbytes(unit, blocks.size),
        last_unit_bytes=quantizer.nbytes((blocks.count - 1) % unit + 1, blocks.size),
        scales=section.scales,
        codes=section.codes,
        normalization=blocks.size ** (-rotations / 2),
        rotations=rotations,
        quantizer=QUANTIZERS.index(type(quantizer)),
        group=quantizer.group,
    )
    if isinstance(quantizer, ECDQ):
        _fill_ecdq(plan, quantizer)
        return plan
    plan.bits = int(quantizer.bits)
    if isinstance(quantizer, QuicFL):
        plan.exact_capacity = quantizer.exact_capacity(blocks.size)
        levels = quantizer.table
        plan.shared_bits, plan.middle = levels.shared_bits, levels.middle
        plan.nodes_per_sigma, plan.inverse_bound = levels.nodes_per_sigma, levels.inverse_bound
        plan.levels, plan.positions = levels.levels.ctypes.data, levels.positions.ctypes.data
    elif isinstance(quantizer, Eden):
        plan.biased = quantizer.biased
        centroids = quantizer.table
        plan.levels = centroids.centroids.ctypes.data
        plan.boundaries = centroids.boundaries.ctypes.data
    elif isinstance(quantizer, VectorQuantizer):
        plan.biased = quantizer.biased
        codebook = quantizer.table
        plan.levels = codebook.codewords.ctypes.data
        plan.half_norms = codebook.half_norms.ctypes.data
    return plan


def _fill_ecdq(plan: Plan, quantizer: ECDQ) -> None:
    table = quantizer.table
    plan.inverse_bound = table.inverse_bound
    plan.per_step, plan.quarter_step = table.per_step, table.quarter_step
    plan.precision, plan.largest = table.precision, table.largest
    plan.class_bits = table.class_bits
    plan.symbols, plan.slots = (array.ctypes.data for array in (table.entries, table.slots))
    plan.registers = None if table.registers is None else table.registers.ctypes.data
