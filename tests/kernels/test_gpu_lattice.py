"""The lattice's Triton kernels against the torch reference: the same bits, always."""

import pytest
import torch
from interpreter import Interpreted, needs_triton
from lattices import everything_here, sum_of
from problems import DTYPES

from rhtcomm import Key, Lattice

pytestmark = needs_triton

CASES = [  # bits, ranks, rotations, block, magnitude
    (4, 2, 2, 4096, 1.0),
    (1, 3, 1, 32, 1e38),
    (8, 1, 3, 64, 1e-38),
]


def inputs(case: int) -> list[torch.Tensor]:
    """With blocks of zeros, of NaN, and of zeros on one rank."""
    _, n, _, block, magnitude = CASES[case]
    generator = torch.Generator().manual_seed(case)
    numel = block + 77 if block == 4096 else 5 * block + 7
    xs = [torch.randn(numel, generator=generator) * magnitude * 3.0**r for r in range(n)]
    xs = [x.clamp(-3e38, 3e38).to(DTYPES[case % 3]) for x in xs]
    if block < 4096:
        xs[0][3 * block : 4 * block] = 0
        xs[-1][2 * block + 1] = torch.nan
        for x in xs:
            x[block : 2 * block] = 0
    return xs


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_same_bits_as_the_reference(interpreted: Interpreted, case: int) -> None:
    bits, _, rotations, block, _ = CASES[case]
    lattice, key = Lattice(bits, rotations, block), Key(2**64 - 1 - case, step=2**32 - 1, hop=case)
    offset = (0, 7, 2**20 + 3)[case % 3] * block
    expected = sum_of(lattice, inputs(case), key, offset).everything()
    found = interpreted(everything_here, lattice, inputs(case), key, offset)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_blocks_beyond_the_registers_use_the_reference(interpreted: Interpreted) -> None:
    lattice, x = Lattice(4, 1, 1 << 15), torch.randn(1 << 15)
    expected = sum_of(lattice, [x], Key(1)).everything()
    found = interpreted(everything_here, lattice, [x], Key(1), 0)
    assert all(map(torch.equal, found, expected))
