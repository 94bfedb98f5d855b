"""Philox against its published vectors, and the streams against their descriptions, bit by bit."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rhtcomm.randomness import MAX_RANKS, Key, Stream, dither, philox4x32, signs, stratum, words

CPU = torch.device("cpu")
LARGEST = Key(seed=2**64 - 1, step=2**32 - 1, bucket=2**32 - 1, hop=15)
KEYS = [
    Key(seed=0),
    Key(seed=2**64 - 0x123456789, step=3, bucket=2, hop=1),
    LARGEST,
]


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in unbounded integers, as its paper writes it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def reference_call(key: Key, stream: int, call: int, rank: int) -> list[int]:
    counter = [call, key.bucket, key.step, stream + 16 * key.hop + 256 * rank]
    return reference_philox(counter, [key.seed % 2**32, key.seed // 2**32])


# Published with Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: list[int], key: list[int], answer: list[int]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert philox4x32((c0, c1, c2, c3), (key[0], key[1])).tolist() == [answer]
    assert reference_philox(counter, key) == answer


def test_philox_equals_the_reference_on_random_counters() -> None:
    random = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (500, 4), generator=random)
    k0, k1 = torch.randint(0, 2**32, (2,), generator=random).tolist()
    c0, c1, c2, c3 = counters.unbind(1)
    expected = [reference_philox(counter, [k0, k1]) for counter in counters.tolist()]
    assert philox4x32((c0, c1, c2, c3), (k0, k1)).tolist() == expected


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize("rank", [0, 1, MAX_RANKS - 1])
def test_words_are_calls_of_the_documented_counters(key: Key, stream: Stream, rank: int) -> None:
    for call in (0, 2**32 - 3):
        expected = [reference_call(key, stream, c, rank) for c in range(call, call + 3)]
        assert words(key, stream, call, 3, rank, CPU).tolist() == expected


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("stream", "rank"), [(Stream.SIGNS_1, 0), (Stream.SIGNS_3, 9)])
def test_signs_follow_their_description(key: Key, stream: Stream, rank: int) -> None:
    offset, count = 5 * 128 + 40, 400
    expected = []
    for j in range(offset, offset + count):
        call = reference_call(key, stream, j // 128, rank)
        bit = (call[j % 128 // 32] >> j % 32) & 1
        expected.append(-1.0 if bit else 1.0)
    found = signs(key, stream, offset, count, rank, CPU)
    assert found.dtype == torch.float32
    assert found.tolist() == expected


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("added", [0, 1, 85, 255])
def test_dither_follows_its_description(key: Key, added: int) -> None:
    offset, count = 7 * 16, 80
    expected_u, expected_v = [], []
    for j in range(offset, offset + count):
        word = reference_call(key, Stream.DITHER, j // 16, 0)[j // 4 % 4]
        octets = [(word >> 8 * i) & 255 for i in range(4)]
        own = j % 4
        # The word turned until the coordinate's own byte is on top.
        top, second, third, lowest = (octets[(own - i) % 4] for i in range(4))
        expected_v.append((256 * top + second + 256 * added) % 65536)
        expected_u.append((256 * third + lowest + 256 * added) % 65536)
    u, v = dither(key, offset, count, added, CPU)
    assert u.dtype == v.dtype == torch.int32
    assert u.tolist() == expected_u
    assert v.tolist() == expected_v


@settings(derandomize=True, deadline=None, max_examples=200)
@given(offset=st.integers(0, 120), count=st.integers(0, 120), base=st.integers(0, 2**20))
def test_any_part_of_a_stream_is_a_slice_of_the_whole(offset: int, count: int, base: int) -> None:
    key = Key(seed=3, step=4)
    start, total = 128 * base, 16 * 240
    whole_signs = signs(key, Stream.SIGNS_2, start, total, 5, CPU)
    here = slice(8 * offset, 8 * (offset + count))
    found = signs(key, Stream.SIGNS_2, start + 8 * offset, 8 * count, 5, CPU)
    assert torch.equal(found, whole_signs[here])

    here = slice(16 * offset, 16 * (offset + count))
    found_dither = dither(key, start + 16 * offset, 16 * count, 3, CPU)
    for found, whole in zip(found_dither, dither(key, start, total, 3, CPU), strict=True):
        assert torch.equal(found, whole[here])


# What differs in one thing alone must be unrelated.
NEIGHBOURS = [
    replace(KEYS[0], seed=1),
    replace(KEYS[0], seed=1 << 32),
    replace(KEYS[0], step=1),
    replace(KEYS[0], bucket=1),
    replace(KEYS[0], hop=1),
]


@pytest.mark.parametrize("key", NEIGHBOURS)
def test_streams_differ_in_every_field_of_the_key(key: Key) -> None:
    count = 1 << 14
    assert_unrelated_signs(
        signs(KEYS[0], Stream.SIGNS_1, 0, count, 0, CPU),
        signs(key, Stream.SIGNS_1, 0, count, 0, CPU),
    )
    for one, other in zip(
        dither(KEYS[0], 0, count, 0, CPU), dither(key, 0, count, 0, CPU), strict=True
    ):
        # Top bytes of unrelated streams agree with probability 1/256.
        agree = int((one >> 8 == other >> 8).sum())
        assert abs(agree - count / 256) < 5 * math.sqrt(count / 256)


def test_signs_differ_by_stream_and_rank() -> None:
    count = 1 << 14
    pairs = [
        (stream, rank)
        for stream in (Stream.SIGNS_1, Stream.SIGNS_2, Stream.SIGNS_3, Stream.DITHER)
        for rank in (0, 1, 2)
    ]
    drawn = [signs(KEYS[0], stream, 0, count, rank, CPU) for stream, rank in pairs]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert_unrelated_signs(one, other)


def assert_unrelated_signs(one: torch.Tensor, other: torch.Tensor) -> None:
    assert abs(float((one * other).sum())) < 5 * math.sqrt(one.numel())


def chi_square(bins: torch.Tensor, count: int) -> None:
    """Five standard deviations about the mean of chi^2 with count - 1 degrees of freedom."""
    expected = bins.numel() / count
    found = torch.bincount(bins.flatten(), minlength=count).double()
    assert len(found) == count
    statistic = float(((found - expected) ** 2 / expected).sum())
    assert abs(statistic - (count - 1)) < 5 * math.sqrt(2 * (count - 1))


def test_dither_is_uniform_and_independent() -> None:
    u, v = dither(Key(seed=8), 0, 1 << 20, 0, CPU)
    for numbers in (u, v):
        chi_square(numbers >> 8, 256)
        chi_square(numbers & 255, 256)
        chi_square(numbers, 65536)
    # Within a coordinate: u is independent of v. Top and low bits of both, joined.
    chi_square((v >> 12) * 16 + (u >> 12), 256)
    chi_square((v & 15) * 16 + (u >> 12), 256)
    chi_square((v >> 12) * 16 + (u & 15), 256)
    # Between coordinates, of one word and of others, what receivers see of v is independent.
    for distance in (1, 2, 3, 4, 16):
        chi_square((v[distance:] >> 12) * 16 + (v[:-distance] >> 12), 256)


def test_signs_are_uniform_and_independent() -> None:
    first, second = (
        (signs(Key(seed=8), stream, 0, 1 << 20, 0, CPU) < 0).long()
        for stream in (Stream.SIGNS_1, Stream.SIGNS_2)
    )
    # 8 adjacent signs as one number, then pairs at distances that words, calls and blocks have.
    chi_square(first.view(-1, 8) @ (1 << torch.arange(8)), 256)
    for distance in (1, 31, 32, 64, 128, 4096):
        chi_square(2 * first[distance:] + first[:-distance], 4)
    chi_square(2 * first + second, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 10, 100, 256, 1000])
def test_strata_are_evenly_spaced(world_size: int) -> None:
    strata = [stratum(rank, world_size) for rank in range(world_size)]
    for rank, added in enumerate(strata):
        assert 0 <= 256 * rank / world_size - added < 1
    assert strata[0] == 0
    assert max(strata) < 256


def test_stratified_dithers_cover_the_unit_interval_evenly() -> None:
    world_size = 8
    for choose in (0, 1):
        drawn = torch.stack(
            [dither(KEYS[1], 0, 512, stratum(i, world_size), CPU)[choose] for i in range(8)]
        )
        assert int(drawn.min()) >= 0
        assert int(drawn.max()) < 65536
        gaps = drawn.sort(dim=0).values.diff(dim=0)
        assert bool((gaps == 65536 // world_size).all())


@pytest.mark.parametrize(
    ("field", "width"), [("seed", 64), ("step", 32), ("bucket", 32), ("hop", 4)]
)
def test_key_refuses_what_does_not_fit(field: str, width: int) -> None:
    for value in (-1, 1 << width):
        with pytest.raises(ValueError, match=rf"Key: {field}={value} must lie in \[0, 2\^{width}"):
            Key(**{"seed": 0, field: value})


def test_key_is_a_value() -> None:
    key = Key(seed=1, step=2)
    assert key == Key(1, 2)
    assert len({key, Key(1, 2), Key(1, 3)}) == 2
    with pytest.raises(FrozenInstanceError):
        key.step = 3  # type: ignore[misc]
    assert key.next_hop() == Key(1, 2, 0, hop=1)
    with pytest.raises(ValueError, match="hop=16"):
        LARGEST.next_hop()


def test_streams_refuse_to_wrap_around() -> None:
    with pytest.raises(
        ValueError, match=r"a stream has 2\^32 calls, but 4294967297 were requested"
    ):
        words(KEYS[0], Stream.DITHER, 2**32 - 1, 2, 0, CPU)
    for rank in (-1, MAX_RANKS):
        with pytest.raises(ValueError, match=f"rank={rank} must lie in"):
            signs(KEYS[0], Stream.SIGNS_1, 0, 128, rank, CPU)
