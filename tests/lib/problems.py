"""Inputs and quantizers that several test files share."""

import math

import numpy as np
import numpy.typing as npt
import torch

from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL, RandomizedHadamard
from rhtcomm.randomness import dither

FloatArray = npt.NDArray[np.float64]

QUANTIZERS: tuple[type[QuicFL] | type[Eden], ...] = (QuicFL, Eden)
BITS = range(1, 9)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CANONICAL_NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}

ROUNDOFF = 2.0**-24  # of a float32 result, relative


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=generator(seed))


def numbers(*indices: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers that depend on the indices, such as (rank, step), alone."""
    seed = 0
    for index in indices:
        seed = 1000 * seed + index + 1
    return torch.randn(shape, generator=generator(seed))


def lognormal(numel: int, seed: int = 0) -> torch.Tensor:
    """Heavy tailed, all positive, as far from Gaussian as gradients get."""
    return gaussian(numel, seed).exp()


def adversarial(size: int = 4096) -> dict[str, torch.Tensor]:
    """Vectors that are hard on quantizers that rely on rotations, most after a single one."""
    index = torch.arange(size)
    few = torch.zeros(3, size)
    few[0, 17] = 1
    few[1, [5, size // 2]] = torch.tensor([1.0, -1.0])
    few[2, :3] = torch.tensor([1.0, 0.6, 0.3])
    sparse = torch.zeros(size)
    places = torch.randperm(size, generator=generator(1))[: size // 100]
    sparse[places] = gaussian(len(places), 2)
    return {
        "one_hot": few[0],
        "two_hot": few[1],
        "three_unequal": few[2],
        "half_zeros": gaussian(size, 3) * (index % 2),
        "geometric": 0.9**index,
        "constant": torch.ones(size),
        "walsh_row": torch.from_numpy(sylvester_row(size, 1365 % size)).float(),
        "sparse": sparse,
        "lognormal": lognormal(size, 4),
    }


def that_overflows(bits: float, numel: int, key: Key) -> torch.Tensor:
    """x whose rotation is 2, -2 or 0, wherever its dither makes that expensive for ECDQ."""
    table = ECDQ(bits).table
    _, v = dither(key, 0, numel, 0, torch.device("cpu"))
    v = v.long()
    length = table.precision - torch.from_numpy(table.frequencies).double().log2()

    def cost(y: float) -> torch.Tensor:
        k = (int(y * table.per_step) + v) >> 16
        return length[table.class_of(v), k + table.largest]

    y = torch.where(cost(2.0) > cost(-2.0), 2.0, -2.0)
    longer = (torch.maximum(cost(2.0), cost(-2.0)) - cost(0.0)).view(-1, 4096)
    kept = torch.zeros_like(longer).scatter(1, longer.topk(1024, dim=1).indices, 1.0)
    y = (y * kept.flatten()).float().view(-1, 4096)
    return RandomizedHadamard(1, 4096).unrotate(y, key, 0).flatten() / 4096


def sylvester_row(size: int, row: int) -> FloatArray:
    """Row of the Sylvester-Hadamard matrix, unnormalized: (-1)^popcount(row & j)."""
    return np.array([(-1.0) ** bin(row & column).count("1") for column in range(size)])


def sylvester(size: int) -> FloatArray:
    """The orthonormal Sylvester-Hadamard matrix, by its recursion."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / math.sqrt(size))


def nmse(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact|^2 / |exact|^2"""
    return float((found - exact).square().sum() / exact.square().sum())


def codec_name(codec: Codec) -> str:
    quantizer = codec.quantizer
    return f"{type(quantizer).__name__}{quantizer.bits}-k{codec.rotations}-d{codec.block}"
