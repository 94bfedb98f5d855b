"""The C kernels against the torch reference: the same bits, always."""

import pickle
import threading

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from libraries import ECDQS, FRACTION, QUANTIZERS, both_ways, choose, needs_library, variants
from problems import DTYPES

from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL, RandomizedHadamard, VectorQuantizer
from rhtcomm.kernels import reference, use
from rhtcomm.quantizers import Quantizer
from rhtcomm.wire import HEADER_BYTES


@needs_library
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    quantizer=st.sampled_from((*QUANTIZERS, *ECDQS)),
    rotations=st.integers(1, 3),
    log_block=st.integers(5, 13),
    blocks=st.floats(0.01, 3.5),
    ranks=st.integers(1, 5),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    magnitude=st.sampled_from([0.0, 1e-42, 1e-38, 1e-3, 1.0, 1e4, 1e38]),
    special=st.sampled_from([None, float("inf"), float("nan"), 0.0, 30.0]),
    offset=st.integers(0, 2**20),
    seed=st.integers(0, 2**64 - 1),
    threads=st.sampled_from((1, 1, 1, 2, 3)),  # more are slow where others use the machine
)
@example(QuicFL(4), 2, 12, 3.0, 2, (torch.float32, torch.float32), 1.0, None, 0, 0, 1)
@example(QuicFL(4, FRACTION), 1, 13, 3.3, 2, (torch.float32, torch.float16), 1.0, None, 0, 0, 2)
@example(Eden(8), 3, 12, 2.3, 3, (torch.bfloat16, torch.float16), 1.0, 30.0, 7, 1, 2)
@example(ECDQ(4), 1, 12, 17.3, 2, (torch.float32, torch.float32), 1.0, None, 3, 1, 2)
@example(ECDQ(1), 2, 9, 140.1, 3, (torch.bfloat16, torch.float16), 1e38, 30.0, 7, 1, 3)
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
    offset: int,
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
    expected = both_ways(reference, codec, xs, key, offset * block, dtypes[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, kernel in variants().items():
            payloads, mean = both_ways(kernel, codec, xs, key, offset * block, dtypes[1])
            assert torch.equal(payloads, expected[0]), name
            assert torch.equal(mean, expected[1]), name
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize(
    "quantizer", [QuicFL(4), QuicFL(3, FRACTION), Eden(2), ECDQ(2.5)], ids=repr
)
@pytest.mark.parametrize("threads", [1, 3])
def test_shards_are_those_of_the_reference(quantizer: Quantizer, threads: int) -> None:
    codec, count, key = Codec(quantizer, block=512), 5, Key(3)
    x = torch.randn(count * 3 * 512, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use(reference):
            payloads = codec.encode(x, key, 1, 4, offset=1024, shards=count)
            decoded = codec.decode_shards(payloads, key, len(x), offset=1024, rank=1, world_size=4)
        for name, kernel in variants().items():
            with use(kernel):
                found = codec.encode(x, key, 1, 4, offset=1024, shards=count)
                origin = {"offset": 1024, "rank": 1, "world_size": 4}
                assert torch.equal(found, payloads), name
                assert torch.equal(codec.decode_shards(found, key, len(x), **origin), decoded), name
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
            chosen = torch.randperm(block, generator=generator)[:count]
            row[chosen] = 40.0 if ties else 40.0 + torch.arange(count) % 19
            row *= 1 - 2 * torch.randint(0, 2, (block,), generator=generator)
        xs.append(RandomizedHadamard(1, block).unrotate(y, key, 0).flatten() / block)
    expected = both_ways(reference, codec, xs, key, 0, torch.float32)
    (section,) = codec.layout(xs[0].numel())
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
        payloads[rank, :HEADER_BYTES] = honest[:HEADER_BYTES]
    return payloads


def check_that_all_decode_alike(codec: Codec, payloads: torch.Tensor, key: Key, numel: int) -> None:
    means = []
    for kernel in (reference, *variants().values()):
        with use(kernel):
            means.append(codec.decode_mean(payloads, key, numel))
    for mean in means[1:]:
        assert torch.equal(mean.isnan(), means[0].isnan())
        assert torch.equal(mean.nan_to_num(), means[0].nan_to_num())


@needs_library
@pytest.mark.parametrize("quantizer", [*QUANTIZERS, *ECDQS], ids=repr)
def test_random_payloads_decode_alike_and_in_bounds(quantizer: Quantizer) -> None:
    codec, numel, key = Codec(quantizer, block=256), 256 * 3 + 77, Key(int(quantizer.bits))
    check_that_all_decode_alike(codec, random_payloads(codec, numel, 3, key), key, numel)


@needs_library
@pytest.mark.parametrize("log_block", [5, 12, 15, 16])
def test_random_exact_coordinates_decode_alike_and_in_bounds(log_block: int) -> None:
    block, blocks, ranks, key = 1 << log_block, 4, 3, Key(log_block)
    quantizer = QuicFL(4, FRACTION)
    codec, capacity = Codec(quantizer, block=block), quantizer.exact_capacity(block)
    payloads = random_payloads(codec, blocks * block, ranks, key)
    (section,) = codec.layout(blocks * block)
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
    entries = rows[..., block // 2 : block // 2 + capacity * kind.itemsize]
    entries.copy_(indices.to(kind).view(torch.uint8))
    check_that_all_decode_alike(codec, payloads, key, blocks * block)


@needs_library
def test_threads_that_call_at_the_same_time_do_not_disturb_each_other() -> None:
    codec, key = Codec(QuicFL(4)), Key(5)
    xs = [torch.randn(1 << 18, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    kernel = next(iter(variants().values()))
    with use(kernel):
        alone = [codec.encode(x, key) for x in xs]
        together: list[list[torch.Tensor]] = [[] for _ in xs]

        def work(i: int) -> None:
            for _ in range(10):
                together[i].append(codec.encode(xs[i], key))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for expected, found in zip(alone, together, strict=True):
        assert len(found) == 10
        assert all(torch.equal(expected, one) for one in found)


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
