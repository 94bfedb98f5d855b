"""A fuzz target for each property that is promised.

`make test` runs each for a few seconds, on the same examples every time. `make fuzz` runs them for
minutes on other ones: RHTCOMM_FUZZ says how many times as many, --hypothesis-seed which. What fails
is printed with a line that reproduces it, and tried first the next time.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fuzzing import FINITE, ODD, bits_of, codecs, fuzz, inputs, keys, lengths
from hypothesis import given
from hypothesis import strategies as st
from libraries import FRACTION, needs_library, variants
from problems import DTYPES, ROUNDOFF

from rhtcomm import ECDQ, Codec, Key, PayloadError, QuicFL, RandomizedHadamard
from rhtcomm.kernels import reference, use
from rhtcomm.quantizers.ecdq import FACTORS
from rhtcomm.reduce import split_into_chunks, split_into_shards
from rhtcomm.wire import HEADER_BYTES, Section


@fuzz(120)
@given(st.data(), codecs(), st.sampled_from(DTYPES), keys)
def test_round_trip_keeps_the_bound_of_the_quantizer(
    data: st.DataObject, codec: Codec, dtype: torch.dtype, key: Key
) -> None:
    """For every finite input, not on average.

    QUIC-FL: no coordinate is further off, in scales, than H + 1 levels and a node are apart, or
    what float16 rounds away of an exact one. ECDQ: no rotated coordinate is further off than half
    a step. EDEN and vectors: the estimate's projection on the input is the input, or that of the
    input on the estimate is the estimate where it is biased.
    """
    numel = data.draw(lengths(codec, 20_000))
    x = data.draw(inputs(numel, dtype, FINITE))
    payload = codec.encode(x, key)
    found = codec.decode_mean(payload[None], key, numel)
    exact, quantizer = x.double(), codec.quantizer
    rotated = RandomizedHadamard(codec.default_rotations, codec.block).forward(x, key)
    again = RandomizedHadamard(codec.default_rotations, codec.block).forward(found, key)
    for section in codec.layout(numel):
        blocks = section.blocks
        rows = blocks.rows(exact[blocks.offset : blocks.stop])
        estimates = blocks.rows(found.double()[blocks.offset : blocks.stop])
        scales = scales_of(section, payload).double()
        norm, length = rows.norm(dim=1), estimates.norm(dim=1)
        root = math.sqrt(blocks.size)
        # Layers of butterflies both ways, halving-tree sums, and a few more.
        rounding = (2 * codec.default_rotations + 1) * math.log2(blocks.size) + 16
        slack = ROUNDOFF * rounding * (norm + length)
        least = 32 * root * 2.0**-149  # the last bit of subnormal scales and results
        error = (estimates - rows).norm(dim=1)
        y, y_again = (
            each[blocks.offset : blocks.stop].view(rows.shape) for each in (rotated, again)
        )
        peaks = y.double().abs()
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
            peak = peaks.topk(room + 1, dim=1).values[:, -1]
            wanted = torch.maximum(norm / root, peak / table.bound)
            assert bool(((scales - wanted).abs() <= 1e-5 * wanted + least).all())
        elif isinstance(quantizer, ECDQ):
            # Of a value up to 4 K scales, the last bit of a scale is as many last bits.
            least *= 1 + quantizer.table.largest
            # Half a step of four scales; a receiver's dither is one of 256, and z / D is truncated.
            half = 4 * (1 / 2 + 2.0**-9 + 2.0**-15)
            assert bool((error <= root * scales * half + slack + least).all())
            if blocks.stop <= numel:  # else the estimate of the padding is not known
                furthest = (y_again.double() - y.double()).abs().amax(dim=1)
                assert bool((furthest <= scales * half + slack + least).all())
            wanted = torch.maximum(norm / root, peaks.amax(dim=1) * quantizer.table.inverse_bound)
            check_factors(quantizer, scales, wanted * quantizer.table.quarter_step, blocks.size)
        elif not quantizer.biased:  # type: ignore[attr-defined]
            off = (estimates * rows).sum(dim=1) - norm.square()
            assert bool((off.abs() <= (slack + least) * (norm + length)).all())
        elif blocks.stop <= numel:  # the estimate of the padding counts too
            off = (estimates * rows).sum(dim=1) - length.square()
            assert bool((off.abs() <= (slack + least) * (norm + length)).all())


def check_factors(quantizer: ECDQ, scales: torch.Tensor, wanted: torch.Tensor, size: int) -> None:
    """Scales (B,) are those wanted times one of the factors, the same throughout a unit."""
    least = 2.0**-147
    nearest = (scales[:, None] - wanted[:, None] * torch.tensor(FACTORS)).abs().min(dim=1)
    assert bool((nearest.values <= 1e-5 * wanted + least).all())
    for rows in range(0, len(scales), quantizer.unit(size)):
        unit = slice(rows, rows + quantizer.unit(size))
        ordinary = wanted[unit] > 1e-35
        assert len(nearest.indices[unit][ordinary].unique()) <= 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@fuzz(40)
@given(st.data(), codecs(), st.sampled_from(DTYPES), keys)
def test_encoding_twice_gives_equal_bytes(
    data: st.DataObject, codec: Codec, dtype: torch.dtype, key: Key
) -> None:
    """Whatever lies in memory before, however the tensor lies there, and on any threads."""
    numel = data.draw(lengths(codec, 20_000))
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
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    keys,
    st.integers(0, 2**32),
    st.sampled_from(("body", "constant", "some", "indices", "header", "all", "length")),
)
def test_any_bytes_decode_alike_or_raise_and_stay_in_bounds(
    data: st.DataObject,
    codec: Codec,
    rotations: Any,
    ranks: int,
    dtype: torch.dtype,
    key: Key,
    seed: int,
    damage: str,
) -> None:
    quantizer, numel = codec.quantizer, data.draw(lengths(codec, 3000))
    if damage == "indices":
        quantizer = QuicFL(int(quantizer.bits), FRACTION)
    codec = Codec(quantizer, rotations or codec.rotations, codec.block)
    generator = np.random.Generator(np.random.PCG64(seed))
    x = data.draw(inputs(numel, torch.float32, FINITE + ODD))
    payloads = torch.stack([codec.encode(x, key, rank, ranks) for rank in range(ranks)]).numpy()
    noise = generator.integers(0, 256, payloads.shape, np.uint8)
    match damage:
        case "body":
            payloads[:, HEADER_BYTES:] = noise[:, HEADER_BYTES:]
        case "constant":
            payloads[:, HEADER_BYTES:] = generator.choice([0, 1, 127, 128, 255])
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
    ranks: int,
    others: int,
    offset: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    key: Key,
) -> None:
    """On inputs of any bits. test_gpu_kernels.py has the same for Triton's, block by block."""
    numel = data.draw(lengths(codec, 20_000))
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
    st.integers(1, 3),
    st.integers(0, 2**20),
    st.sampled_from(DTYPES),
    keys,
)
def test_any_split_into_chunks_and_shards_agrees(
    data: st.DataObject,
    codec: Codec,
    ranks: int,
    offset: int,
    dtype: torch.dtype,
    key: Key,
) -> None:
    """Scales, codes and means of chunks and shards are those of the whole.

    ECDQ codes units, which a cut makes others. Values of blocks are the same, and so are scales,
    unless a unit did not fit on one side alone.
    """
    block, offset, numel = codec.block, offset * codec.block, data.draw(lengths(codec, 12_000))
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
        found = codec.decode_mean(chunk, key, stop - start, offset=offset + start)
        check_part(codec, (whole, mean), (chunk, found), start, stop)

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
    for i in range(shards):
        start, stop = i * each, (i + 1) * each
        check_part(codec, (payload, expected), (rows[i : i + 1], found[start:stop]), start, stop)


def check_part(
    codec: Codec,
    whole: tuple[torch.Tensor, torch.Tensor],
    part: tuple[torch.Tensor, torch.Tensor],
    start: int,
    stop: int,
) -> None:
    """Payloads and mean of coordinates start .. stop against those of the whole."""
    (payloads, mean), (payloads_of_part, mean_of_part) = whole, part
    if start == stop:
        return
    blocks = slice(start // codec.block, -(-stop // codec.block))
    expected, found = bits_of(mean[start:stop]), bits_of(mean_of_part)
    if not isinstance(codec.quantizer, ECDQ):
        rows = rows_of(codec, payloads, len(mean))[blocks]
        assert rows_of(codec, payloads_of_part, stop - start) == rows
        assert torch.equal(found, expected)
        return
    scales, scales_of_part = (
        torch.cat([scales_of(section, each) for section in codec.layout(numel)], dim=1)
        for each, numel in ((payloads, len(mean)), (payloads_of_part, stop - start))
    )
    pairs = torch.stack([scales[:, blocks], scales_of_part]).double()
    same = (pairs.isnan().all(dim=0)) | (pairs[0] == pairs[1])
    ours, theirs = pairs[:, ~same]
    quotients = torch.tensor([a / b for a in FACTORS for b in FACTORS if a != b]).double()
    off = (ours[:, None] - theirs[:, None] * quotients).abs().amin(dim=1)
    assert bool((off <= 1e-5 * ours + 2.0**-147).all())
    alike = same.all(dim=0).repeat_interleave(codec.block)[: stop - start]
    assert torch.equal(found[alike], expected[alike])


def scales_of(section: Section, payloads: torch.Tensor) -> torch.Tensor:
    """payloads (..., nbytes) -> (..., B) float32."""
    return payloads[..., section.scales : section.codes].view(torch.float32)


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
