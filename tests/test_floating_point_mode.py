"""No result depends on the mode that a thread computes in, and every thread keeps its mode."""

import ctypes
import ctypes.util
import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks, limit, run_program
from test_kernels import PATH, both_ways, needs_library, run_on, variants

import rhtcomm
from rhtcomm import (
    Codec,
    Eden,
    HierarchicalCommunicator,
    Key,
    Lattice,
    QuicFL,
    RandomizedHadamard,
    VectorQuantizer,
)
from rhtcomm.floating_point import assign_, default_mode
from rhtcomm.hooks import RHTState
from rhtcomm.kernels import reference
from rhtcomm.quantizers import Quantizer

# glibc's FE_DOWNWARD, FE_UPWARD and FE_TOWARDZERO.
DIRECTIONS = {"x86_64": (0x400, 0x800, 0xC00), "aarch64": (0x800000, 0x400000, 0xC00000)}
ROUNDING = DIRECTIONS.get(platform.machine(), ())
MODES = ["flush", *ROUNDING, *(("flush", direction) for direction in ROUNDING[:1])]
QUANTIZERS: list[Quantizer] = [QuicFL(4), QuicFL(3, 1 / 512), Eden(3), VectorQuantizer(2)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE, TINY = 1.0, 5e-324


def libm() -> ctypes.CDLL:
    return ctypes.CDLL(ctypes.util.find_library("m"))


class in_mode:
    """Change this thread's mode within the context."""

    def __init__(self, mode: object) -> None:
        self.parts = mode if isinstance(mode, tuple) else (mode,)

    def __enter__(self) -> None:
        for part in self.parts:
            if isinstance(part, int):
                assert libm().fesetround(part) == 0
            else:
                assert torch.set_flush_denormal(True)

    def __exit__(self, *_: object) -> None:
        libm().fesetround(0)
        torch.set_flush_denormal(False)


def mode_now() -> tuple[int, bool]:
    """Direction of rounding, and whether subnormal numbers are flushed."""
    return libm().fegetround(), TINY * ONE == 0


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Two ranks' tensors of blocks that are ordinary, subnormal in every dtype, and both."""
    x = torch.randn(2, 4, 512, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1.0, 1e-38, 1e-41, 3e-8])[:, None]
    x[:, 0, :256] *= 1e-39  # subnormals, and operands of sums that are not
    x[:, 1, 7] = 1.0
    return list(x.flatten(1).to(dtype))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_kernels_give_the_same_bits_in_every_mode(quantizer: Quantizer, dtype: torch.dtype) -> None:
    codec, key, xs = Codec(quantizer, 2, 512), Key(1), tensors(dtype)
    expected = both_ways(reference, codec, xs, key, 0, dtype)
    kernels = {**variants(), "reference": reference}
    # The threads of the C kernels are OpenMP's, born in the first mode of the list that takes two.
    for threads, mode, name in product((1, 2), MODES, kernels):
        if name == "reference" and threads > 1:  # see test_the_reference_minds_...
            continue
        with in_mode(mode), run_on(kernels[name]):
            before = mode_now()
            torch.set_num_threads(threads)
            try:
                payloads = torch.stack([codec.encode(x, key, rank, 2) for rank, x in enumerate(xs)])
                out = codec.decode_mean(payloads, key, len(xs[0]), out=torch.empty_like(xs[0]))
            finally:
                torch.set_num_threads(1)
            after = mode_now()
        assert before == after != (0, False), (name, mode)
        assert torch.equal(payloads, expected[0]), (name, mode)
        assert torch.equal(out.float(), expected[1]), (name, mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_lattice_and_transform_give_the_same_bits_in_every_mode(mode: object) -> None:
    lattice, key = Lattice(8, block=512), Key(3)
    rotation = RandomizedHadamard(2, 512)
    x = tensors(torch.float32)[0] * 1e-2
    (blocks,) = lattice.blocks(len(x))

    def results() -> list[torch.Tensor]:
        y = lattice.rotate(x, key, blocks)
        bound = y.abs().amax(dim=1)
        codes = lattice.codes(y, bound, key, 0, 0, 1)
        there = rotation.forward(x, key)
        back = rotation.inverse(there, key, len(x))
        return [y, codes, lattice.mean(codes, bound, key, blocks, 1), there, back]

    expected = results()
    with in_mode(mode):
        found = results()
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


PROGRAM = """
import ctypes, ctypes.util, hashlib, json, sys, torch
from rhtcomm import Codec, Eden, Key, QuicFL, VectorQuantizer
from rhtcomm.kernels import cpu

if sys.argv[2] == "without":
    cpu.library_path = lambda: None
def fesetround(direction): ctypes.CDLL(ctypes.util.find_library("m")).fesetround(direction)
mode = json.loads(sys.argv[1])
x = (torch.randn(1 << 17, generator=torch.Generator().manual_seed(0)) * 1e-38).clone()
torch.set_num_threads(1)
if mode == "flush":
    torch.set_flush_denormal(True)
elif mode:
    fesetround(mode)
# Threads that start now are in this mode for good.
torch.set_num_threads(3)
torch.ones(1 << 18) + 1.0
if sys.argv[2] == "pool":
    torch.set_flush_denormal(False)
    fesetround(0)
for quantizer in (QuicFL(3), Eden(3, biased=True), VectorQuantizer(4)):
    codec, key = Codec(quantizer, 3, 128), Key(2)
    payload = codec.encode(x, key, 1, 3)
    mean = codec.decode_mean(payload[None], key, len(x), first_rank=1, world_size=3)
    for part in (payload, mean.view(torch.uint8)):
        print(hashlib.sha256(part.numpy().tobytes()).hexdigest())
assert torch.get_num_threads() == 3
"""


def digests(mode: object, how: str, kernels: str) -> str:
    """What a fresh process makes of a tensor: tables, plans, kernels and torch's threads."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(mode), how],
        env={**os.environ, "RHTCOMM_KERNELS": kernels, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit(300),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def usual_digests() -> str:
    return digests(None, "", "reference")


@needs_library
@pytest.mark.parametrize("mode", ["flush", *ROUNDING])
def test_processes_in_every_mode_agree(mode: object, usual_digests: str) -> None:
    assert digests(mode, "", "cpu") == usual_digests


@pytest.mark.parametrize("how", ["", "pool", "without"])
def test_the_reference_minds_the_threads_of_torch(how: str, usual_digests: str) -> None:
    """`pool`: they alone are in another mode. `without` the C library torch itself can do this."""
    assert digests("flush", how, "reference") == usual_digests
    if how != "without" and ROUNDING:
        assert digests(ROUNDING[1], how, "reference") == usual_digests


@pytest.mark.skipif(not ROUNDING, reason="the numbers of this processor's modes are not known")
def test_without_the_library_another_rounding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rhtcomm import floating_point
    from rhtcomm.kernels import cpu

    monkeypatch.setattr(cpu, "library_path", lambda: None)
    floating_point._functions.cache_clear()
    try:
        for direction in ROUNDING:
            with in_mode(("flush", direction)), pytest.raises(RuntimeError, match="FE_TONEAREST"):
                default_mode().__enter__()
            with in_mode("flush"):
                with default_mode():
                    assert mode_now() == (0, False)
                assert mode_now() == (0, True)
    finally:
        floating_point._functions.cache_clear()


def test_the_mode_comes_back_after_an_error_and_in_nested_contexts() -> None:
    @default_mode()
    def fail(depth: int) -> None:
        assert mode_now() == (0, False)
        if depth:
            fail(depth - 1)
        raise ValueError

    with in_mode("flush"):
        with pytest.raises(ValueError):  # noqa: PT011
            fail(2)
        assert mode_now() == (0, True)
        with default_mode(pool=True):
            torch.set_flush_denormal(True)
        assert mode_now() == (0, True)


# NaN ----------------------------------------------------------------------------------------------

CANONICAL = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
INTEGERS = {4: torch.int32, 2: torch.int16}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assigning_makes_every_nan_the_canonical_one(dtype: torch.dtype) -> None:
    octets = [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -1, -0x7FFFFF]
    x = torch.tensor(octets * 20, dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([1.0, -2.0, torch.inf, -torch.inf, -0.0])])
    out = assign_(torch.empty(len(x), dtype=dtype), x)
    bits = out.view(INTEGERS[dtype.itemsize])[: 20 * len(octets)]
    assert bits.unique().tolist() == [CANONICAL[dtype]]
    assert torch.equal(out[-5:].float(), x[-5:])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_every_kernel_writes_the_canonical_nan(quantizer: Quantizer, dtype: torch.dtype) -> None:
    codec, key, numel = Codec(quantizer, 2, 256), Key(4), 3 * 256 + 40
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[5], x[-1] = torch.nan, -torch.inf
    for name, kernel in {**variants(), "reference": reference}.items():
        with run_on(kernel):
            payload = codec.encode(x, key)
            out = codec.decode_mean(payload[None], key, numel, out=torch.empty_like(x))
        assert payload[16:20].view(torch.int32).item() == CANONICAL[torch.float32], name
        bits = out.view(INTEGERS[dtype.itemsize])
        assert bits[out.isnan()].unique().tolist() == [CANONICAL[dtype]], name
        assert out.isnan().sum() == 256 + 40, name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nans_that_a_payload_brings_are_canonical(dtype: torch.dtype) -> None:
    """Exact coordinates of any bytes: their infinities make NaNs of the processor's own kind."""
    quantizer = QuicFL(2, 1 / 512)
    codec, key, block = Codec(quantizer, 2, 512), Key(5), 512
    payload = codec.encode(torch.ones(2 * block), key)
    rows = payload[16 + 8 :].view(2, -1)
    at = block * quantizer.bits // 8
    for row, halves in zip(rows, (0x7C00, 0xFC01), strict=True):  # infinity, a negative NaN
        row[at : at + 2] = torch.tensor([3, 0], dtype=torch.uint8)
        row[at + 2 * quantizer.exact_capacity(block) :][:2] = torch.tensor(
            [halves & 0xFF, halves >> 8], dtype=torch.uint8
        )
    for name, kernel in {**variants(), "reference": reference}.items():
        with run_on(kernel):
            out = codec.decode_mean(
                payload[None], key, 2 * block, out=torch.empty(2 * block, dtype=dtype)
            )
        bits = out.view(INTEGERS[dtype.itemsize])
        assert out.isnan().any(), name
        assert bits[out.isnan()].unique().tolist() == [CANONICAL[dtype]], name


@needs_library
def test_the_library_tells_the_default_mode_of_this_processor() -> None:
    from rhtcomm.kernels import cpu

    set_default, give_back = cpu.mode_functions(Path(str(PATH)))
    usual = set_default()
    with in_mode("flush"):
        flushing = set_default()
        assert mode_now() == (0, False)
        give_back(flushing)
        assert mode_now() == (0, True)
    assert flushing != usual


INTERPRETED = """
import torch
from rhtcomm import Codec, Eden, Key, QuicFL
torch.set_num_threads(1)
for quantizer in (QuicFL(2, 1 / 512), Eden(2)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codec, key = Codec(quantizer, 1, 64), Key(0)
        x = torch.ones(100)
        x[3] = torch.nan
        payload = codec.encode(x, key)
        if isinstance(quantizer, QuicFL):  # an exact coordinate of the tail that is a negative NaN
            payload[-2:] = torch.tensor([1, 0xFC], dtype=torch.uint8)
            payload[-4:-2] = 0
        out = codec.decode_mean(payload[None], key, 100, out=torch.empty(100, dtype=dtype))
        bits = out.view({4: torch.int32, 2: torch.int16}[dtype.itemsize])
        print(hex(payload[16:20].view(torch.int32).item()), *bits[out.isnan()].unique().tolist())
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_writes_the_canonical_nan() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "RHTCOMM_KERNELS": "gpu"},
        capture_output=True,
        text=True,
        timeout=limit(300),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"0x7fc00000 {nan}" for nan in CANONICAL.values()] * 2


# ---- Exchanges ----------------------------------------------------------------------------------

EXCHANGES: dict[str, dict[str, Any]] = {
    "compressed": {"codec": Codec(QuicFL(4), block=256)},
    "two_shot": {"codec": Codec(QuicFL(4), block=256), "algorithm": "two_shot"},
    "lattice": {"codec": Lattice(4, block=256)},
    "uncompressed": {"codec": Codec(QuicFL(4)), "min_numel": 1 << 20},
    "feedback": {"codec": Codec(Eden(4, biased=True), block=256), "feedback": True},
    "one node": {"codec": Codec(QuicFL(4), block=256), "levels": "one node"},
    "two nodes": {"codec": Codec(QuicFL(4), block=256), "levels": "two nodes"},
}


def levels(rank: int, how: str) -> HierarchicalCommunicator:
    """Two ranks that make up one node, or a node each."""
    alone = [dist.new_group([other]) for other in range(2)][rank]
    pair = (dist.group.WORLD, alone)
    return HierarchicalCommunicator(*(pair if how == "one node" else pair[::-1]))


def exchange_subnormals(
    rank: int, world_size: int, how: str, dtype: torch.dtype, numel: int, threads: int, flush: bool
) -> torch.Tensor:
    """Rank 1 flushes subnormal numbers to zero, from before its threads were started."""
    options = {"min_numel": 0, **EXCHANGES[how]}
    codec, feedback = options.pop("codec"), options.pop("feedback", False)
    two_levels = options.pop("levels", None)
    communicator: Any = levels(rank, two_levels) if two_levels else rhtcomm.TorchCommunicator()
    scale = 1e-6 if dtype == torch.float16 else 1e-38
    x = torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * scale
    x = x.to(dtype)
    residual = torch.zeros(numel) if feedback else None
    torch.set_flush_denormal(flush and rank == 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(2):
            mean = x.clone()
            rhtcomm.all_reduce(
                *(mean, codec, Key(0, step), communicator),
                residual=residual,
                **options,
            )
        flushes = bool(torch.tensor([1e-40]) * 1.0 == 0)
        assert flushes == (flush and rank == 1), "the mode was not given back"
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    return mean


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", EXCHANGES)
def test_a_rank_that_flushes_subnormals_gets_the_same_bits(
    how: str, dtype: torch.dtype, threads: int, ranks: Ranks
) -> None:
    numel = 100_000 if threads > 1 else 3000
    arguments = (how, dtype, numel, threads)
    means = ranks.run(exchange_subnormals, 2, *arguments, True)
    means += ranks.run(exchange_subnormals, 2, *arguments, False)
    assert means[0].any()
    for mean in means[1:]:
        assert torch.equal(mean.view(torch.int16), means[0].view(torch.int16))


THREADS_THAT_FLUSH = """
import hashlib, torch
torch.set_flush_denormal({flush})
torch.set_num_threads(2)
import torch.distributed as dist
import rhtcomm
dist.init_process_group("gloo")
rank = dist.get_rank()
alone = [dist.new_group([other]) for other in range(2)][rank]
flat, world = rhtcomm.TorchCommunicator(), dist.group.WORLD
kinds = {{
    "flat": flat,
    "one node": rhtcomm.HierarchicalCommunicator(world, alone),
    "two nodes": rhtcomm.HierarchicalCommunicator(alone, world),
    "feedback": flat,
}}
for name, communicator in kinds.items():
    residual = torch.zeros(200_000) if name == "feedback" else None
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((200_000,), 2**21, dtype=torch.int32).view(torch.float32).to(dtype)
        codec = rhtcomm.Codec(rhtcomm.QuicFL(8))
        rhtcomm.all_reduce(x, codec, rhtcomm.Key(0), communicator, residual=residual)
        digest = hashlib.sha256(x.view(torch.int16).numpy().tobytes()).hexdigest()
        if rank == 0:
            print(name, dtype, digest)
dist.destroy_process_group()
"""


def test_threads_of_torch_that_flush_change_no_sum() -> None:
    """Those that were started in that mode: two levels and error feedback sum by torch."""
    usual, flushing = (
        [line for line in first.stdout.splitlines() if "torch." in line]
        for first, _ in (
            run_program(THREADS_THAT_FLUSH.format(flush=flush), world_size=2)
            for flush in (False, True)
        )
    )
    assert len(usual) == 8
    assert flushing == usual


def exchange_nans(rank: int, world_size: int, how: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.ones(3000).to(dtype)
    x.view(torch.int32 if dtype == torch.float32 else torch.int16)[3::1000] = -63  # a NaN
    codec = Codec(QuicFL(4), block=256)
    rhtcomm.all_reduce(x, codec, Key(0), levels(rank, how), min_numel=0)
    return x[3::1000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["one node", "two nodes"])
def test_two_levels_give_the_canonical_nan(how: str, dtype: torch.dtype, ranks: Ranks) -> None:
    for nans in ranks.run(exchange_nans, 2, how, dtype):
        bits = nans.view(torch.int32 if dtype == torch.float32 else torch.int16)
        assert bits.tolist() == [CANONICAL[dtype]] * 3


def exchange_float64_subnormals(rank: int, world_size: int) -> torch.Tensor:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    buffer = x * 1e-308
    torch.set_flush_denormal(rank == 1)  # which the hook's thread takes over
    try:
        with RHTState() as state:
            bucket = SimpleNamespace(
                buffer=lambda: buffer,
                index=lambda: 0,
                is_last=lambda: True,
                parameters=lambda: [buffer],
            )
            state.submit(bucket).wait()
    finally:
        torch.set_flush_denormal(False)
    return buffer


def test_float64_that_is_not_compressed_keeps_its_subnormals(ranks: Ranks) -> None:
    first, second = ranks.run(exchange_float64_subnormals, 2)
    assert torch.equal(first.view(torch.int64), second.view(torch.int64))
