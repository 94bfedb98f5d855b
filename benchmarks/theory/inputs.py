"""Vectors that are hard to make Gaussian, and their rotations R_k x = (H D_k) ... (H D_1) x."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

ROTATIONS = (1, 2, 3)
GROUP = 8  # adjacent coordinates that vector quantization at one bit takes together


@dataclass(frozen=True)
class Effort:
    powers: range  # d = 2^power
    samples: int  # coordinates a distance is estimated from
    keys: int  # of the check that coordinates may be pooled
    size: int  # d of the errors of quantizers
    batches: int  # groups of draws that a bias is estimated from
    draws: int  # keys whose estimates are averaged: N


FULL = Effort(range(4, 17), 1 << 22, 1 << 13, 1024, 16, 1024)
QUICK = Effort(range(4, 10), 1 << 17, 1 << 10, 256, 2, 256)


def inputs(size: int) -> dict[str, torch.Tensor]:
    """Vectors of norm 1 in R^size, most of them hard: (size,) float32 by name."""
    generator = np.random.default_rng(7)
    few = np.zeros((3, size))
    few[0, 0] = 1
    few[1, :2] = 1
    few[2, :3] = 1, 0.6, 0.3
    sparse = np.zeros(size)
    nonzero = generator.choice(size, max(4, size // 100), replace=False)
    sparse[nonzero] = generator.standard_normal(len(nonzero))
    row = np.array([(-1.0) ** (size // 3 & column).bit_count() for column in range(size)])
    found = {
        "one-hot": few[0],
        "two-hot": few[1],
        "(1, .6, .3, 0, ...)": few[2],
        "half constant": np.arange(size) < size // 2,
        "Walsh row": row,
        "sparse": sparse,
        "lognormal": np.exp(generator.standard_normal(size)),
        "Gaussian": generator.standard_normal(size),
    }
    return {name: torch.from_numpy(x / np.linalg.norm(x)).float() for name, x in found.items()}


@cache
def sylvester(size: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix, (size, size) float32."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], dim=1)
    return matrix * size**-0.5


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """H of each row, x (n, d) float32, by one or two matrix products.

    H_d is the Kronecker product of two smaller ones. On samples this is several times faster than
    butterflies, whose roundings the codec needs and a distribution does not.
    """
    low = min(x.shape[1], 256)
    y = x.reshape(-1, low) @ sylvester(low)
    if low < x.shape[1]:
        y = sylvester(x.shape[1] // low) @ y.view(len(x), -1, low)
    return y.view(x.shape)


def rotated(x: torch.Tensor, count: int, seed: int) -> Iterator[torch.Tensor]:
    """R_1 x, R_2 x, R_3 x of `count` independent keys, x (d,): (count, d) each."""
    generator = np.random.default_rng(seed)
    y = x.expand(count, -1)
    for _ in ROTATIONS:
        octets = np.frombuffer(generator.bytes(-(-y.numel() // 8)), dtype=np.uint8)
        bits = torch.from_numpy(np.unpackbits(octets)[: y.numel()]).view(y.shape)
        y = hadamard(y * (1 - 2 * bits.float()))
        yield y
