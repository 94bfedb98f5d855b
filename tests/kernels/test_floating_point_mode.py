"""No result depends on the mode that a thread computes in, and every thread keeps its mode."""

import ctypes
import ctypes.util
import json
import os
import platform
from itertools import product
from pathlib import Path

import forks
import pytest
import torch
from harness import call_in_fresh_process, limit
from lattices import sum_of
from libraries import PATH, both_ways, needs_library, variants
from problems import DTYPES

from rhtcomm import ECDQ, Codec, Eden, Key, Lattice, QuicFL, RandomizedHadamard, VectorQuantizer
from rhtcomm.floating_point import default_mode
from rhtcomm.kernels import cpu, lattice_cpu, reference, use
from rhtcomm.kernels import lattice as lattice_reference
from rhtcomm.quantizers import Quantizer

# glibc's FE_DOWNWARD, FE_UPWARD and FE_TOWARDZERO.
DIRECTIONS = {"x86_64": (0x400, 0x800, 0xC00), "aarch64": (0x800000, 0x400000, 0xC00000)}
ROUNDING = DIRECTIONS.get(platform.machine(), ())
MODES = ["flush", *ROUNDING, *(("flush", direction) for direction in ROUNDING[:1])]
QUANTIZERS: list[Quantizer] = [
    *(QuicFL(4), QuicFL(3, 1 / 512), Eden(3), VectorQuantizer(2), ECDQ(1.5), ECDQ(4)),
]
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
        with in_mode(mode), use(kernels[name]):
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
    xs = [x, x * 0.3]
    of_lattice = [lattice_cpu.of(library) for library in variants().values()] if PATH else []

    def results() -> list[torch.Tensor]:
        found = [
            sum_of(lattice, xs, key, kernel=kernel) for kernel in (lattice_reference, *of_lattice)
        ]
        there = rotation.forward(x, key)
        back = rotation.inverse(there, key, len(x))
        return [there, back, *(part for each in found for part in each.everything())]

    expected = results()
    with in_mode(mode):
        found = results()
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


PROGRAM = """
import ctypes, ctypes.util, hashlib, json, sys, torch
from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL, VectorQuantizer
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
for quantizer in (QuicFL(3), Eden(3, biased=True), VectorQuantizer(4), ECDQ(2)):
    codec, key = Codec(quantizer, 3, 128), Key(2)
    payload = codec.encode(x, key, 1, 3)
    mean = codec.decode_mean(payload[None], key, len(x), first_rank=1, world_size=3)
    for part in (payload, mean.view(torch.uint8)):
        print(hashlib.sha256(part.numpy().tobytes()).hexdigest())
assert torch.get_num_threads() == 3
"""


def digests(mode: object, how: str, kernels: str) -> str:
    """What a fresh process makes of a tensor: tables, plans, kernels and torch's threads."""
    environment = {**os.environ, "RHTCOMM_KERNELS": kernels}
    process = forks.start(PROGRAM, environment, json.dumps(mode), how, strict=False)
    done = process.wait(limit(300))
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


def ask_without_the_library() -> None:
    """For a process of its own, in which nobody has looked for the library."""
    cpu.library_path = lambda: None
    for direction in ROUNDING:
        with in_mode(("flush", direction)), pytest.raises(RuntimeError, match="FE_TONEAREST"):
            default_mode().__enter__()
        with in_mode("flush"):
            with default_mode():
                assert mode_now() == (0, False)
            assert mode_now() == (0, True)
    print("refused")


@pytest.mark.skipif(not ROUNDING, reason="the numbers of this processor's modes are not known")
def test_without_the_library_another_rounding_is_refused() -> None:
    assert call_in_fresh_process(ask_without_the_library) == ["refused"]


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


@needs_library
def test_the_library_tells_the_default_mode_of_this_processor() -> None:
    set_default, give_back = cpu.mode_functions(Path(str(PATH)))
    usual = set_default()
    with in_mode("flush"):
        flushing = set_default()
        assert mode_now() == (0, False)
        give_back(flushing)
        assert mode_now() == (0, True)
    assert flushing != usual
