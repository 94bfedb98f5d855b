"""What the ranks of a lattice compute, in one process."""

from dataclasses import dataclass
from typing import Any

import torch

from rhtcomm import Key, Lattice
from rhtcomm.kernels import LatticeKernel, LatticeTask, lattice, lattice_kernel_for

__all__ = ["Sum", "everything_here", "magnitudes", "sum_of"]


@dataclass(frozen=True)
class Sum:
    ys: torch.Tensor
    """(n, padded) float32: the ranks' rotated coordinates, in units of the powers of two."""
    exponents: torch.Tensor
    """(n, B) int32, of these powers."""
    bounds: torch.Tensor
    """(B,) int32, of all ranks."""
    words: torch.Tensor
    """(n, words) int32"""
    total: torch.Tensor
    """(words,) int32, the sum of the ranks' words."""
    mean: torch.Tensor
    """(numel,) of the dtype of the inputs."""

    def everything(self) -> list[torch.Tensor]:
        """As bits, so that NaN equals NaN."""
        found = [self.ys, self.exponents, self.bounds, self.words, self.total, self.mean]
        return [x.contiguous().view(torch.uint8) for x in found]


def sum_of(
    lattice_: Lattice,
    xs: list[torch.Tensor],
    key: Key,
    offset: int = 0,
    kernel: LatticeKernel = lattice,
) -> Sum:
    """Average xs, one for each rank."""
    task = LatticeTask(lattice_, xs[0].numel(), len(xs))
    made: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}
    ys = torch.empty(len(xs), task.padded, dtype=torch.float32, device="cpu")
    exponents, found = torch.empty(2, len(xs), task.blocks, **made)
    words = torch.empty(len(xs), task.words, **made)
    for x, *of_rank in zip(xs, ys, exponents, found, strict=True):
        kernel.rotate(task, key, offset, x, *of_rank)
    bounds = found.amax(dim=0)
    for rank in range(len(xs)):
        of_rank = [ys[rank], exponents[rank], bounds, words[rank]]
        kernel.encode(task, key, offset, rank, *of_rank)
    total = words.sum(dim=0).to(torch.int32)
    mean = torch.empty_like(xs[0])
    kernel.decode(task, key, offset, total, bounds, mean)
    return Sum(ys, exponents, bounds, words, total, mean)


def everything_here(
    lattice_: Lattice, xs: list[torch.Tensor], key: Key, offset: int
) -> list[torch.Tensor]:
    """All of `sum_of`, by the kernel that this process uses on CPU tensors."""
    kernel = lattice_kernel_for(torch.device("cpu"))
    return sum_of(lattice_, xs, key, offset, kernel).everything()


def magnitudes(bounds: torch.Tensor) -> torch.Tensor:
    """M as float64, in units of d^(-k/2); of blocks that are neither zero nor without a bound."""
    return torch.ldexp(1 + (bounds & 0x7FFFFF).double() / 2**23, bounds >> 23)
