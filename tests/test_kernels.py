"""The C kernels against the torch reference: the same bits, always."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rhtcomm.codec
from rhtcomm import Codec, Eden, Key, QuicFL
from rhtcomm.kernels import Kernel, cpu, reference

# `make sanitize` runs this file on an instrumented build.
PATH = os.environ.get("RHTCOMM_TEST_LIBRARY") or cpu.library_path()
REQUIRED = bool(os.environ.get("RHTCOMM_REQUIRE_KERNELS"))
needs_library = pytest.mark.skipif(
    PATH is None and not REQUIRED, reason="the C kernels were not built"
)
QUANTIZERS = (QuicFL, Eden)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def variants() -> dict[str, cpu.Library]:
    assert PATH is not None, "RHTCOMM_REQUIRE_KERNELS is set, but the C kernels were not built"
    found = {}
    for name in ("avx512vbmi", "avx512", "avx2", "baseline"):
        try:
            found[name] = cpu.Library(Path(PATH), name)
        except RuntimeError:
            continue
    return found


class run_on:
    """Let codecs use one kernel within the context."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __enter__(self) -> None:
        self.previous = rhtcomm.codec.kernel_for
        rhtcomm.codec.kernel_for = lambda device, quantizer: self.kernel

    def __exit__(self, *_: object) -> None:
        rhtcomm.codec.kernel_for = self.previous


def both_ways(
    kernel: Kernel, codec: Codec, xs: list[torch.Tensor], key: Key, first: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """All payloads, and the decoded mean as bits (so that NaN equals NaN)."""
    with run_on(kernel):
        payloads = torch.stack(
            [codec.encode(x, key, rank, len(xs), first=first) for rank, x in enumerate(xs)]
        )
        out = torch.empty(xs[0].numel(), dtype=dtype)
        mean = codec.decode_mean(payloads, key, out.numel(), first=first, out=out)
    return payloads, torch.where(mean.isnan(), 12345.0, mean.float())


@needs_library
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    quantizer=st.sampled_from(QUANTIZERS),
    bits=st.integers(1, 8),
    rotations=st.integers(1, 3),
    log_block=st.integers(5, 13),
    blocks=st.floats(0.01, 3.5),
    ranks=st.integers(1, 5),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    magnitude=st.sampled_from([0.0, 1e-42, 1e-38, 1e-3, 1.0, 1e4, 1e38]),
    special=st.sampled_from([None, float("inf"), float("nan"), 0.0, 30.0]),
    first=st.integers(0, 2**20),
    seed=st.integers(0, 2**64 - 1),
    threads=st.integers(1, 3),
)
@example(QuicFL, 4, 2, 12, 3.0, 2, (torch.float32, torch.float32), 1.0, None, 0, 0, 1)
@example(Eden, 8, 3, 12, 2.3, 3, (torch.bfloat16, torch.float16), 1.0, 30.0, 7, 1, 2)
def test_same_bits_as_the_reference(
    quantizer: type[QuicFL] | type[Eden],
    bits: int,
    rotations: int,
    log_block: int,
    blocks: float,
    ranks: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    magnitude: float,
    special: float | None,
    first: int,
    seed: int,
    threads: int,
) -> None:
    block = 1 << log_block
    codec = Codec(quantizer(bits), rotations, block)
    numel = max(1, int(blocks * block))
    generator = torch.Generator().manual_seed(seed % 2**63)
    spread = torch.logspace(-1, 0, ranks)
    xs = [torch.randn(numel, generator=generator) * magnitude * s for s in spread]
    xs = [x.clamp(-3e38, 3e38).to(dtypes[0]) for x in xs]
    if special is not None:
        xs[-1][numel // 2] = special
    key = Key(seed, step=seed % 2**32, bucket=seed % 977)
    expected = both_ways(reference, codec, xs, key, first * block, dtypes[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, kernel in variants().items():
            payloads, mean = both_ways(kernel, codec, xs, key, first * block, dtypes[1])
            assert torch.equal(payloads, expected[0]), name
            assert torch.equal(mean, expected[1]), name
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_random_payloads_decode_alike_and_in_bounds(
    quantizer: type[QuicFL] | type[Eden], bits: int
) -> None:
    codec, numel, key = Codec(quantizer(bits), block=256), 256 * 3 + 77, Key(bits)
    generator = torch.Generator().manual_seed(bits)
    payloads = torch.randint(
        0, 256, (3, codec.nbytes(numel)), dtype=torch.uint8, generator=generator
    )
    for rank in range(3):
        honest = codec.encode(torch.zeros(numel), key, rank, 3)
        payloads[rank, : rhtcomm.codec.HEADER_BYTES] = honest[: rhtcomm.codec.HEADER_BYTES]
    means = []
    for kernel in (reference, *variants().values()):
        with run_on(kernel):
            means.append(codec.decode_mean(payloads, key, numel))
    for mean in means[1:]:
        assert torch.equal(mean.isnan(), means[0].isnan())
        assert torch.equal(mean.nan_to_num(), means[0].nan_to_num())


@needs_library
def test_threads_that_call_at_the_same_time_do_not_disturb_each_other() -> None:
    codec, key = Codec(QuicFL(4)), Key(5)
    xs = [torch.randn(1 << 18, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    kernel = next(iter(variants().values()))
    with run_on(kernel):
        alone = [codec.encode(x, key) for x in xs]
        together: dict[int, torch.Tensor] = {}

        def work(i: int) -> None:
            for _ in range(10):
                together[i] = codec.encode(xs[i], key)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(alone[i], together[i]) for i in range(4))


@needs_library
@pytest.mark.parametrize("bits", range(1, 9))
def test_coordinates_at_the_ends_of_the_range(bits: int) -> None:
    """Blocks that are one coordinate once rotated, whose nodes are the first and the last."""
    codec, key, size = Codec(QuicFL(bits)), Key(3), 4096
    y = torch.zeros(16, size)
    y[range(16), range(7, 23)] = torch.tensor([1.0, -1.0]).repeat(8)
    x = codec.rotation.unrotate(y, key, 0).flatten()
    expected = both_ways(reference, codec, [x], key, 0, torch.float32)
    for name, kernel in variants().items():
        payloads, mean = both_ways(kernel, codec, [x], key, 0, torch.float32)
        assert torch.equal(payloads, expected[0]), name
        assert torch.equal(mean, expected[1]), name


def choose(environment: dict[str, str], before: str = "") -> subprocess.CompletedProcess[str]:
    """Which kernel a fresh process with this environment picks, and what it says of it."""
    program = f"""
import torch
from rhtcomm import QuicFL
from rhtcomm.kernels import cpu, kernel_for
{before}
for _ in range(2):
    kernel = kernel_for(torch.device("cpu"), QuicFL(4))
print(getattr(kernel, "variant", "reference"))
"""
    kept = {k: v for k, v in os.environ.items() if k not in ("RHTCOMM_KERNELS", "RHTCOMM_CPU")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_library
def test_the_environment_chooses_the_kernel() -> None:
    for name in variants():
        assert choose({"RHTCOMM_CPU": name}).stdout.split() == [name]
    assert choose({"RHTCOMM_KERNELS": "cpu"}).stdout.split()[0] in variants()
    assert choose({"RHTCOMM_KERNELS": "reference"}).stdout.split() == ["reference"]
    assert "RHTCOMM_KERNELS='fast' must be" in choose({"RHTCOMM_KERNELS": "fast"}).stderr
    assert "RHTCOMM_CPU='sse9' must be" in choose({"RHTCOMM_CPU": "sse9"}).stderr


def test_without_a_library_the_reference_runs_and_says_so_once() -> None:
    missing = "cpu.library_path = lambda: None"
    quiet = choose({}, missing)
    assert quiet.stdout.split() == ["reference"]
    assert quiet.stderr.count("the C kernels were not built") == 1
    forced = choose({"RHTCOMM_KERNELS": "cpu"}, missing)
    assert forced.returncode != 0
    assert "a C compiler is needed" in forced.stderr
