"""Errors of quantizers after k transforms, against those after a dense random rotation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lib.progress import progress
from lib.report import table
from rhtcomm import Codec, Eden, Key, QuicFL, VectorQuantizer, codebooks
from rhtcomm.codebooks.lloyd_max import expected_vnmse
from rhtcomm.quantizers import Quantizer
from theory.inputs import ROTATIONS, Effort, inputs

QUANTIZERS: tuple[Quantizer, ...] = (
    *(QuicFL(bits) for bits in (1, 2, 4)),
    *(QuicFL(bits, exact_fraction=1 / 512) for bits in (1, 2, 4)),
    *(Eden(bits) for bits in (1, 2, 4)),
    *(VectorQuantizer(bits) for bits in (1, 2, 4)),
)


def label(quantizer: Quantizer) -> str:
    if quantizer == Eden(1):
        return "DRIVE"
    exact = " exact" if getattr(quantizer, "exact_fraction", 0) else ""
    return f"{type(quantizer).__name__}{exact}, b = {quantizer.bits}"


@dataclass(frozen=True)
class Error:
    """vNMSE E|x^ - x|^2 / |x|^2, and N NMSE(N), N times that of the mean of N estimates."""

    one_shot: float
    averaged: float


def measure(estimates: Iterator[torch.Tensor], x: torch.Tensor) -> Error:
    """Of batches of estimates (N, d), independent within a batch, of one x (d,) of norm 1."""
    one_shot, averaged = [], []
    for batch in estimates:
        one_shot.append(float((batch - x).square().sum(dim=1).double().mean()))
        mean = batch.double().mean(dim=0)
        averaged.append(len(batch) * float((mean - x).square().sum()))
    return Error(float(np.mean(one_shot)), float(np.mean(averaged)))


def after_transforms(
    quantizer: Quantizer, k: int, x: torch.Tensor, draws: int, batches: int
) -> Iterator[torch.Tensor]:
    """Round trips through the codec: blocks of one tensor have independent randomness."""
    codec, copies = Codec(quantizer, rotations=k, block=len(x)), x.repeat(draws)
    for step in range(batches):
        key = Key(seed=5, step=step)
        payload = codec.encode(copies, key)
        yield codec.decode_mean(payload[None], key, copies.numel()).view(draws, -1)


class DenseRotations:
    """Q_a Q_b, a < b, of uniform random rotations Q_1 .. Q_m of R^d.

    Q_a is the orthogonal factor of a Gaussian matrix whose triangular factor has a positive
    diagonal. The products are uniform and any two of them independent, and NMSE(N) depends on no
    more than pairs. The error does not depend on x, as Q x is uniform on the sphere for every x.
    """

    def __init__(self, size: int, count: int) -> None:
        matrices = math.ceil((1 + math.sqrt(1 + 8 * count)) / 2)
        generator = torch.Generator().manual_seed(11)
        self.rotations = torch.empty(matrices, size, size)
        for rotation in progress(self.rotations, "dense rotations"):
            q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
            rotation.copy_(q * r.diagonal().sign())
        self.first, self.second = torch.triu_indices(matrices, matrices, 1)[:, :count]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (d,) -> (count, d)."""
        inner = self.rotations @ x
        return torch.cat([inner[a + 1 :] @ q.t() for a, q in enumerate(self.rotations)])[
            : len(self.first)
        ]

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Row by row, y (count, d) -> (count, d)."""
        x = torch.empty_like(y)
        for a, q in enumerate(self.rotations):
            x[self.first == a] = y[self.first == a] @ q
        for b, q in enumerate(self.rotations):
            x[self.second == b] = x[self.second == b] @ q
        return x


def after_dense(
    quantizer: Quantizer, dense: DenseRotations, x: torch.Tensor, draws: int
) -> Iterator[torch.Tensor]:
    y, key = dense.forward(x), Key(seed=6)
    codes, scale = quantizer.encode(y, key, 0, 0, 1)
    decoded = quantizer.decode(codes, key, 0, 0, 1)
    if isinstance(quantizer, QuicFL) and quantizer.exact_fraction:
        quantizer.decode_exact(decoded, quantizer.encode_exact(y, scale, key, 0, 0, 1))
    return iter(dense.inverse(decoded * scale[:, None]).split(draws))


@dataclass(frozen=True)
class Errors:
    dense: dict[str, Error]  # by quantizer
    transforms: dict[tuple[str, int, str], Error]  # by quantizer, k, input


def measure_errors(effort: Effort) -> Errors:
    """Of all quantizers on all inputs."""
    problems = inputs(effort.size)
    dense = DenseRotations(effort.size, effort.draws * effort.batches)
    found = Errors({}, {})
    for quantizer in progress(QUANTIZERS, "errors"):
        name, x = label(quantizer), problems["(1, .6, .3, 0, ...)"]
        found.dense[name] = measure(after_dense(quantizer, dense, x, effort.draws), x)
        for k in ROTATIONS:
            for problem, x in problems.items():
                estimates = after_transforms(quantizer, k, x, effort.draws, effort.batches)
                found.transforms[name, k, problem] = measure(estimates, x)
    return found


def drive_on_three(draws: int) -> dict[int, Error]:
    """DRIVE on (1, .6, .3, 0, ...) in blocks of 4096, by k."""
    x = inputs(4096)["(1, .6, .3, 0, ...)"]
    return {k: measure(after_transforms(Eden(1), k, x, draws, 1), x) for k in ROTATIONS}


EDEN_SIZES = (256, 1024, 4096, 16384, 65536)


def eden_on_two_hot(effort: Effort) -> str:
    """vNMSE of EDEN after k transforms over that for N(0, 1), by d: two-hot is what k = 2 has most
    trouble with, as coordinates then lie on a lattice of step 2 (2 / d)^(1/2)."""
    rows = []
    for k, bits in ((2, 1), (2, 2), (2, 4), (2, 6), (2, 8), (3, 8)):
        reference = expected_vnmse(codebooks.load("lloyd_max")[f"b{bits}"])
        cells = []
        for d in EDEN_SIZES:
            x = inputs(d)["two-hot"]
            draws = max(1, effort.samples // d)
            error = measure(after_transforms(Eden(bits), k, x, draws, 1), x)
            cells.append(f"{error.one_shot / reference:.3f}")
        rows.append([f"k = {k}, b = {bits}", *cells])
    return table(["d", *map(str, EDEN_SIZES)], rows)
