"""The codec against a literal float64 receiver, and against everything a payload may meet."""

import itertools
import math
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    BITS,
    QUANTIZERS,
    ROUNDOFF,
    FloatArray,
    codec_name,
    gaussian,
    generator,
    lognormal,
    sylvester,
    sylvester_row,
)

from rhtcomm import Codec, Eden, Key, PayloadError, QuicFL, codebooks
from rhtcomm.bitpack import unpack
from rhtcomm.codec import DTYPES
from rhtcomm.randomness import Stream, dither, signs, stratum
from rhtcomm.rotation import split_into_blocks

KEY = Key(seed=31, step=32, bucket=33)
CPU = torch.device("cpu")
STREAMS = (Stream.SIGNS_1, Stream.SIGNS_2, Stream.SIGNS_3)
SIZES = [0, 1, 15, 255, 256, 257, 4095, 4096, 4097, 3 * 4096, 20000, (1 << 17) + 4096 + 700]
CODECS = [
    *(Codec(method(bits)) for method in QUANTIZERS for bits in (1, 4, 7)),
    Codec(QuicFL(3), rotations=1, block=256),
    Codec(Eden(5), rotations=3, block=32),
]


def codecs(*chosen: Codec) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("codec", chosen or CODECS, ids=codec_name)


def round_trip(codec: Codec, x: torch.Tensor, key: Key = KEY) -> torch.Tensor:
    return codec.decode_mean(codec.encode(x, key)[None], key, x.numel())


def encode_all(codec: Codec, inputs: list[torch.Tensor], key: Key = KEY) -> torch.Tensor:
    return torch.stack([codec.encode(x, key, rank, len(inputs)) for rank, x in enumerate(inputs)])


def literal_receiver(
    payload: torch.Tensor, codec: Codec, numel: int, rank: int, world_size: int, offset: int = 0
) -> FloatArray:
    """One rank's estimate (padded numel,), by the wire format and the schemes alone, in float64."""
    quantizer, rotations, byte, estimates = codec.quantizer, codec.rotations, 16, []
    assert rotations is not None
    raw = bytes(payload.tolist())
    for blocks in split_into_blocks(numel, codec.block):
        scales = struct.unpack_from(f"<{blocks.count}f", raw, byte)
        byte += 4 * blocks.count
        for row, scale in enumerate(scales):
            length = blocks.size * quantizer.bits // 8
            codes = unpack(payload[None, byte : byte + length], quantizer.bits, blocks.size)[
                0
            ].numpy()
            byte += length
            begin = offset + blocks.offset + row * blocks.size
            if isinstance(quantizer, Eden):
                values = codebooks.load("lloyd_max")[f"b{quantizer.bits}"][codes]
                values, signs_of = values.astype(np.float32).astype(np.float64), rank
            else:
                levels = codebooks.load("quic_fl")[f"b{quantizer.bits}"].astype(np.float32)
                share = len(levels) >> quantizer.bits
                _, v = dither(KEY, begin, blocks.size, stratum(rank, world_size), CPU)
                h = share - 1 - np.floor(share * (v.double().numpy() / 65536)).astype(int)
                values, signs_of = levels[codes.astype(int) * share + h].astype(np.float64), 0
            y = scale * values
            for stream in reversed(STREAMS[:rotations]):
                diagonal = signs(KEY, stream, begin, blocks.size, signs_of, CPU).double().numpy()
                y = diagonal * (sylvester(blocks.size).T @ y)
            estimates.append(y)
    assert byte == len(raw)
    return np.concatenate(estimates) if estimates else np.zeros(0)


@pytest.mark.parametrize("world_size", [1, 3, 8])
@codecs(
    Codec(QuicFL(1), block=256),
    Codec(QuicFL(4), block=512),
    Codec(QuicFL(6), rotations=3, block=64),
    Codec(QuicFL(8), rotations=1, block=256),
    Codec(Eden(1), block=256),
    Codec(Eden(3), rotations=3, block=512),
    Codec(Eden(8), rotations=1, block=64),
)
def test_mean_is_that_of_literal_receivers(codec: Codec, world_size: int) -> None:
    """Payloads follow the documented format, and their mean is the mean."""
    numel, offset = 1000, 512 * 7
    # Ranks of very different magnitude, and one block that only some have.
    inputs = [gaussian(numel, rank) * 10.0 ** (rank - 2) for rank in range(world_size)]
    inputs[0][: codec.block] = 0
    payloads = torch.stack(
        [codec.encode(x, KEY, rank, world_size, offset=offset) for rank, x in enumerate(inputs)]
    )
    found = codec.decode_mean(payloads, KEY, numel, offset=offset).double().numpy()
    estimates = [
        literal_receiver(payload, codec, numel, rank, world_size, offset)
        for rank, payload in enumerate(payloads)
    ]
    exact = np.mean(estimates, axis=0)
    assert codec.rotations is not None
    for blocks in split_into_blocks(numel, codec.block):
        for start in range(blocks.offset, blocks.stop, blocks.size):
            here = slice(start, min(start + blocks.size, numel))
            # Each layer of butterflies rounds once, each rank's values twice and their sum once;
            # scales by a power of 2^(1/2) and the division by the world size once each.
            roundings = codec.rotations * math.log2(blocks.size) + world_size + 6
            norms = np.mean([np.linalg.norm(x[start : start + blocks.size]) for x in estimates])
            error = np.linalg.norm(found[here] - exact[here])
            assert error <= roundings * ROUNDOFF * norms


@codecs()
def test_payload_is_as_long_as_promised(codec: Codec) -> None:
    bits, block = codec.quantizer.bits, codec.block
    for numel in SIZES:
        length, full = 16, numel // block
        length += full * 4 + full * block * bits // 8
        rest = numel - full * block
        if rest:
            tail = min(256, block)
            while tail < rest:
                tail *= 2
            length += 4 + tail * bits // 8
        assert codec.nbytes(numel) == length
        for x in (gaussian(numel), torch.zeros(numel), torch.full((numel,), torch.nan)):
            payload = codec.encode(x, KEY)
            assert payload.dtype == torch.uint8
            assert payload.shape == (length,)


def test_four_bits_are_hardly_more() -> None:
    assert 8 * Codec(QuicFL(4)).nbytes(1 << 23) <= 4.02 * (1 << 23)


@codecs(*CODECS, Codec(QuicFL(2, 1 / 512), block=1024))
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_what_each_of_them_encoded_alone_gives(codec: Codec, dtype: torch.dtype) -> None:
    each, count, offset = 3 * codec.block, 4, 5 * codec.block
    x = gaussian(each * count).to(dtype)
    origin = {"rank": 2, "world_size": 3}
    out = torch.full((count, codec.nbytes(each)), 255, dtype=torch.uint8)
    payloads = codec.encode(x, KEY, **origin, offset=offset, shards=count, out=out)
    assert payloads.data_ptr() == out.data_ptr()
    expected, offsets = [], [offset + i * each for i in range(count)]
    for shard, payload, begin in zip(x.split(each), payloads, offsets, strict=True):
        assert torch.equal(payload, codec.encode(shard, KEY, **origin, offset=begin))
        decode = {"offset": begin, "first_rank": 2, "world_size": 3}
        expected.append(codec.decode_mean(payload[None], KEY, each, **decode))
    wide = torch.zeros(count, out.shape[1] + 4, dtype=torch.uint8)  # rows that lie apart
    wide[:, :-4] = payloads
    for rows in (payloads, wide[:, :-4]):
        assert torch.equal(
            codec.decode_shards(rows, KEY, len(x), **origin, offset=offset), torch.cat(expected)
        )


def test_one_shard_may_end_anywhere_but_several_may_not() -> None:
    codec, x = Codec(QuicFL(4), block=256), gaussian(1000)
    payloads = codec.encode(x, KEY, shards=1)
    assert torch.equal(payloads, codec.encode(x, KEY)[None])
    assert torch.equal(codec.decode_shards(payloads, KEY, 1000), round_trip(codec, x))
    for shards in (0, -1, 2, 4):
        with pytest.raises(
            ValueError, match=rf"1000 coordinates cannot be split into {shards} equal"
        ):
            codec.encode(x, KEY, shards=shards)
    with pytest.raises(ValueError, match=r"take \(2, \d+\) torch.uint8"):
        codec.encode(x[:512], KEY, shards=2, out=payloads)
    with pytest.raises(
        ValueError, match="decode_shards: 1000 coordinates cannot be split into 2 equal shards"
    ):
        codec.decode_shards(torch.zeros(2, codec.nbytes(500), dtype=torch.uint8), KEY, 1000)


def test_shards_in_another_order_or_of_another_rank_are_refused() -> None:
    codec, x = Codec(QuicFL(4), block=256), gaussian(1024)
    payloads = codec.encode(x, KEY, 1, 2, shards=4)
    assert torch.equal(
        codec.decode_shards(payloads, KEY, 1024, rank=1, world_size=2),
        codec.decode_mean(codec.encode(x, KEY, 1, 2)[None], KEY, 1024, first_rank=1, world_size=2),
    )
    with pytest.raises(PayloadError, match=r"another key, rank.*offset=256, numel=256"):
        codec.decode_shards(payloads[[0, 2, 1, 3]], KEY, 1024, rank=1, world_size=2)
    with pytest.raises(PayloadError, match="the payload of rank 0 was made for another"):
        codec.decode_shards(payloads, KEY, 1024, rank=0, world_size=2)
    with pytest.raises(PayloadError, match="cut short"):
        codec.decode_shards(payloads[:, :-4], KEY, 1024, rank=1, world_size=2)


def test_all_shards_say_how_many_rotations_the_whole_needs() -> None:
    codec = Codec(QuicFL(4), "auto", block=4096)
    x = gaussian(4 * 4096)
    x[4096:8192] = 0
    x[4100] = 100.0  # alone in the second shard
    for rotations in (1, 2):
        payloads = codec.encode(x, KEY, rotations=rotations, shards=4)
        (whole,) = codec.encode(x, KEY, rotations=rotations)[None]
        assert payloads[:, 3].tolist() == [int(whole[3])] * 4
        assert codec.wanted_rotations(payloads) == 2
        decoded = codec.decode_shards(payloads, KEY, len(x))
        assert torch.equal(decoded, codec.decode_mean(whole[None], KEY, len(x)))


@codecs()
def test_header_is_as_documented(codec: Codec) -> None:
    payload = bytes(codec.encode(gaussian(100), KEY).tolist())
    assert payload[:4] == b"RH" + bytes([1, codec.rotations or 0])
    assert payload[8:16] == codec.fingerprint


# vNMSE and kurtosis of the error at 8 bits, the worse of the two quantizers.
VNMSE_8, KURTOSIS_8 = 4.4e-5, 32


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", SIZES)
def test_round_trip(method: type[QuicFL] | type[Eden], dtype: torch.dtype, numel: int) -> None:
    codec, x = Codec(method(8)), gaussian(numel).to(dtype)
    before = x.clone()
    found = round_trip(codec, x)
    assert torch.equal(x, before)
    assert found.dtype == torch.float32
    assert found.shape == x.shape
    error = float((found - x.float()).square().sum())
    bound = VNMSE_8 * (1 + 6 * math.sqrt(KURTOSIS_8 / max(numel, 256)))
    assert error <= bound * float(x.float().square().sum())
    # Half precision enters exactly.
    assert torch.equal(found, round_trip(codec, x.float()))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    numel=st.integers(0, 3000),
    bits=st.integers(1, 8),
    exponent=st.integers(5, 12),
    rotations=st.integers(1, 3),
    eden=st.booleans(),
    world_size=st.integers(1, 5),
)
def test_any_configuration_makes_a_round_trip(
    numel: int, bits: int, exponent: int, rotations: int, eden: bool, world_size: int
) -> None:
    codec = Codec(Eden(bits) if eden else QuicFL(bits), rotations, 1 << exponent)
    inputs = [lognormal(numel, rank) for rank in range(world_size)]
    payloads = encode_all(codec, inputs)
    assert payloads.shape == (world_size, codec.nbytes(numel))
    found = codec.decode_mean(payloads, KEY, numel)
    assert found.shape == (numel,)
    assert bool(found.isfinite().all())


@codecs()
def test_strided_inputs_encode_as_contiguous_ones(codec: Codec) -> None:
    matrix = gaussian(6000).view(60, 100)
    for x in (
        matrix.t().reshape(-1)[::3],
        matrix[:, 7],
        matrix.flatten()[5::2],
        torch.tensor(1.5).expand(700),
    ):
        assert torch.equal(codec.encode(x, KEY), codec.encode(x.clone().contiguous(), KEY))


@codecs()
def test_out_of_any_dtype_takes_the_mean(codec: Codec) -> None:
    numel = 5000
    payloads = encode_all(codec, [gaussian(numel, rank) for rank in range(3)])
    expected = codec.decode_mean(payloads, KEY, numel)
    for dtype in DTYPES:
        buffer = torch.full((numel + 20,), 7.0, dtype=dtype)
        out = buffer[10:-10]
        assert codec.decode_mean(payloads, KEY, numel, out=out) is out
        assert torch.equal(out, expected.to(dtype))
        assert bool((buffer[:10] == 7).all())
        assert bool((buffer[-10:] == 7).all())


@pytest.mark.parametrize(
    ("out", "fact"),
    [
        (torch.zeros(4999), r"float32 of shape \(4999,\); it must be .* of shape \(5000,\)"),
        (torch.zeros(5000, 1), r"shape \(5000, 1\)"),
        (torch.zeros(5000, dtype=torch.float64), r"out is contiguous torch\.float64"),
        (torch.zeros(5000, dtype=torch.int32), r"out is contiguous torch\.int32"),
        (torch.zeros(10000)[::2], r"out is strided torch\.float32"),
        (torch.zeros(1).expand(5000), r"out is strided torch\.float32"),
    ],
)
def test_unfit_out_raises(out: torch.Tensor, fact: str) -> None:
    """Kernels would write elsewhere."""
    codec = Codec(QuicFL(4))
    payload = codec.encode(gaussian(5000), KEY)[None]
    with pytest.raises(ValueError, match=fact):
        codec.decode_mean(payload, KEY, 5000, out=out)
    assert not out.any()


@codecs(Codec(QuicFL(4)), Codec(Eden(4)))
def test_gradients_are_not_tracked(codec: Codec) -> None:
    x = gaussian(5000)
    leaf = x.clone().requires_grad_()
    assert torch.equal(codec.encode(leaf, KEY), codec.encode(x, KEY))


@codecs()
def test_shards_encode_and_decode_as_within_the_whole(codec: Codec) -> None:
    """Shards of any number of blocks hold the same bytes as the whole and decode alike."""
    block, numel = codec.block, 2 * (1 << 17) + 700
    whole = [gaussian(numel, rank) for rank in range(2)]
    payloads = encode_all(codec, whole)
    scales, codes, _ = sections(codec, payloads, numel)
    mean = codec.decode_mean(payloads, KEY, numel)
    blocks = -(-numel // block)
    edges = [0, 1, blocks // 3, blocks // 3, blocks - 1, blocks]
    for begin, end in itertools.pairwise(edges):
        offset, stop = begin * block, min(numel, end * block)
        shard = torch.stack(
            [codec.encode(x[offset:stop], KEY, i, 2, offset=offset) for i, x in enumerate(whole)]
        )
        found = codec.decode_mean(shard, KEY, stop - offset, offset=offset)
        assert torch.equal(found, mean[offset:stop])
        if end < blocks:
            shard_scales, shard_codes, _ = sections(codec, shard, stop - offset)
            assert torch.equal(shard_scales, scales[:, 4 * begin : 4 * end])
            row = block * codec.quantizer.bits // 8
            assert torch.equal(shard_codes, codes[:, row * begin : row * end])


def sections(
    codec: Codec, payloads: torch.Tensor, numel: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes of the full blocks' scales, of their codes, and of the tail."""
    count = numel // codec.block
    middle = 16 + 4 * count
    end = middle + count * codec.block * codec.quantizer.bits // 8
    return payloads[:, 16:middle], payloads[:, middle:end], payloads[:, end:]


@codecs(Codec(QuicFL(2), block=256), Codec(Eden(2), block=256))
@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poisoned", [0, 255, 256, 700, 999])
def test_a_poisoned_block_is_nan_and_no_other(
    codec: Codec, poison: float, dtype: torch.dtype, poisoned: int
) -> None:
    inputs = [gaussian(1000, rank).to(dtype) for rank in range(3)]
    clean = codec.decode_mean(encode_all(codec, inputs), KEY, 1000)
    inputs[1][poisoned] = poison
    found = codec.decode_mean(encode_all(codec, inputs), KEY, 1000)
    expected = clean.clone()
    block = poisoned // 256
    expected[256 * block : 256 * block + 256] = torch.nan
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@codecs()
def test_zeros_decode_to_exact_zeros(codec: Codec) -> None:
    x = gaussian(3 * 4096 + 100)
    x[4096:8192] = 0
    x[8192:12288] = -0.0
    found = round_trip(codec, x)
    assert bool((found[4096:12288] == 0).all())
    assert bool((found[:4096] != 0).any())
    zeros = torch.zeros(5000)
    payloads = encode_all(codec, [zeros, zeros, zeros])
    assert torch.equal(codec.decode_mean(payloads, KEY, 5000), zeros)


@codecs(Codec(QuicFL(8)), Codec(Eden(8)), Codec(QuicFL(8), rotations=3, block=32768))
@pytest.mark.parametrize("magnitude", [1e38, 1.0, 1e-30, 1e-38, 1e-40, 1e-43])
@pytest.mark.parametrize("shape", ["dense", "one_hot"])
def test_any_magnitude_makes_the_round_trip(codec: Codec, magnitude: float, shape: str) -> None:
    numel = 2 * codec.block + 100
    x = 2 * torch.rand(numel, generator=generator(1)) - 1
    if shape == "one_hot":
        x[torch.arange(numel) % codec.block != 7] = 0
    # Half the blocks are small, so that magnitudes mix.
    x = x * magnitude
    x[codec.block : 2 * codec.block] *= 1e-3
    found = round_trip(codec, x)
    assert bool(found.isfinite().all())
    for blocks in split_into_blocks(numel, codec.block):
        for start in range(blocks.offset, blocks.stop, blocks.size):
            here = slice(start, start + blocks.size)
            norm = float(x[here].double().norm())
            error = float((found[here].double() - x[here].double()).norm())
            bound = VNMSE_8 * (1 + 6 * math.sqrt(KURTOSIS_8 / blocks.size))
            # A denormal scale is off by up to 2^-150, and so is each denormal result.
            assert error <= math.sqrt(bound) * norm + 2 * 2.0**-149 * math.sqrt(blocks.size)


@codecs(Codec(QuicFL(4)), Codec(Eden(4)))
def test_ranks_of_any_magnitudes_mix(codec: Codec) -> None:
    numel = 4096
    inputs = [gaussian(numel, rank) * scale for rank, scale in enumerate((1e37, 1.0, 1e-38))]
    found = codec.decode_mean(encode_all(codec, inputs), KEY, numel)
    expected = codec.decode_mean(
        encode_all(codec, [inputs[0], torch.zeros(numel), torch.zeros(numel)]), KEY, numel
    )
    assert torch.equal(found, expected)  # next to the first the others vanish, as in plain sums
    small = [gaussian(numel, rank) * 1e-38 for rank in range(3)]
    error = codec.decode_mean(encode_all(codec, small), KEY, numel).double() - sum(
        x.double() for x in small
    ).div(3)  # type: ignore[union-attr]
    power = float(sum(x.double().square().sum() for x in small)) / 9
    assert float(error.square().sum()) <= 0.0125 * power


@codecs()
@pytest.mark.parametrize("exponent", [-90, -1, 1, 2, 90])
def test_powers_of_two_pass_through_exactly(codec: Codec, exponent: int) -> None:
    x = gaussian(5000) * torch.exp2(3 * gaussian(5000, 1))
    assert torch.equal(round_trip(codec, x * 2.0**exponent), round_trip(codec, x) * 2.0**exponent)


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        (Codec(QuicFL(4)), 3.4e38),
        (Codec(Eden(4)), 3e38),
        (Codec(Eden(1)), 2e38),
        (Codec(Eden(4)), 3.4e38),
        (Codec(Eden(1)), 2.2e38),
    ],
)
def test_huge_finite_inputs_are_not_taken_for_nan(codec: Codec, value: float) -> None:
    assert not bool(round_trip(codec, torch.full((4096,), value)).isnan().any())


def test_overflow_of_five_sigma_survives_the_codec() -> None:
    """A row of H times the rotation's own signs becomes one-hot: 64 sigma."""
    size, copies = 4096, 250
    diagonal = signs(KEY, Stream.SIGNS_1, 0, copies * size, 0, CPU).view(copies, size)
    x = diagonal * torch.from_numpy(sylvester_row(size, 77)).float()
    codec = Codec(QuicFL(4), rotations=1)
    decoded = round_trip(codec, x.flatten()).view(copies, size)
    scales = codec.encode(x.flatten(), KEY)[16 : 16 + 4 * copies].view(torch.float32)
    assert torch.allclose(scales, torch.tensor(64 / 5), rtol=2**-19)
    # Projected on x the estimate is 1 on average, with the standard error of the sample.
    projection = (decoded.double() * x.double()).mean(dim=1)
    error = float(projection.std()) / math.sqrt(copies)
    assert error < 0.06
    assert abs(float(projection.mean()) - 1) < 4 * error


def test_tampered_and_foreign_payloads_are_refused_by_name() -> None:
    codec, numel = Codec(QuicFL(4)), 1000
    good = encode_all(codec, [gaussian(numel, rank) for rank in range(2)])

    def refuses(fact: str, payloads: torch.Tensor, key: Key = KEY, **changes: Any) -> None:
        arguments = {"codec": codec, "numel": numel, "offset": 0, **changes}
        receiver = arguments.pop("codec")
        with pytest.raises(PayloadError, match=fact):
            receiver.decode_mean(payloads, key, **arguments)

    codec.decode_mean(good, KEY, numel)
    refuses("cut short", good[:, :-1])
    refuses("cut short", torch.nn.functional.pad(good, (0, 1)))
    refuses("cut short", good[:, :10])
    refuses(r"torch\.int8", good.to(torch.int8))
    refuses(r"torch\.float32", good.float())
    refuses(r"shape \(532,\)", good[0])
    refuses("configuration or length", good, codec=Codec(QuicFL(3)))
    refuses("configuration or length", good, numel=5000)
    assert codec.nbytes(numel) == 532

    def edited(byte: int, value: int) -> torch.Tensor:
        payloads = good.clone()
        payloads[1, byte] = value
        return payloads

    refuses("rank 1 does not begin with the mark", edited(0, 0))
    refuses("rank 1 does not begin with the mark", edited(1, ord("h")))
    refuses("rank 1 has format version 2, but this is version 1", edited(2, 2))
    refuses("rank 1 was made with a configuration other than .*'rotations': 2", edited(3, 3))
    refuses("rank 1 was made with a configuration", edited(8, int(good[1, 8]) ^ 1))
    refuses("rank 1 was made with a configuration", edited(15, int(good[1, 15]) ^ 128))
    refuses("rank 1 was made for another key", edited(4, int(good[1, 4]) ^ 1))

    refuses("configuration other than .*'rotations': 3", good, codec=replace(codec, rotations=3))
    refuses("configuration other than .*'block': 8192", good, codec=replace(codec, block=8192))
    refuses("configuration other than .*Eden", good, codec=Codec(Eden(4)))
    for key in (
        replace(KEY, seed=0),
        replace(KEY, step=0),
        replace(KEY, bucket=0),
        replace(KEY, hop=1),
    ):
        refuses("rank 0 was made for another key.*ranks are out of step", good, key)
    refuses("rank 0 was made for another key, rank.*rank=0", good.flip(0))
    refuses("another key, rank, world size.*world_size=1", good[:1])
    refuses("another key, rank, world size.*world_size=3", good[[0, 1, 1]])
    refuses("another key, .* offset.*offset=4096", good, offset=4096)
    refuses("another key, .* length.*numel=1001", good, numel=1001)


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("bits", BITS)
def test_any_bytes_behind_a_right_header_decode(
    method: type[QuicFL] | type[Eden], bits: int
) -> None:
    """To nonsense, but of the right shape, without an error: indices cannot leave their tables."""
    codec, numel = Codec(method(bits), block=256), 600
    headers = encode_all(codec, [gaussian(numel, rank) for rank in range(2)])[:, :16]
    length = codec.nbytes(numel) - 16
    bodies = [
        *(
            torch.randint(0, 256, (2, length), dtype=torch.uint8, generator=generator(seed))
            for seed in range(10)
        ),
        *(torch.full((2, length), value, dtype=torch.uint8) for value in (0, 0x7F, 0x80, 0xFF)),
    ]
    for body in bodies:
        found = codec.decode_mean(torch.cat([headers, body], dim=1), KEY, numel)
        assert found.shape == (numel,)
        assert found.dtype == torch.float32
    for block in found.split(256):  # all ones is a NaN in each scale
        assert bool(block.isnan().all())


def test_payloads_may_lie_anywhere_in_memory() -> None:
    codec = Codec(QuicFL(4))
    payload = codec.encode(gaussian(5000), KEY)
    expected = codec.decode_mean(payload[None], KEY, 5000)
    for ahead in (1, 2, 3):
        message = torch.cat([payload.new_zeros(ahead), payload])
        assert torch.equal(codec.decode_mean(message[ahead:][None], KEY, 5000), expected)


def test_a_payload_may_lie_in_a_longer_slot() -> None:
    codec = Codec(QuicFL(4))
    payload = codec.encode(gaussian(5000), KEY)
    slot = torch.nn.functional.pad(payload, (0, 3))[None]
    expected = codec.decode_mean(payload[None], KEY, 5000)
    assert torch.equal(codec.decode_mean(slot[:, :-3], KEY, 5000), expected)


@codecs(Codec(QuicFL(4)), Codec(Eden(4)))
def test_payloads_in_strided_memory_decode(codec: Codec) -> None:
    payloads = encode_all(codec, [gaussian(5000, rank) for rank in range(2)])
    expected = codec.decode_mean(payloads, KEY, 5000)
    padded = torch.nn.functional.pad(payloads, (0, 5))
    assert torch.equal(codec.decode_mean(padded[:, :-5], KEY, 5000), expected)
    assert torch.equal(codec.decode_mean(payloads.t().contiguous().t(), KEY, 5000), expected)


@codecs(Codec(QuicFL(4)), Codec(Eden(4)))
def test_threads_do_not_change_the_bits(codec: Codec) -> None:
    numel = (1 << 17) + 5000

    def bits(codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
        payloads = encode_all(codec, [gaussian(numel, rank) for rank in range(2)])
        return payloads, codec.decode_mean(payloads, KEY, numel)

    def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
        return all(map(torch.equal, one, other))

    expected = bits(codec)
    fresh = replace(codec)  # nothing of it is cached yet
    with ThreadPoolExecutor(2) as pool:
        assert all(same(found, expected) for found in pool.map(bits, [fresh, fresh]))
    threads = torch.get_num_threads()
    try:
        for count in {1, 2, 3} - {threads}:
            torch.set_num_threads(count)
            assert same(bits(codec), expected)
    finally:
        torch.set_num_threads(threads)


@codecs()
def test_codecs_are_values(codec: Codec) -> None:
    again = Codec(copy(codec.quantizer), codec.rotations, codec.block)
    round_trip(codec, gaussian(10))  # fills what is cached
    assert codec == again
    assert hash(codec) == hash(again)
    assert codec.fingerprint == again.fingerprint
    assert pickle.loads(pickle.dumps(codec)) == codec
    with pytest.raises(FrozenInstanceError):
        codec.block = 32  # type: ignore[misc]


def test_fingerprints_tell_configurations_apart() -> None:
    several = [
        Codec(method(bits), rotations, block)
        for method in QUANTIZERS
        for bits in BITS
        for rotations in (1, 2, 3)
        for block in (32, 4096, 1 << 24)
    ]
    assert len({codec.fingerprint for codec in several}) == len(set(several)) == len(several)
    assert all(len(codec.fingerprint) == 8 for codec in several)
    assert Codec(QuicFL(4)).rotations == Codec(Eden(4)).rotations == 2


@pytest.mark.parametrize("rotations", [0, 4])
def test_bad_rotations_raise(rotations: int) -> None:
    with pytest.raises(ValueError, match=f"rotations={rotations} must be 1, 2 or 3"):
        Codec(QuicFL(4), rotations=rotations)


@pytest.mark.parametrize("block", [48, 16, 0, 1 << 25])
def test_bad_blocks_raise(block: int) -> None:
    with pytest.raises(ValueError, match=f"block={block} must be a power of two from 32 to 2"):
        Codec(QuicFL(4), block=block)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_other_dtypes_raise(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"x is {dtype}, but only float32, bfloat16 and float16"):
        Codec(QuicFL(4)).encode(torch.zeros(100, dtype=dtype), KEY)


def test_integers_of_any_kind_make_the_same_payload() -> None:
    codec, x = Codec(QuicFL(4)), gaussian(5000)
    plain = codec.encode(x, KEY, 1, 2, offset=4096)
    found = codec.encode(x, KEY, np.int64(1), np.int64(2), offset=np.int64(4096))
    assert torch.equal(found, plain)
    assert codec.nbytes(np.int64(5000)) == plain.numel()
    origin = {"offset": np.int64(4096), "first_rank": np.int64(1), "world_size": np.int64(2)}
    mean = codec.decode_mean(plain[None], KEY, np.int64(5000), **origin)
    assert torch.equal(
        mean, codec.decode_mean(plain[None], KEY, 5000, offset=4096, first_rank=1, world_size=2)
    )


def test_bad_arguments_raise() -> None:
    codec, x = Codec(QuicFL(4)), gaussian(100)
    with pytest.raises(ValueError, match=r"shape \(10, 10\); flatten it first"):
        codec.encode(x.view(10, 10), KEY)
    with pytest.raises(ValueError, match=r"shape \(\); flatten it first"):
        codec.encode(x[0], KEY)
    with pytest.raises(TypeError, match=r"x is a ndarray; make it a torch\.Tensor"):
        codec.encode(x.numpy(), KEY)  # type: ignore[arg-type]
    for rank, world_size in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank={rank} must lie in .*world_size={world_size}"):
            codec.encode(x, KEY, rank, world_size)
    for offset in (-4096, 1, 2048, 2**36):
        with pytest.raises(ValueError, match=f"offset={offset} must be a multiple of block=4096"):
            codec.encode(x, KEY, offset=offset)
    payload = codec.encode(x, KEY)[None]
    with pytest.raises(ValueError, match="offset=1 must be a multiple"):
        codec.decode_mean(payload, KEY, 100, offset=1)
    last, beyond = 2**36 - 8192, 2**36 - 4096  # random numbers would begin anew
    shards = codec.encode(torch.ones(8192), KEY, offset=last, shards=2)
    assert bool(codec.decode_shards(shards, KEY, 8192, offset=last).isfinite().all())
    with pytest.raises(ValueError, match=r"8192 coordinates from there must end below 2\^36"):
        codec.encode(torch.ones(8192), KEY, offset=beyond)
    with pytest.raises(ValueError, match="must end below"):
        codec.decode_shards(shards, KEY, 8192, offset=beyond)
    with pytest.raises(ValueError, match="must end below"):
        codec.decode_mean(codec.encode(torch.ones(8192), KEY)[None], KEY, 8192, offset=beyond)
    with pytest.raises(ValueError, match=r"shape \(0, 148\)"):
        codec.decode_mean(payload[:0], KEY, 100)
