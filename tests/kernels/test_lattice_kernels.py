"""The lattice's C kernels against the torch reference: the same bits, always."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lattices import Sum, sum_of
from libraries import needs_library, variants
from problems import DTYPES

from rhtcomm import Key, Lattice
from rhtcomm.kernels import LatticeTask, lattice_cpu, lattice_kernel_for, reference, use


def same(one: Sum, other: Sum) -> bool:
    return all(map(torch.equal, one.everything(), other.everything()))


@needs_library
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(1, 8),
    rotations=st.integers(1, 3),
    log_block=st.integers(5, 13),
    blocks=st.floats(0.01, 3.5),
    ranks=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([0.0, 1e-42, 1e-38, 1e-3, 1.0, 1e4, 1e38]),
    special=st.sampled_from([None, float("inf"), float("nan"), 0.0, 30.0]),
    offset=st.integers(0, 2**20),
    seed=st.integers(0, 2**64 - 1),
    threads=st.sampled_from((1, 1, 1, 2, 3)),
)
@example(4, 2, 12, 3.0, 2, torch.float32, 1.0, None, 0, 0, 1)
@example(8, 3, 14, 1.0, 3, torch.float32, 3e38, None, 0, 0, 1)
@example(1, 1, 5, 33.0, 1, torch.float16, 1e-3, None, 1, 0, 2)
def test_same_bits_as_the_reference(
    bits: int,
    rotations: int,
    log_block: int,
    blocks: float,
    ranks: int,
    dtype: torch.dtype,
    magnitude: float,
    special: float | None,
    offset: int,
    seed: int,
    threads: int,
) -> None:
    block = 1 << log_block
    lattice, numel = Lattice(bits, rotations, block), max(1, int(blocks * block))
    generator = torch.Generator().manual_seed(seed % 2**63)
    spread = torch.logspace(-3, 0, ranks)
    xs = [torch.randn(numel, generator=generator) * magnitude * s for s in spread]
    xs = [x.clamp(-3e38, 3e38).to(dtype) for x in xs]
    if special is not None:
        xs[-1][numel // 2] = special
    key = Key(seed, step=seed % 2**32, bucket=seed % 977, hop=seed % 16)
    expected = sum_of(lattice, xs, key, offset * block)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, library in variants().items():
            found = sum_of(lattice, xs, key, offset * block, lattice_cpu.of(library))
            assert same(found, expected), name
    finally:
        torch.set_num_threads(before)


@needs_library
def test_sums_of_very_many_ranks() -> None:
    """Lanes of up to 32 bits, whose sums float32 cannot hold: any words decode alike."""
    generator = torch.Generator().manual_seed(0)
    for bits, n in ((8, 1 << 24), (8, (1 << 23) + 5), (1, 3 << 20), (4, 777)):
        task = LatticeTask(Lattice(bits, 1, 64), 64 * 50, n)
        words = torch.randint(-(1 << 31), 1 << 31, (task.words,), generator=generator)
        bounds = torch.randint(-(150 << 23), 120 << 23, (50,), generator=generator).int()
        out = torch.empty(2, task.numel)
        with use(reference):
            kernel = lattice_kernel_for(out.device)
        kernel.decode(task, Key(1), 0, words.int(), bounds, out[0])
        for name, library in variants().items():
            lattice_cpu.of(library).decode(task, Key(1), 0, words.int(), bounds, out[1])
            assert torch.equal(out[1], out[0]), name


@needs_library
def test_rotated_coordinates_may_take_the_place_of_the_tensor() -> None:
    x = torch.randn(3 * 512, generator=torch.Generator().manual_seed(0))
    task, key = LatticeTask(Lattice(4, block=512), x.numel(), 2), Key(2)
    expected = sum_of(task.lattice, [x, x], key)
    for library in (None, *variants().values()):
        with use(library or reference):
            kernel = lattice_kernel_for(x.device)
        y = x.clone()
        found = torch.empty(2, task.blocks, dtype=torch.int32)
        kernel.rotate(task, key, 0, y, y, *found)
        assert torch.equal(y, expected.ys[0])
        assert torch.equal(found, torch.stack([expected.exponents[0], expected.bounds]))


@needs_library
def test_nothing_is_written_beyond_the_words() -> None:
    """For numbers of words of a block from 1 to 683, in two blocks and the beginning of a third."""
    for bits, size, n in ((1, 32, 1), (8, 32, 1), (4, 64, 2), (3, 256, 3), (4, 4096, 2)):
        numel = 2 * size + size // 2 - 3
        task = LatticeTask(Lattice(bits, 1, size), numel, n)
        y, found = torch.randn(task.padded), torch.zeros(2, task.blocks, dtype=torch.int32)
        for library in variants().values():
            words = torch.full((task.words + 40,), 7, dtype=torch.int32)
            kernel = lattice_cpu.of(library)
            kernel.encode(task, Key(1), 0, 0, y, *found, words[20:-20])
            assert bool((words[:20] == 7).all())
            assert bool((words[-20:] == 7).all())
            out = torch.full((numel + 40,), 7.0)
            kernel.decode(task, Key(1), 0, words[20:-20], found[1], out[20:-20])
            assert bool((out[:20] == 7).all())
            assert bool((out[-20:] == 7).all())


def test_the_kernel_is_in_c_where_that_of_a_codec_is() -> None:
    x = torch.empty(0)
    with use(reference):
        assert lattice_kernel_for(x.device).__name__ == "rhtcomm.kernels.lattice"  # type: ignore[attr-defined]
    for library in variants().values():
        with use(library):
            found = lattice_kernel_for(x.device)
            assert isinstance(found, lattice_cpu.LatticeLibrary)
            assert found is lattice_kernel_for(x.device)
