"""A fuzz target for each property that is promised.

`make test` runs each for a few seconds, on the same examples every time. `make fuzz` runs them for
minutes on other ones: RHTCOMM_FUZZ says how many times as many, --hypothesis-seed which. What fails
is printed with a line that reproduces it, and tried first the next time.
"""

import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from libraries import FRACTION, QUANTIZERS, needs_library, variants
from problems import DTYPES, ROUNDOFF

from rhtcomm import Codec, Eden, Key, PayloadError, QuicFL, RandomizedHadamard, VectorQuantizer
from rhtcomm.kernels import reference, use
from rhtcomm.quantizers import Quantizer
from rhtcomm.reduce import split_into_chunks, split_into_shards
from rhtcomm.wire import HEADER_BYTES, Section

FACTOR = int(os.environ.get("RHTCOMM_FUZZ") or 0)
ALL = (*QUANTIZERS, *(Eden(bits, biased=True) for bits in (1, 4)), VectorQuantizer(2, biased=True))


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples * max(1, FACTOR),
        derandomize=not FACTOR,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# Inputs ------------------------------------------------------------------------------------------

FINITE = ("gaussian", "spread", "subnormal", "zeros", "minus zeros", "one", "steps")
ODD = ("bits", "huge", "infinite", "NaN", "one infinite", "one NaN")


def segment(kind: str, count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """(count,) of a dtype."""
    width = torch.int32 if dtype == torch.float32 else torch.int16
    limits, info = torch.iinfo(width), torch.finfo(dtype)

    def bits(low: int, high: int) -> torch.Tensor:
        drawn = torch.randint(low, high + 1, (count,), generator=generator)
        return drawn.to(width).view(dtype)

    normal = torch.randn(count, generator=generator)
    few = torch.zeros(count).index_fill_(0, torch.arange(count // 2, min(count, count // 2 + 1)), 1)
    # Exponents such that a block of 2^13 of them can be summed and squared in every dtype.
    spread = torch.randint(-10, 4, (count,), generator=generator)
    match kind:
        case "bits":
            return bits(limits.min, limits.max)
        case "subnormal":
            return bits(0, int(torch.tensor(info.tiny, dtype=dtype).view(width)))
        case "gaussian":
            x = normal
        case "spread":
            x = torch.ldexp(normal, spread * (1 if dtype == torch.float16 else 3))
        case "zeros":
            x = torch.zeros(count)
        case "minus zeros":
            x = -torch.zeros(count)
        case "one":
            x = few * -2.5
        case "steps":
            x = normal.round()
        case "huge":
            x = normal.sign() * info.max
        case "infinite":
            x = normal * torch.inf
        case "NaN":
            x = normal * torch.nan
        case "one infinite":
            x = torch.where(few > 0, torch.inf, normal)
        case _:
            x = torch.where(few > 0, torch.nan, normal)
    return x.to(dtype)


@st.composite
def inputs(draw: Any, numel: int, dtype: torch.dtype, kinds: tuple[str, ...]) -> torch.Tensor:
    """(numel,) of up to four segments of one kind each."""
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    edges = [numel * i // len(chosen) for i in range(len(chosen) + 1)]
    sizes = [stop - start for start, stop in itertools.pairwise(edges)]
    return torch.cat(
        [segment(kind, n, dtype, generator) for kind, n in zip(chosen, sizes, strict=True)]
    )


keys = st.builds(
    Key,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 15),
)


@st.composite
def codecs(draw: Any, quantizers: tuple[Quantizer, ...] = ALL) -> Codec:
    quantizer = draw(st.sampled_from(quantizers))
    return Codec(quantizer, draw(st.integers(1, 3)), 1 << draw(st.integers(5, 13)))


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """Integers by which 0 differs from -0, while all NaN are one."""
    nan = torch.where(x.isnan(), torch.nan, x.float())
    return nan.view(torch.int32)


# Properties --------------------------------------------------------------------------------------


@fuzz(120)
@given(st.data(), codecs(), st.integers(1, 20_000), st.sampled_from(DTYPES), keys)
def test_round_trip_keeps_the_bound_of_the_quantizer(
    data: st.DataObject, codec: Codec, numel: int, dtype: torch.dtype, key: Key
) -> None:
    """For every finite input, not on average.

    QUIC-FL: no coordinate is further off, in scales, than H + 1 levels and a node are apart, or
    what float16 rounds away of an exact one. EDEN and vectors: the estimate's projection on the
    input is the input, or that of the input on the estimate is the estimate where it is biased.
    """
    x = data.draw(inputs(numel, dtype, FINITE))
    payload = codec.encode(x, key)
    found = codec.decode_mean(payload[None], key, numel).double()
    exact, quantizer = x.double(), codec.quantizer
    rotated = RandomizedHadamard(codec.default_rotations, codec.block).forward(x, key)
    for section in codec.layout(numel):
        blocks = section.blocks
        rows = blocks.rows(exact[blocks.offset : blocks.stop])
        estimates = blocks.rows(found[blocks.offset : blocks.stop])
        scales = section.views(payload)[0].double()
        norm, length = rows.norm(dim=1), estimates.norm(dim=1)
        root = math.sqrt(blocks.size)
        # Layers of butterflies both ways, halving-tree sums, and a few more.
        rounding = (2 * codec.default_rotations + 1) * math.log2(blocks.size) + 16
        slack = ROUNDOFF * rounding * (norm + length)
        least = 32 * root * 2.0**-149  # the last bit of subnormal scales and results
        error = (estimates - rows).norm(dim=1)
        if isinstance(quantizer, QuicFL):
            table = quantizer.table
            share = 1 << table.shared_bits
            levels = np.asarray(table.levels, np.float64).reshape(-1, share)[:, ::-1].ravel()
            apart = float((levels[share + 1 :] - levels[: -share - 1]).max())
            apart += 2 * table.bound / table.nodes
            beyond = 2.0**-10 * norm if quantizer.exact_fraction else 0.0
            assert bool((error <= root * scales * apart + beyond + slack + least).all())
            # As many as there is room for are exact; the largest of the others fits.
            room = quantizer.exact_capacity(blocks.size)
            peaks = rotated[blocks.offset : blocks.stop].view(rows.shape).abs().double()
            peak = peaks.topk(room + 1, dim=1).values[:, -1]
            wanted = torch.maximum(norm / root, peak / table.bound)
            assert bool(((scales - wanted).abs() <= 1e-5 * wanted + least).all())
        elif not quantizer.biased:  # type: ignore[attr-defined]
            off = (estimates * rows).sum(dim=1) - norm.square()
            assert bool((off.abs() <= (slack + least) * (norm + length)).all())
        elif blocks.stop <= numel:  # the estimate of the padding counts too
            off = (estimates * rows).sum(dim=1) - length.square()
            assert bool((off.abs() <= (slack + least) * (norm + length)).all())


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@fuzz(40)
@given(st.data(), codecs(), st.integers(1, 20_000), st.sampled_from(DTYPES), keys)
def test_encoding_twice_gives_equal_bytes(
    data: st.DataObject, codec: Codec, numel: int, dtype: torch.dtype, key: Key
) -> None:
    """Whatever lies in memory before, however the tensor lies there, and on any threads."""
    x = data.draw(inputs(numel, dtype, FINITE + ODD))
    before = x.clone()
    payload = codec.encode(x, key, 1, 3)
    assert torch.equal(x.view(torch.uint8), before.view(torch.uint8))
    again = torch.full_like(payload, 0xA5)
    strided = torch.stack([x, torch.ones_like(x)], dim=1)[:, 0]
    with threads(2):
        fresh = Codec(codec.quantizer, codec.rotations, codec.block)
        fresh.encode(strided, key, 1, 3, out=again)
    assert torch.equal(payload, again)
    origin = {"first_rank": 1, "world_size": 3}
    once = codec.decode_mean(payload[None], key, numel, **origin)
    out = torch.full((numel,), torch.nan)
    codec.decode_mean(again[None], key, numel, **origin, out=out)
    assert torch.equal(bits_of(once), bits_of(out))


GUARD = 64


def change_indices(
    codec: Codec, section: Section, payloads: np.ndarray[Any, Any], generator: np.random.Generator
) -> None:
    """Of exact coordinates, to ones about the ends of what a block has."""
    quantizer, size = codec.quantizer, section.blocks.size
    assert isinstance(quantizer, QuicFL)
    room, kind = quantizer.exact_capacity(size), np.dtype("<i2" if size <= 1 << 15 else "<i4")
    rows = payloads[:, section.codes : section.stop].reshape(
        len(payloads), section.blocks.count, -1
    )
    ends = (-2, -1, 0, 1, size - 2, size - 1, size, size + 1, *generator.integers(0, size, 8))
    drawn = generator.choice(ends, (*rows.shape[:2], room)).astype(kind)
    edge = size * quantizer.bits // 8
    rows[..., edge : edge + room * kind.itemsize] = np.sort(drawn).view(np.uint8)
    payloads[:, section.codes : section.stop] = rows.reshape(len(payloads), -1)


@needs_library
@fuzz(150)
@given(
    st.data(),
    codecs(),
    st.sampled_from((None, "auto")),
    st.integers(1, 3000),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    keys,
    st.integers(0, 2**32),
    st.sampled_from(("body", "some", "indices", "header", "all", "length")),
)
def test_any_bytes_decode_alike_or_raise_and_stay_in_bounds(
    data: st.DataObject,
    codec: Codec,
    rotations: Any,
    numel: int,
    ranks: int,
    dtype: torch.dtype,
    key: Key,
    seed: int,
    damage: str,
) -> None:
    quantizer = codec.quantizer
    if damage == "indices":
        quantizer = QuicFL(quantizer.bits, FRACTION)
    codec = Codec(quantizer, rotations or codec.rotations, codec.block)
    generator = np.random.Generator(np.random.PCG64(seed))
    x = data.draw(inputs(numel, torch.float32, FINITE + ODD))
    payloads = torch.stack([codec.encode(x, key, rank, ranks) for rank in range(ranks)]).numpy()
    noise = generator.integers(0, 256, payloads.shape, np.uint8)
    match damage:
        case "body":
            payloads[:, HEADER_BYTES:] = noise[:, HEADER_BYTES:]
        case "some":
            hit = generator.random(payloads.shape) < generator.choice([0.001, 0.03, 0.3])
            hit[:, :HEADER_BYTES] = False
            payloads[hit] = noise[hit]
        case "indices":
            for section in codec.layout(numel):
                change_indices(codec, section, payloads, generator)
        case "header":
            payloads[-1, generator.integers(HEADER_BYTES)] = noise[0, 0]
        case "all":
            payloads = noise
        case _:
            length = data.draw(st.integers(0, 2 * payloads.shape[1]))
            payloads = np.resize(payloads, (ranks, length))
    results = []
    for name, kernel in (("reference", reference), *variants().items()):
        whole = torch.full((numel + 2 * GUARD,), 7.0, dtype=dtype)
        with use(kernel):
            try:
                out = whole[GUARD:-GUARD]
                codec.decode_mean(torch.from_numpy(payloads), key, numel, out=out)
                results.append((name, bits_of(out)))
            except PayloadError as error:
                results.append((name, str(error)))
        assert bool((whole[:GUARD] == 7).all() and (whole[-GUARD:] == 7).all()), name
    name, expected = results[0]
    assert isinstance(expected, str) or damage not in ("all", "length")
    for name, found in results[1:]:
        same = found == expected if isinstance(found, str) else torch.equal(found, expected)
        assert same, name


@needs_library
@fuzz(60)
@given(
    st.data(),
    codecs(),
    st.integers(1, 20_000),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 2**20),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    keys,
)
def test_every_kernel_agrees(
    data: st.DataObject,
    codec: Codec,
    numel: int,
    ranks: int,
    others: int,
    offset: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    key: Key,
) -> None:
    """On inputs of any bits. test_gpu_kernels.py has the same for Triton's, block by block."""
    xs = [data.draw(inputs(numel, dtype, FINITE + ODD)) for _ in range(ranks)]
    offset *= codec.block
    origin = {"offset": offset, "world_size": ranks + others}
    results = {}
    for name, kernel in (("reference", reference), *variants().items()):
        with use(kernel):
            payloads = torch.stack(
                [codec.encode(x, key, others + i, **origin) for i, x in enumerate(xs)]
            )
            out = torch.empty(numel, dtype=out_dtype)
            codec.decode_mean(payloads, key, numel, **origin, first_rank=others, out=out)
        results[name] = payloads, bits_of(out)
    for name, found in results.items():
        assert all(map(torch.equal, found, results["reference"])), name


@fuzz(60)
@given(
    st.data(),
    codecs(),
    st.integers(1, 12_000),
    st.integers(1, 3),
    st.integers(0, 2**20),
    st.sampled_from(DTYPES),
    keys,
)
def test_any_split_into_chunks_and_shards_agrees(
    data: st.DataObject,
    codec: Codec,
    numel: int,
    ranks: int,
    offset: int,
    dtype: torch.dtype,
    key: Key,
) -> None:
    """Scales, codes and means of chunks and shards are those of the whole."""
    block, offset = codec.block, offset * codec.block
    xs = [data.draw(inputs(numel, dtype, FINITE + ODD)) for _ in range(ranks)]
    cuts = data.draw(st.sets(st.integers(1, max(1, (numel - 1) // block)), max_size=4))
    edges = [0, *(cut * block for cut in sorted(cuts) if cut * block < numel), numel]

    def encode(start: int, stop: int) -> torch.Tensor:
        origin = {"world_size": ranks, "offset": offset + start}
        return torch.stack(
            [codec.encode(x[start:stop], key, r, **origin) for r, x in enumerate(xs)]
        )

    whole = encode(0, numel)
    mean = codec.decode_mean(whole, key, numel, offset=offset)
    for start, stop in itertools.pairwise(edges):
        chunk = encode(start, stop)
        assert (
            rows_of(codec, chunk, stop - start)
            == rows_of(codec, whole, numel)[start // block : -(-stop // block)]
        )
        found = codec.decode_mean(chunk, key, stop - start, offset=offset + start)
        assert torch.equal(bits_of(found), bits_of(mean[start:stop]))

    # Several shards have whole blocks; here those of the last rank.
    shards = data.draw(st.integers(1, 6))
    each, rank = numel // (shards * block) * block, ranks - 1
    x, origin = xs[-1][: shards * each], {"world_size": ranks, "offset": offset}
    rows = codec.encode(x, key, rank, **origin, shards=shards)
    alone = [encode(i * each, (i + 1) * each)[-1] for i in range(shards)]
    assert torch.equal(rows, torch.stack(alone))
    found = codec.decode_shards(rows, key, len(x), rank=rank, **origin)
    payload = codec.encode(x, key, rank, **origin)[None]
    expected = codec.decode_mean(payload, key, len(x), first_rank=rank, **origin)
    assert torch.equal(bits_of(found), bits_of(expected))


def rows_of(codec: Codec, payloads: torch.Tensor, numel: int) -> list[bytes]:
    """Scales and codes of all ranks, block by block."""
    return [
        b"".join(view[:, row].numpy().tobytes() for view in section.views(payloads))
        for section in codec.layout(numel)
        for row in range(section.blocks.count)
    ]


@fuzz(200)
@given(st.integers(0, 1 << 30), st.integers(5, 24), st.integers(1, 3000))
def test_chunks_and_shards_are_whole_blocks_and_make_the_whole(
    numel: int, log_block: int, world_size: int
) -> None:
    block = 1 << log_block
    for chunks in (
        split_into_chunks(numel, block, world_size),
        split_into_shards(numel, block, world_size)[: max(1, -(-numel // block))],
    ):
        end = 0
        for chunk in chunks:
            if chunk.start == chunk.stop == 0:
                continue
            assert chunk.start == end
            assert chunk.start % block == 0
            end = chunk.stop
        assert end == numel
    assert len(split_into_shards(numel, block, world_size)) == world_size
