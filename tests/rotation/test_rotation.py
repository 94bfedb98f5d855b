"""Rotations against explicit matrices in float64, and their arithmetic bit by bit."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROUNDOFF, FloatArray, gaussian, sylvester, sylvester_row

from rhtcomm import Codec, Key, QuicFL, RandomizedHadamard
from rhtcomm.randomness import Stream, signs
from rhtcomm.rotation import hadamard, split_into_blocks

KEY = Key(seed=11, step=12, bucket=13)
CPU = torch.device("cpu")
STREAMS = (Stream.SIGNS_1, Stream.SIGNS_2, Stream.SIGNS_3)


def rounding(rotations: int, size: int) -> float:
    """Bound on |computed - exact| / |x| in the Euclidean norm.

    Each of the log2(d) layers of butterflies is an orthogonal map (times 2^(1/2)) whose results are
    rounded once, which moves a vector by at most ROUNDOFF of its norm; normalization rounds twice.
    """
    return 1.01 * (rotations * math.log2(size) + 2) * ROUNDOFF


def wide_range(numel: int, seed: int = 0) -> torch.Tensor:
    """Magnitudes over many octaves, so that another order of additions gives other bits."""
    return gaussian(numel, seed) * torch.exp2(4 * gaussian(numel, seed + 1000))


def exact_blocks(x: torch.Tensor, rotations: int, block: int, rank: int) -> list[FloatArray]:
    """R_k x = (H D_k) ... (H D_1) x of each block with explicit matrices."""
    rotated = []
    for blocks in split_into_blocks(x.numel(), block):
        matrix = sylvester(blocks.size)
        for start in range(blocks.offset, blocks.stop, blocks.size):
            rows = x[start : start + blocks.size].double().numpy()
            y = np.concatenate([rows, np.zeros(blocks.size - len(rows))])
            for stream in STREAMS[:rotations]:
                diagonal = np.diag(
                    signs(KEY, stream, start, blocks.size, rank, CPU).double().numpy()
                )
                y = matrix @ (diagonal @ y)
            rotated.append(y)
    return rotated


def test_the_oracle_is_the_documented_matrix() -> None:
    size = 64
    by_formula = np.stack([sylvester_row(size, row) for row in range(size)]) / math.sqrt(size)
    np.testing.assert_array_equal(sylvester(size), by_formula)


@pytest.mark.parametrize("rotations", [1, 2, 3])
@pytest.mark.parametrize(
    ("block", "numel"),
    [
        (32, 32),
        (32, 3 * 32),
        (32, 101),
        (64, 64),
        (64, 200),
        (256, 1000),
        (512, 1700),
        (1024, 1025),
    ],
)
def test_forward_is_the_product_of_matrices(rotations: int, block: int, numel: int) -> None:
    x, rank = wide_range(numel), 3
    rotation = RandomizedHadamard(rotations, block)
    found = rotation.forward(x, KEY, rank).double().numpy()
    exact = exact_blocks(x, rotations, block, rank)
    assert len(found) == sum(len(y) for y in exact)
    start = 0
    for y in exact:
        error = np.linalg.norm(found[start : start + len(y)] - y)
        assert error <= rounding(rotations, len(y)) * np.linalg.norm(y)
        start += len(y)


@pytest.mark.parametrize("rotations", [1, 2, 3])
@pytest.mark.parametrize("block", [32, 64, 256, 4096, 16384])
def test_inverse_undoes_forward_and_norms_stay(rotations: int, block: int) -> None:
    rotation = RandomizedHadamard(rotations, block)
    for numel in (1, block - 1, block, block + 1, 3 * block, 2 * block + block // 3):
        x = wide_range(numel)
        y = rotation.forward(x, KEY, 2)
        back = rotation.inverse(y, KEY, numel, 2)
        assert back.shape == x.shape
        assert back.dtype == y.dtype == torch.float32
        for blocks in split_into_blocks(numel, block):
            bound = rounding(rotations, blocks.size)
            for start in range(blocks.offset, blocks.stop, blocks.size):
                here = slice(start, start + blocks.size)
                norm = x[here].double().norm()
                assert (back[here].double() - x[here].double()).norm() <= 2 * bound * norm
                assert abs(y[here].double().norm() - norm) <= bound * norm


def plain_hadamard(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Butterflies of stride 1, 2, 4, ... one by one."""
    x, stride = x.copy(), 1
    while stride < len(x):
        for start in range(0, len(x), 2 * stride):
            for i in range(start, start + stride):
                a, b = x[i], x[i + stride]
                x[i], x[i + stride] = a + b, a - b
        stride *= 2
    return x


@pytest.mark.parametrize("size", [32, 64, 128, 256, 1024, 4096])
@pytest.mark.parametrize("blocks", [1, 3])
def test_butterflies_are_exact_to_the_bit(size: int, blocks: int) -> None:
    x = wide_range(blocks * size).view(blocks, size)
    expected = np.stack([plain_hadamard(row) for row in x.numpy()])
    assert hadamard(x.clone()).numpy().tobytes() == expected.tobytes()


def test_another_order_of_strides_gives_other_bits() -> None:
    """So the test above can fail: descending strides are the transform in bit-reversed order."""
    x = wide_range(256)
    reverse = torch.tensor([int(f"{i:08b}"[::-1], 2) for i in range(256)])
    descending = hadamard(x[reverse][None].clone())[0][reverse]
    ascending = hadamard(x[None].clone())[0]
    torch.testing.assert_close(descending, ascending, rtol=1e-4, atol=1e-3 * float(x.abs().max()))
    assert not torch.equal(descending, ascending)


@pytest.mark.parametrize("rotations", [1, 2, 3])
def test_rotate_and_unrotate_are_exact_to_the_bit(rotations: int) -> None:
    blocks, size, offset, rank = 2, 256, 5 * 4096, 1
    rotation = RandomizedHadamard(rotations, size)
    x = wide_range(blocks * size).view(blocks, size)
    diagonals = [
        signs(KEY, stream, offset, blocks * size, rank, CPU).view(blocks, size).numpy()
        for stream in STREAMS[:rotations]
    ]
    rotated, unrotated = x.numpy(), x.numpy()
    for diagonal in diagonals:
        rotated = np.stack([plain_hadamard(row) for row in diagonal * rotated])
    for diagonal in reversed(diagonals):
        unrotated = diagonal * np.stack([plain_hadamard(row) for row in unrotated])
    assert rotation.rotate(x, KEY, offset, rank).numpy().tobytes() == rotated.tobytes()
    assert rotation.unrotate(x, KEY, offset, rank).numpy().tobytes() == unrotated.tobytes()


@pytest.mark.parametrize("block", [32, 64, 128, 4096])
def test_arguments_are_left_alone(block: int) -> None:
    rotation, x = RandomizedHadamard(2, block), gaussian(block)[None]
    argument = x.clone()
    hadamard(argument)
    rotation.rotate(argument, KEY, 0)
    rotation.unrotate(argument, KEY, 0)
    assert torch.equal(argument, x)


def test_ranks_and_places_have_signs_of_their_own() -> None:
    rotation, x = RandomizedHadamard(2, 256), gaussian(512)
    y = rotation.forward(x, KEY, 0)
    assert torch.equal(y, rotation.forward(x, KEY, 0))
    assert not torch.equal(y, rotation.forward(x, KEY, 1))
    twice = rotation.forward(torch.cat([x[:256], x[:256]]), KEY)
    assert not torch.equal(twice[:256], twice[256:])


def test_other_inputs() -> None:
    rotation, x = RandomizedHadamard(2, 256), gaussian(1000)
    assert rotation.forward(x[:0], KEY).shape == (0,)
    assert rotation.inverse(x[:0], KEY, 0).shape == (0,)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        y = rotation.forward(x.to(dtype), KEY)
        assert torch.equal(y, rotation.forward(x.to(dtype).float(), KEY))
    assert torch.equal(rotation.forward(x[::3], KEY), rotation.forward(x[::3].contiguous(), KEY))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(numel=st.integers(0, 1 << 20), exponent=st.integers(5, 16))
def test_blocks_cover_the_tensor(numel: int, exponent: int) -> None:
    block = 1 << exponent
    sections = split_into_blocks(numel, block)
    end = 0
    for blocks in sections:
        assert blocks.offset == end
        assert blocks.count >= 1
        assert blocks.stop == blocks.offset + blocks.count * blocks.size
        assert 32 <= blocks.size <= block
        assert blocks.size & (blocks.size - 1) == 0
        end = blocks.stop
    padding = end - numel
    assert 0 <= padding < max(block / 2, 256)
    assert sum(blocks.count for blocks in sections if blocks.size == block) >= numel // block
    assert len(sections) <= 2
    # Of several small blocks none would be needed.
    assert len(sections) < 2 or sections[1].count == 1


@pytest.mark.parametrize("block", [32, 256, 4096])
@pytest.mark.parametrize("count", [0, 1, 2, 64])
def test_exact_multiples_add_no_block(block: int, count: int) -> None:
    sections = split_into_blocks(count * block, block)
    assert [(blocks.offset, blocks.count, blocks.size) for blocks in sections] == (
        [(0, count, block)] if count else []
    )


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_tail_costs_at_most_a_percent(bits: int) -> None:
    codec = Codec(QuicFL(bits))
    worst = [4096 * 64 + rest for rest in (1, 256, 257, 512, 513, 1024, 1025, 2048, 2049, 4095)]
    for numel in [*worst, *range(1 << 18, 1 << 19, 997)]:
        padded = split_into_blocks(numel, 4096)[-1].stop
        assert padded <= 1.01 * numel
        whole = codec.nbytes(numel // 4096 * 4096)
        assert codec.nbytes(numel) - whole <= 0.01 * whole + (numel % 4096) * bits / 8


@pytest.mark.parametrize("block", [0, 1, 16, 48, 4095, -4096, 1 << 25, 1024.0])
def test_bad_blocks_raise(block: int) -> None:
    with pytest.raises(ValueError, match=f"RandomizedHadamard: block={block} must be a power of"):
        RandomizedHadamard(2, block)


@pytest.mark.parametrize("rotations", [0, 4, -1, 2.0])
def test_bad_rotations_raise(rotations: int) -> None:
    with pytest.raises(ValueError, match=f"rotations={rotations} must be 1, 2 or 3"):
        RandomizedHadamard(rotations)


def test_other_integers_are_refused_as_such() -> None:
    with pytest.raises(ValueError, match=r"must be 1, 2 or 3 \(an int\)"):
        RandomizedHadamard(np.int64(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be a power of two from 32 to 2\^24 \(an int\)"):
        RandomizedHadamard(2, np.int64(1024))  # type: ignore[arg-type]
