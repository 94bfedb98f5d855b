"""The C kernels against the torch reference: the same bits, always."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from harness import limit
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rhtcomm.codec
from rhtcomm import Codec, Eden, Key, QuicFL, RandomizedHadamard, VectorQuantizer
from rhtcomm.kernels import Kernel, cpu, reference
from rhtcomm.quantizers import Quantizer

# `make sanitize` runs this file on an instrumented build.
PATH = os.environ.get("RHTCOMM_TEST_LIBRARY") or cpu.library_path()
REQUIRED = bool(os.environ.get("RHTCOMM_REQUIRE_KERNELS"))
needs_library = pytest.mark.skipif(
    PATH is None and not REQUIRED, reason="the C kernels were not built"
)
FRACTION = 1 / 512
QUANTIZERS: tuple[Quantizer, ...] = (
    *(QuicFL(bits) for bits in range(1, 9)),
    *(QuicFL(bits, exact_fraction=FRACTION) for bits in range(1, 9)),
    *(Eden(bits) for bits in range(1, 9)),
    *(VectorQuantizer(bits) for bits in (1, 2, 4)),
)
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
@settings(max_examples=170, deadline=None, derandomize=True)
@given(
    quantizer=st.sampled_from(QUANTIZERS),
    rotations=st.integers(1, 3),
    log_block=st.integers(5, 13),
    blocks=st.floats(0.01, 3.5),
    ranks=st.integers(1, 5),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    magnitude=st.sampled_from([0.0, 1e-42, 1e-38, 1e-3, 1.0, 1e4, 1e38]),
    special=st.sampled_from([None, float("inf"), float("nan"), 0.0, 30.0]),
    first=st.integers(0, 2**20),
    seed=st.integers(0, 2**64 - 1),
    threads=st.sampled_from((1, 1, 1, 2, 3)),  # more are slow where others use the machine
)
@example(QuicFL(4), 2, 12, 3.0, 2, (torch.float32, torch.float32), 1.0, None, 0, 0, 1)
@example(QuicFL(4, FRACTION), 1, 13, 3.3, 2, (torch.float32, torch.float16), 1.0, None, 0, 0, 2)
@example(Eden(8), 3, 12, 2.3, 3, (torch.bfloat16, torch.float16), 1.0, 30.0, 7, 1, 2)
@example(VectorQuantizer(2), 3, 9, 2.3, 3, (torch.float16, torch.bfloat16), 1.0, None, 7, 1, 2)
def test_same_bits_as_the_reference(
    quantizer: Quantizer,
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
    codec = Codec(quantizer, rotations, block)
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
@pytest.mark.parametrize("quantizer", [QuicFL(4), QuicFL(3, FRACTION), Eden(2)], ids=repr)
@pytest.mark.parametrize("threads", [1, 3])
def test_shards_are_those_of_the_reference(quantizer: Quantizer, threads: int) -> None:
    codec, count, key = Codec(quantizer, block=512), 5, Key(3)
    x = torch.randn(count * 3 * 512, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with run_on(reference):
            payloads = codec.encode(x, key, 1, 4, first=1024, shards=count)
            decoded = codec.decode_shards(payloads, key, len(x), first=1024, rank=1, world_size=4)
        for name, kernel in variants().items():
            with run_on(kernel):
                found = codec.encode(x, key, 1, 4, first=1024, shards=count)
                place = {"first": 1024, "rank": 1, "world_size": 4}
                assert torch.equal(found, payloads), name
                assert torch.equal(codec.decode_shards(found, key, len(x), **place), decoded), name
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("log_block", [5, 12, 15, 16])
@pytest.mark.parametrize("ties", [False, True])
def test_blocks_with_any_number_of_exact_coordinates(log_block: int, ties: bool) -> None:
    block, ranks, key = 1 << log_block, 2, Key(log_block)
    quantizer = QuicFL(2, FRACTION)
    codec, capacity = Codec(quantizer, 1, block), quantizer.exact_capacity(block)
    generator = torch.Generator().manual_seed(block)
    counts = [0, 1, capacity - 1, capacity, capacity + 1, capacity + 2, block // 10, block]
    xs = []
    for _ in range(ranks):
        # Small integers, which the transforms there and back leave as they are.
        y = torch.randint(-1, 2, (len(counts), block), generator=generator).float()
        for row, count in zip(y, counts, strict=True):
            places = torch.randperm(block, generator=generator)[:count]
            row[places] = 40.0 if ties else 40.0 + torch.arange(count) % 19
            row *= 1 - 2 * torch.randint(0, 2, (block,), generator=generator)
        xs.append(RandomizedHadamard(1, block).unrotate(y, key, 0).flatten() / block)
    expected = both_ways(reference, codec, xs, key, 0, torch.float32)
    (section,) = rhtcomm.codec._layout(codec, xs[0].numel())
    _, rows = section.views(expected[0])
    kind = torch.int16 if block <= 1 << 15 else torch.int32
    edge = block // 4
    indices = rows[..., edge : edge + capacity * kind.itemsize].contiguous().view(kind)
    sent = (indices >= 0).sum(dim=-1)
    assert 0 <= int(sent.min()) < int(sent.max()) == capacity
    for name, kernel in variants().items():
        found = both_ways(kernel, codec, xs, key, 0, torch.float32)
        assert all(map(torch.equal, found, expected)), name


@pytest.mark.parametrize("quantizer", [QuicFL(4), QuicFL(4, FRACTION), Eden(2), VectorQuantizer(2)])
def test_equal_quantizers_share_a_table_which_stays(quantizer: Quantizer) -> None:
    """The C and Triton kernels keep what they took from it for whatever quantizer equals it."""
    codec = Codec(quantizer)
    assert codec.fingerprint  # and what else it finds out about itself
    copy = pickle.loads(pickle.dumps(codec))
    assert copy == codec
    assert "fingerprint" not in vars(copy)
    assert copy.quantizer.table is codec.quantizer.table  # type: ignore[attr-defined]
    assert len(pickle.dumps(codec)) < 300


def random_payloads(codec: Codec, numel: int, ranks: int, key: Key) -> torch.Tensor:
    """Anything behind honest headers."""
    shape = (ranks, codec.nbytes(numel))
    generator = torch.Generator().manual_seed(key.seed)
    payloads = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for rank in range(ranks):
        honest = codec.encode(torch.zeros(numel), key, rank, ranks)
        payloads[rank, : rhtcomm.codec.HEADER_BYTES] = honest[: rhtcomm.codec.HEADER_BYTES]
    return payloads


def check_that_all_decode_alike(codec: Codec, payloads: torch.Tensor, key: Key, numel: int) -> None:
    means = []
    for kernel in (reference, *variants().values()):
        with run_on(kernel):
            means.append(codec.decode_mean(payloads, key, numel))
    for mean in means[1:]:
        assert torch.equal(mean.isnan(), means[0].isnan())
        assert torch.equal(mean.nan_to_num(), means[0].nan_to_num())


@needs_library
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_random_payloads_decode_alike_and_in_bounds(quantizer: Quantizer) -> None:
    codec, numel, key = Codec(quantizer, block=256), 256 * 3 + 77, Key(quantizer.bits)
    check_that_all_decode_alike(codec, random_payloads(codec, numel, 3, key), key, numel)


@needs_library
@pytest.mark.parametrize("log_block", [5, 12, 15, 16])
def test_random_exact_coordinates_decode_alike_and_in_bounds(log_block: int) -> None:
    block, blocks, ranks, key = 1 << log_block, 4, 3, Key(log_block)
    quantizer = QuicFL(4, FRACTION)
    codec, capacity = Codec(quantizer, block=block), quantizer.exact_capacity(block)
    payloads = random_payloads(codec, blocks * block, ranks, key)
    (section,) = rhtcomm.codec._layout(codec, blocks * block)
    scales, rows = section.views(payloads)
    generator = torch.Generator().manual_seed(block)
    scales.copy_(torch.rand(scales.shape, generator=generator))
    # Many that count, among them the first and the last, and each kind that does not.
    kind = torch.int16 if block <= 1 << 15 else torch.int32
    limits = torch.iinfo(kind)
    shape = (ranks, blocks, capacity)
    indices = torch.randint(0, block, shape, generator=generator).sort(dim=-1).values
    indices[0, 0, 0], indices[0, 1, -1], indices[1, 0, -1] = 0, block - 1, min(block, limits.max)
    odd = torch.tensor([-1, limits.min, limits.max, 0, block - 1, min(block, limits.max)])
    chosen = odd[torch.randint(0, len(odd), shape, generator=generator)]
    indices[1:] = torch.where(torch.rand(shape, generator=generator) < 0.1, chosen, indices)[1:]
    indices[2, :, -1] = indices[2, :, -min(2, capacity)]  # twice the same
    part = rows[..., block // 2 : block // 2 + capacity * kind.itemsize]
    part.copy_(indices.to(kind).view(torch.uint8))
    check_that_all_decode_alike(codec, payloads, key, blocks * block)


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
    x = RandomizedHadamard(2, size).unrotate(y, key, 0).flatten()
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
        timeout=limit(120),
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
    assert "install a C compiler" in forced.stderr
