"""Codebooks of 256 vectors for N(0, I_g): `python -m rhtcomm.codebooks.vector`.

A group of g = 8 / b coordinates takes one byte. The codebook {c_i, -c_i}, i = 0 .. 127, minimizes
the distortion per coordinate

    D = E[min_i,sign |z -+ c_i|^2] / g,  z ~ N(0, I_g),

if every c_i is the mean of the z nearest to it, with those nearest to -c_i reflected (Linde, Buzo
and Gray, IEEE Trans. Commun. 1980). Symmetric codebooks are as good as free ones within 0.1%, and
halve the search. As |z - c|^2 = |z|^2 - 2 (<z, c> - |c|^2 / 2), the nearest c_i is the one that
maximizes |<z, c_i>| - |c_i|^2 / 2.

Lloyd's iteration moves each c_i to its cell's mean over a fresh sample each time, so it does not
overfit a sample. In its second half the steps shrink, which averages out the sampling noise. The
best of a few random starts is kept.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rhtcomm import codebooks

__all__ = ["BITS", "distortion", "expected_vnmse", "nearest", "solve"]

BITS = (1, 2, 4)
HALF = 128  # entries; the other half are their negatives

_SAMPLE = 1 << 16


def nearest(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z (n, g), codebook (128, g) -> of each z: i (n,), the sign of +-c_i, and |z -+ c_i|^2."""
    agreement = z @ codebook.T  # (n, 128)
    score, index = (agreement.abs() - codebook.square().sum(1) / 2).max(1)
    sign = torch.where(agreement.gather(1, index[:, None])[:, 0] < 0, -1.0, 1.0)
    return index, sign, z.square().sum(1) - 2 * score


def distortion(codebook: Tensor, seed: int, samples: int = 1 << 21) -> float:
    """Measure D; the relative standard error is about samples^(-1/2).

    Args:
        codebook: The c_i, (128, g) float32.
        seed: Of the sample.
        samples: Groups of g coordinates.
    """
    random = torch.Generator().manual_seed(seed)
    total = 0.0
    for start in range(0, samples, _SAMPLE):
        z = torch.randn(min(_SAMPLE, samples - start), codebook.shape[1], generator=random)
        total += nearest(z, codebook)[2].double().sum().item()
    return total / codebook.numel() * HALF / samples


def expected_vnmse(distortion: float) -> float:
    """The error E[|x^ - x|^2] / |x|^2 for many dimensions, D / (1 - D), as for EDEN.

    Each codeword being the mean of its cell, E|c|^2 = E<z, c> = g (1 - D).
    """
    return distortion / (1 - distortion)


def solve(bits: int, seed: int, iterations: int = 600) -> Tensor:
    """The c_i that Lloyd's iteration on fresh samples finds from one random start.

    Args:
        bits: b, 1, 2 or 4.
        seed: Of the start and the samples.
        iterations: Samples of 2^16 groups.

    Returns:
        (128, 8 / bits) float32, in ascending order of the norm.

    Raises:
        ValueError: bits is not 1, 2 or 4.
    """
    if bits not in BITS:
        raise ValueError(f"A vector codebook needs bits = 1, 2 or 4; got bits={bits}.")
    group = 8 // bits
    random = torch.Generator().manual_seed(seed)
    # Many codewords are best spread like N(0, (g + 2) / g) (Gersho; for g = 1 Panter and Dite).
    codebook = torch.randn(HALF, group, generator=random) * math.sqrt((group + 2) / group)
    for iteration in range(iterations):
        z = torch.randn(_SAMPLE, group, generator=random)
        index, sign, _ = nearest(z, codebook)
        count = torch.bincount(index, minlength=HALF)[:, None]
        sums = torch.zeros_like(codebook).index_add_(0, index, z * sign[:, None])
        step = 1 / max(1, iteration - iterations // 2)
        moved = torch.lerp(codebook, sums / count.clamp(min=1), step)
        # A codeword without nearest samples restarts at a sample.
        codebook = torch.where(count > 0, moved, z[:HALF])
    return codebook[codebook.norm(dim=1).argsort()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train vector codebooks and write them.")
    parser.add_argument("--iterations", type=int, default=600, help="of each start")
    parser.add_argument("--starts", type=int, default=4, help="the best of them is kept")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_suffix(".npz"),
        help="the .npz file to write (default: the shipped table)",
    )
    args = parser.parse_args()

    tables: dict[str, npt.NDArray[np.float32]] = {}
    print("| b | g | distortion D | expected vNMSE D / (1 - D) |\n|---|---|---|---|")
    for bits in BITS:
        starts = [solve(bits, seed, args.iterations) for seed in range(args.starts)]
        best = min(starts, key=lambda codebook: distortion(codebook, seed=-1))
        found = distortion(best, seed=-2)  # a sample other than the one that selected it
        tables[f"b{bits}"] = best.numpy()
        print(f"| {bits} | {8 // bits} | {found:.5g} | {expected_vnmse(found):.5g} |", flush=True)
    codebooks.save(args.out, tables)


if __name__ == "__main__":
    main()
