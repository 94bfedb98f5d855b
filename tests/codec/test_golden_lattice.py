"""The lattice's known-answer vectors, and its steps as they are written in the document."""

import numpy as np
import pytest
from golden import literal, make_lattice
from golden.literal import Origin
from golden.make import read
from golden.make_lattice import CASES, KINDS, LatticeCase
from libraries import needs_library, variants

from rhtcomm.kernels import lattice, lattice_cpu
from rhtcomm.kernels.lattice import LatticeKernel
from rhtcomm.versions import ARITHMETIC, WIRE

VECTORS = read(make_lattice.PATH)
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check(case: LatticeCase, kernel: LatticeKernel) -> None:
    for kind, found in case.run(kernel).items():
        expected = VECTORS[f"{case.name}/{kind}"]
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected), f"{kind} of {case.name}: see test_golden.py"


def test_vectors_are_of_these_versions_and_cases() -> None:
    assert VECTORS["versions"].tolist() == [WIRE, ARITHMETIC]
    assert set(VECTORS) == {"versions"} | {
        f"{case.name}/{kind}" for case in CASES for kind in KINDS
    }


@named
def test_reference(case: LatticeCase) -> None:
    check(case, lattice)


@needs_library
@named
def test_c_kernels(case: LatticeCase) -> None:
    for library in variants().values():
        check(case, lattice_cpu.of(library))


@named
def test_the_document_gives_the_same(case: LatticeCase) -> None:
    n, lattice_ = case.world_size, case.lattice
    bits, rotations, block = lattice_.bits, lattice_.rotations, lattice_.block
    key = (case.key.seed, case.key.step, case.key.bucket, case.key.hop)
    origin = Origin(*key, n, case.offset, case.numel)
    stored = {kind: VECTORS[f"{case.name}/{kind}"] for kind in KINDS}
    rotated = [
        literal.lattice_rotate(x.numpy(), rotations, bits, block, origin) for x in case.inputs()
    ]
    bounds = np.stack([bound for _, _, bound in rotated]).max(axis=0)
    assert np.array_equal(bounds, stored["bounds"])
    words = [
        literal.lattice_words(y, exponents, bounds, bits, block, origin, rank)
        for rank, (y, exponents, _) in enumerate(rotated)
    ]
    assert np.array_equal(np.stack(words), stored["words"])
    total = np.sum(words, axis=0, dtype=np.int32)
    mean = literal.lattice_mean(total, bounds, bits, rotations, block, origin)
    assert np.array_equal(mean, stored["mean"])
