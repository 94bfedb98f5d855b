"""The C kernels of cpu.c: one pass over the blocks a direction, bit for bit the reference.

The library is loaded by ctypes, so it depends on no version of Python or torch, and a call releases
the GIL. It runs on as many threads as torch does (`torch.set_num_threads`).
"""

import ctypes
from importlib import metadata
from pathlib import Path

import torch

from rhtcomm.quantizers import Eden, Quantizer, QuicFL, VectorQuantizer
from rhtcomm.randomness import Key
from rhtcomm.rotation import Blocks, RandomizedHadamard

__all__ = ["DTYPES", "QUANTIZERS", "Library", "library_path"]

QUANTIZERS = (QuicFL, Eden, VectorQuantizer)  # in the order of cpu.c
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of cpu.c
_ABI = 3  # of cpu.c
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
        ("seed", ctypes.c_uint32 * 2),
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
        found = library.rhtcomm_abi() if hasattr(library, "rhtcomm_abi") else 0
        if found != (_ABI << 16) + ctypes.sizeof(_Plan):
            raise RuntimeError(
                f"the C kernels in {path} were built from another version of this package; "
                "install it again"
            )
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
        rotation: RandomizedHadamard,
        quantizer: Quantizer,
        x: torch.Tensor,
        key: Key,
        blocks: Blocks,
        rank: int,
        world_size: int,
        scales: torch.Tensor,
        codes: torch.Tensor,
        moments: torch.Tensor | None = None,
    ) -> None:
        x = x.detach().contiguous()
        normalization = blocks.size ** (-rotation.rotations / 2)
        plan = _plan(rotation, quantizer, key, blocks, world_size, normalization)
        plan.run, plan.run_stride = scales.shape[-1], codes.stride(-3)
        _check(
            self._encode(
                ctypes.byref(plan),
                blocks.count,
                rank,
                x.data_ptr(),
                DTYPES.index(x.dtype),
                x.numel(),
                scales.data_ptr(),
                codes.data_ptr(),
                None if moments is None else moments.data_ptr(),
                torch.get_num_threads(),
            )
        )

    def decode(
        self,
        rotation: RandomizedHadamard,
        quantizer: Quantizer,
        scales: torch.Tensor,
        codes: torch.Tensor,
        key: Key,
        blocks: Blocks,
        out: torch.Tensor,
        first_rank: int = 0,
        world_size: int | None = None,
    ) -> None:
        rows = scales.shape[0]
        world_size = rows if world_size is None else world_size
        normalization = blocks.size ** (-rotation.rotations / 2) / rows
        plan = _plan(rotation, quantizer, key, blocks, world_size, normalization)
        plan.first_rank, plan.rows = first_rank, rows
        plan.run, plan.run_stride = scales.shape[-1], codes.stride(-3)
        _check(
            self._decode(
                ctypes.byref(plan),
                blocks.count,
                scales.data_ptr(),
                codes.data_ptr(),
                codes.stride(0),
                out.data_ptr(),
                DTYPES.index(out.dtype),
                out.numel(),
                torch.get_num_threads(),
            )
        )


def _plan(
    rotation: RandomizedHadamard,
    quantizer: Quantizer,
    key: Key,
    blocks: Blocks,
    world_size: int,
    normalization: float,
) -> _Plan:
    plan = _Plan(
        size=blocks.size,
        first=blocks.start,
        world_size=world_size,
        seed=(key.seed & 0xFFFFFFFF, key.seed >> 32),
        bucket=key.bucket,
        step=key.step,
        hop=key.hop,
        rotations=rotation.rotations,
        quantizer=QUANTIZERS.index(type(quantizer)),
        bits=quantizer.bits,
        group=quantizer.group,
        normalization=normalization,
    )
    if isinstance(quantizer, QuicFL):
        plan.exact_capacity = quantizer.exact_capacity(blocks.size)
        levels = quantizer.table
        plan.shared_bits, plan.middle = levels.shared_bits, levels.middle
        plan.nodes_per_sigma, plan.inverse_bound = levels.nodes_per_sigma, levels.inverse_bound
        plan.levels, plan.positions = levels.levels.data_ptr(), levels.positions.data_ptr()
    elif isinstance(quantizer, Eden):
        plan.biased = quantizer.biased
        plan.levels = quantizer.table.centroids.data_ptr()
        plan.boundaries = quantizer.table.boundaries.data_ptr()
    elif isinstance(quantizer, VectorQuantizer):
        plan.biased = quantizer.biased
        plan.levels = quantizer.table.codewords.data_ptr()
        plan.half_norms = quantizer.table.half_norms.data_ptr()
    return plan


def _check(status: int) -> None:
    if status:
        raise MemoryError("rhtcomm: no memory for the scratch of the C kernels; use smaller blocks")
