"""Known-answer vectors of the lattice, in lattice.npz: words, bounds and means.

    PYTHONPATH=tests/codec:tests/lib python -m golden.make_lattice

writes it, by the torch reference; inputs and NaN are as in make.py.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from golden.make import Array, canonical, gaussian
from lattices import sum_of

from rhtcomm import Key, Lattice
from rhtcomm.kernels import LatticeKernel, lattice
from rhtcomm.versions import ARITHMETIC, WIRE

__all__ = ["CASES", "KINDS", "PATH", "LatticeCase"]

PATH = Path(__file__).with_name("lattice.npz")
KINDS = ("words", "bounds", "mean")


@dataclass(frozen=True)
class LatticeCase:
    name: str
    lattice: Lattice
    numel: int
    key: Key
    world_size: int
    offset: int = 0

    def inputs(self) -> list[torch.Tensor]:
        """One for each rank; of the third block, the first has a NaN, and all others are zeros."""
        of_ranks = []
        for rank in range(self.world_size):
            bits = gaussian(self.numel, rank, self.lattice.block, "float32").copy()
            x = torch.from_numpy(bits.view(np.float32))
            block = self.lattice.block
            if self.numel > 3 * block:
                x[2 * block : 3 * block] = 0
                x[block] = x[block] if rank else torch.nan
            of_ranks.append(x)
        return of_ranks

    def run(self, kernel: LatticeKernel = lattice) -> dict[str, Array]:
        """The ranks' words (n, words), the bounds of all ranks, and the bits of the mean."""
        found = sum_of(self.lattice, self.inputs(), self.key, self.offset, kernel)
        mean = canonical(found.mean)
        return {"words": found.words.numpy(), "bounds": found.bounds.numpy(), "mean": mean}


CASES = [
    LatticeCase(f"Lattice{bits}-n{n}", Lattice(bits, 1 + bits % 3, 256), 1000, Key(bits, n), n, 512)
    for bits, n in ((4, 2), (4, 3), (1, 3), (8, 2), (7, 3), (3, 1), (2, 12))
]


if __name__ == "__main__":
    arrays: dict[str, Array] = {"versions": np.array([WIRE, ARITHMETIC])}
    for case in CASES:
        arrays |= {f"{case.name}/{kind}": array for kind, array in case.run().items()}
    np.savez(PATH, **arrays)  # type: ignore[arg-type]
