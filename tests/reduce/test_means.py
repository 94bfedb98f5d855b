"""rhtcomm.all_reduce in real processes, against the collectives written out in one process."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from harness import Ranks
from libraries import needs_library
from problems import DTYPES
from simulation import (
    ALGORITHMS,
    BLOCK,
    CODEC,
    KEY,
    Case,
    data,
    reduce_cases,
    same_bits,
    simulated,
)

import rhtcomm
from rhtcomm import Codec, Eden, QuicFL
from rhtcomm.kernels import reference, use
from rhtcomm.reduce import Algorithm, choose_algorithm

QUANTIZERS = (QuicFL, Eden)


# ---- Bits -------------------------------------------------------------------------------------


def check_cases(ranks: Ranks, world_size: int, cases: list[Case]) -> None:
    by_rank = ranks.run(reduce_cases, world_size, cases)
    for case, *results in zip(cases, *by_rank, strict=True):
        codec, algorithm, numel, dtype = case
        inputs = [data(rank, numel, dtype) for rank in range(world_size)]
        expected = simulated(inputs, codec, KEY, algorithm)
        for rank, result in enumerate(results):
            assert same_bits(result, expected), f"{case} on rank {rank}"


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_rank_gets_the_bits_of_the_simulation(
    quantizer: Callable[[int], Any], world_size: int, ranks: Ranks
) -> None:
    small, large = 10 * BLOCK + 77, 400_000  # to "auto", of three and more ranks
    codec, wide = Codec(quantizer(4), block=BLOCK), Codec(quantizer(8), block=BLOCK)
    cases: list[Case] = [
        (codec, algorithm, small, dtype) for algorithm in (*ALGORITHMS, "auto") for dtype in DTYPES
    ]
    cases.append((wide, "auto", large, torch.float32))
    # Sizes around the number of ranks and around whole blocks.
    cases += [
        (codec, algorithm, numel, torch.float32)
        for algorithm in ALGORITHMS
        for numel in (1, 2 * BLOCK, 4 * BLOCK - 1, 12 * BLOCK)
    ]
    # Other widths and blocks.
    cases += [
        (Codec(quantizer(bits), rotations, block), "two_shot", 5000, torch.float32)
        for bits, rotations, block in [(1, 2, 4096), (3, 3, 32), (8, 2, 1024)]
    ]
    check_cases(ranks, world_size, cases)


def reduce_with_a_kernel_a_rank(
    rank: int, world_size: int, cases: list[Case]
) -> list[torch.Tensor]:
    """The reference on rank 0, the C kernels on the others."""
    with use(reference) if rank == 0 else nullcontext():
        return reduce_cases(rank, world_size, cases)


@needs_library
def test_ranks_with_different_kernels_get_the_same_bits(ranks: Ranks) -> None:
    cases: list[Case] = [
        (Codec(quantizer, block=BLOCK), algorithm, 20 * BLOCK + 77, dtype)
        for quantizer in (QuicFL(4), QuicFL(1), Eden(4), Eden(3))
        for algorithm in ALGORITHMS
        for dtype in DTYPES
    ]
    first, second = ranks.run(reduce_with_a_kernel_a_rank, 2, cases)
    for case, *results in zip(cases, first, second, strict=True):
        assert same_bits(*results), f"{case}"


def test_auto_is_the_cheapest_algorithm() -> None:
    for world_size, payload_bytes, expected in [
        *((2, 100, "all_gather"), (2, 10**9, "all_gather")),
        *((3, 196608, "all_gather"), (3, 196610, "two_shot")),  # 2/3 of it beside
        *((4, 87381, "all_gather"), (4, 87382, "two_shot")),  # 3/2
        *((512, 250, "all_gather"), (512, 260, "two_shot"), (100, 10**6, "two_shot")),
    ]:
        assert choose_algorithm("auto", world_size, payload_bytes) == expected
    for algorithm in ALGORITHMS:
        assert choose_algorithm(algorithm, 2, 10**6) == algorithm


# ---- Layouts ----------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scalar": lambda base: base[7],
    "three dimensions": lambda base: base[:990].view(9, 10, 11),
    "transposed": lambda base: base[:1200].view(30, 40).t(),
    "strided": lambda base: base[5:2000:3],
    "columns": lambda base: base[:1200].view(30, 40)[:, 4:9],
    "channels last": lambda base: base[:1440].view(2, 8, 9, 10).permute(0, 3, 1, 2),
    "offset": lambda base: base[3:1003],
    "empty": lambda base: base[:0].view(3, 0),
    "negated": lambda base: torch._neg_view(base[:1000]),
}


def reduce_layouts(rank: int, world_size: int) -> dict[tuple[str, str], torch.Tensor]:
    communicator = rhtcomm.TorchCommunicator()
    results: dict[tuple[str, str], torch.Tensor] = {}
    for algorithm in ALGORITHMS:
        for name, layout in LAYOUTS.items():
            base = data(rank, 3000)
            x = layout(base)
            rhtcomm.all_reduce(x, CODEC, KEY, communicator, algorithm=algorithm, min_numel=0)
            results[algorithm, name] = base
    return results


def test_any_layout_in_place(ranks: Ranks) -> None:
    world_size = 3
    for rank, results in enumerate(ranks.run(reduce_layouts, world_size)):
        for (algorithm, name), base in results.items():
            # The tensor holds the mean of its elements in their logical order; the rest stays.
            expected = data(rank, 3000)
            x = LAYOUTS[name](expected)
            inputs = [LAYOUTS[name](data(other, 3000)).reshape(-1) for other in range(world_size)]
            if x.numel():
                x.copy_(simulated(inputs, CODEC, KEY, algorithm).view(x.shape))
            assert same_bits(base, expected), f"{name} by {algorithm} on rank {rank}"


def reduce_expanded(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError, match="share memory") as caught:
        rhtcomm.all_reduce(
            *(data(rank, 10).expand(300, 10), CODEC, KEY, rhtcomm.TorchCommunicator()),
            min_numel=0,
        )
    return str(caught.value)


def test_elements_that_share_memory_are_refused(ranks: Ranks) -> None:
    for message in ranks.run(reduce_expanded, 2):
        assert "the tensor was expanded to its shape (300, 10)" in message


def reduce_leaf(rank: int, world_size: int) -> torch.Tensor:
    x = data(rank, 1000).requires_grad_()
    rhtcomm.all_reduce(x, CODEC, KEY, rhtcomm.TorchCommunicator(), min_numel=0)
    assert x.requires_grad
    assert x.is_leaf
    return x.detach()


def test_a_leaf_that_requires_grad(ranks: Ranks) -> None:
    expected = simulated([data(rank, 1000) for rank in range(2)], CODEC, KEY, "all_gather")
    assert all(same_bits(x, expected) for x in ranks.run(reduce_leaf, 2))


# ---- Without compression ----------------------------------------------------------------------


def grid(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers whose sums are exact in float32 in any order, and which bfloat16 holds."""
    random = torch.Generator().manual_seed(rank)
    return (torch.randint(-100, 101, (numel,), generator=random) / 8).to(dtype)


def reduce_small(rank: int, world_size: int, numel: int) -> list[torch.Tensor]:
    """With the default min_numel."""
    results = [grid(rank, numel, dtype) for dtype in DTYPES]
    for x in results:
        rhtcomm.all_reduce(x, CODEC, KEY, rhtcomm.TorchCommunicator())
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_small_tensors_are_averaged_exactly(world_size: int, ranks: Ranks) -> None:
    for numel, exact in [(1, True), ((1 << 14) - 1, True), (1 << 14, False)]:
        for results in ranks.run(reduce_small, world_size, numel):
            for dtype, result in zip(DTYPES, results, strict=True):
                inputs = [grid(rank, numel, torch.float32) for rank in range(world_size)]
                mean = (torch.stack(inputs).sum(0) / world_size).to(dtype)
                assert torch.equal(result, mean) == exact, f"{numel} of {dtype}"


def reduce_alone(rank: int, world_size: int) -> int:
    communicator = rhtcomm.TorchCommunicator()
    for dtype in DTYPES:
        for algorithm in ALGORITHMS:
            x = data(rank, 5000, dtype)
            x[7] = torch.inf
            before = x.clone()
            rhtcomm.all_reduce(x, CODEC, KEY, communicator, algorithm=algorithm, min_numel=0)
            assert same_bits(x, before)
    return communicator.bytes_sent


def test_one_rank_alone_keeps_its_tensor(ranks: Ranks) -> None:
    assert ranks.run(reduce_alone, 1) == [0]


# ---- Non-finite values ------------------------------------------------------------------------


def reduce_infinite(rank: int, world_size: int, algorithm: Algorithm) -> torch.Tensor:
    x = data(rank, 10 * BLOCK)
    if rank == 1:
        x[3 * BLOCK + 5] = torch.inf
        x[7 * BLOCK] = torch.nan
    communicator = rhtcomm.TorchCommunicator()
    rhtcomm.all_reduce(x, CODEC, KEY, communicator, algorithm=algorithm, min_numel=0)
    return x


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blocks_with_non_finite_values_become_nan_on_every_rank(
    algorithm: Algorithm, ranks: Ranks
) -> None:
    inputs = [data(rank, 10 * BLOCK) for rank in range(3)]
    expected = simulated(inputs, CODEC, KEY, algorithm)
    for block in (3, 7):
        expected[block * BLOCK : (block + 1) * BLOCK] = torch.nan
    for result in ranks.run(reduce_infinite, 3, algorithm):
        assert same_bits(result, expected)
