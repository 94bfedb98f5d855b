"""rhtcomm.all_reduce in real processes, against the collectives written out in one process."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from torch.distributed.device_mesh import init_device_mesh

import rhtcomm
from rhtcomm import Codec, DisagreementError, Eden, Key, Lattice, QuicFL, collectives
from rhtcomm.codec import DeferredChecks
from rhtcomm.collectives import (
    Algorithm,
    check_agreement,
    choose_algorithm,
    split_into_chunks,
    split_into_shards,
)
from rhtcomm.hooks import RHTState
from rhtcomm.kernels import cpu, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZERS = (QuicFL, Eden)
ALGORITHMS: tuple[Algorithm, ...] = ("all_gather", "two_shot", "gather")
KEY = Key(seed=11, step=5, bucket=2)
BLOCK = 256
CODEC = Codec(QuicFL(4), block=BLOCK)


def data(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(numel,) numbers of widely different sizes, other ones on every rank."""
    random = torch.Generator().manual_seed(1000 + rank)
    x = torch.randn(numel, generator=random) * torch.randn(numel, generator=random).exp()
    return ((rank + 1) * x).to(dtype)


# ---- The collectives, written out -------------------------------------------------------------


def all_gather_mean(inputs: list[torch.Tensor], codec: Codec, key: Key) -> torch.Tensor:
    """Everyone decodes what everyone encoded."""
    world_size = len(inputs)
    payloads = [codec.encode(x, key, rank, world_size) for rank, x in enumerate(inputs)]
    return codec.decode_mean(torch.stack(payloads), key, inputs[0].numel())


def two_shot_mean(inputs: list[torch.Tensor], codec: Codec, key: Key) -> torch.Tensor:
    """Rank r averages blocks w r .. w (r + 1) of all ranks, w = ceil(B / n), and encodes them."""
    world_size, numel = len(inputs), inputs[0].numel()
    width = math.ceil(math.ceil(numel / codec.block) / world_size) * codec.block
    second_key = Key(key.seed, key.step, key.bucket, hop=1)
    result = torch.full((numel,), torch.nan)
    for owner in range(world_size):
        start, stop = width * owner, min(width * (owner + 1), numel)
        if start >= stop:
            continue
        payloads = [
            codec.encode(x[start:stop], key, rank, world_size, first=start)
            for rank, x in enumerate(inputs)
        ]
        mean = codec.decode_mean(torch.stack(payloads), key, stop - start, first=start)
        again = codec.encode(mean, second_key, first=start)
        result[start:stop] = codec.decode_mean(again[None], second_key, stop - start, first=start)
    return result


def gather_mean(inputs: list[torch.Tensor], codec: Codec, key: Key) -> torch.Tensor:
    """One rank decodes what everyone encoded, and everyone what it encodes again."""
    mean = all_gather_mean(inputs, codec, key)
    second_key = Key(key.seed, key.step, key.bucket, hop=1)
    again = codec.encode(mean, second_key)
    return codec.decode_mean(again[None], second_key, mean.numel())


MEANS = {"all_gather": all_gather_mean, "two_shot": two_shot_mean, "gather": gather_mean}


def simulated(
    inputs: list[torch.Tensor], codec: Codec, key: Key, algorithm: Algorithm
) -> torch.Tensor:
    if algorithm == "auto":
        n, payload_bytes = len(inputs), codec.nbytes(inputs[0].numel())
        more = (n - 1) * payload_bytes - 2 * (n - 1) / n * payload_bytes
        algorithm = "two_shot" if more > 262144 else "all_gather"
    return MEANS[algorithm](inputs, codec, key).to(inputs[0].dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, with NaN equal to NaN and 0 different from -0."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- Bits -------------------------------------------------------------------------------------

Case = tuple[Codec, Algorithm, int, torch.dtype]


def reduce_cases(rank: int, world_size: int, cases: list[Case]) -> list[torch.Tensor]:
    communicator = rhtcomm.TorchCommunicator()
    results = []
    for codec, algorithm, numel, dtype in cases:
        x = data(rank, numel, dtype)
        rhtcomm.all_reduce(x, codec, KEY, communicator, algorithm=algorithm, min_numel=0)
        results.append(x)
    return results


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
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(rhtcomm.codec, "kernel_for", lambda device, quantizer: reference)
        return reduce_cases(rank, world_size, cases)


@pytest.mark.skipif(cpu.library_path() is None, reason="the C kernels were not built")
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
        *((3, 393216, "all_gather"), (3, 393218, "two_shot")),  # 2/3 of it beside
        *((4, 174762, "all_gather"), (4, 174764, "two_shot")),  # 3/2
        *((512, 500, "all_gather"), (512, 600, "two_shot"), (100, 10**6, "two_shot")),
    ]:
        assert choose_algorithm("auto", world_size, payload_bytes) == expected
    for algorithm in ALGORITHMS:
        assert choose_algorithm(algorithm, 2, 10**6) == algorithm


# ---- Shapes and places ------------------------------------------------------------------------

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


# ---- Error and bytes --------------------------------------------------------------------------

# By quadrature over N(0, 1): vNMSE, and kurtosis of a coordinate's error. That of QUIC-FL is large
# because its outermost levels lie far outside, at 79 sigma for two bits.
ERRORS = {
    ("QuicFL", 2): (0.24583, 303),
    ("QuicFL", 4): (0.011587, 150),
    ("Eden", 2): (0.133121, 3.4),
    ("Eden", 4): (0.009592, 10.8),
}


def gaussian(rank: int, numel: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(rank)
    return (1 + rank) * torch.randn(numel, generator=random)


def reduce_gaussian(
    rank: int, world_size: int, codecs: list[Codec], numel: int
) -> dict[tuple[int, Algorithm], torch.Tensor]:
    results = {}
    for index, codec in enumerate(codecs):
        for algorithm in ALGORITHMS:
            x = gaussian(rank, numel)
            rhtcomm.all_reduce(x, codec, KEY, rhtcomm.TorchCommunicator(), algorithm=algorithm)
            results[index, algorithm] = x
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_error_of_the_mean_is_that_of_the_theory(world_size: int, ranks: Ranks) -> None:
    numel = 1 << 18
    codecs = [Codec(quantizer(bits)) for quantizer in QUANTIZERS for bits in (2, 4)]
    (results, *_) = ranks.run(reduce_gaussian, world_size, codecs, numel)
    inputs = torch.stack([gaussian(rank, numel) for rank in range(world_size)]).double()
    exact = inputs.mean(0)
    for (index, algorithm), mean in results.items():
        quantizer = codecs[index].quantizer
        e, kurtosis = ERRORS[type(quantizer).__name__, quantizer.bits]
        # Independent errors e |x_i|^2 in the first hop; the second one encodes mean and error.
        expected = e * inputs.square().sum() / world_size**2
        if algorithm != "all_gather":
            expected += e * (exact.square().sum() + expected)
        # The sum of numel independent squares deviates by (kurtosis / numel)^(1/2) of itself: four
        # times that, and 1% for nodes, finite blocks and the dither that the ranks share.
        ratio = ((mean - exact).square().sum() / expected).item()
        tolerance = 0.01 + 4 * math.sqrt(kurtosis / numel)
        assert ratio == pytest.approx(1, abs=tolerance), f"{quantizer} {algorithm}"


def count_bytes(rank: int, world_size: int, numel: int) -> list[int]:
    sent = []
    for algorithm, min_numel in [*((known, 0) for known in ALGORITHMS), ("auto", numel + 1)]:
        communicator = rhtcomm.TorchCommunicator()
        rhtcomm.all_reduce(
            data(rank, numel),
            CODEC,
            KEY,
            communicator,
            algorithm=algorithm,  # type: ignore[arg-type]
            min_numel=min_numel,
            check=False,
        )
        sent.append(communicator.bytes_sent)
    return sent


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_sent(world_size: int, ranks: Ranks) -> None:
    numel = 400 * BLOCK
    payload = CODEC.nbytes(numel)
    assert payload == pytest.approx(numel / 2, rel=0.04), "not the 4 bits a coordinate"
    ring = 2 * (world_size - 1) / world_size
    for rank, sent in enumerate(ranks.run(count_bytes, world_size, numel)):
        star = payload if rank else (world_size - 1) * payload
        expected = [(world_size - 1) * payload, ring * payload, star, ring * 4 * numel]
        assert sent == [pytest.approx(count, rel=0.01) for count in expected]


# ---- Chunks -----------------------------------------------------------------------------------


@contextmanager
def chunks_of(blocks: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_FEWEST", blocks * BLOCK)
        patch.setattr(collectives, "_MOST", blocks * BLOCK)
        yield


def test_chunks_cover_a_tensor_in_order() -> None:
    for numel, block, calls in [(1, 32, 2), (6_553_600, 4096, 3), (2**24 + 77, 4096, 64)]:
        chunks = split_into_chunks(numel, block, calls)
        assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
        assert (chunks[0].start, chunks[-1].stop) == (0, numel)
        for chunk in chunks[:-1]:
            assert (chunk.stop - chunk.start) % (block * calls) == 0, "uneven shards"
    lengths = [len(split_into_chunks(25 << 18, 4096, calls)) for calls in (1, 2, 4, 64)]
    assert lengths == [9, 5, 3, 1]
    assert len(split_into_chunks(1 << 18, 4096, 1)) == 1


def reduce_in_chunks(rank: int, world_size: int, cases: list[Case]) -> list[torch.Tensor]:
    with chunks_of(2):
        return reduce_cases(rank, world_size, cases)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_gather_and_gather_in_chunks_change_no_bit(world_size: int, ranks: Ranks) -> None:
    """A block's randomness depends on its place in the bucket, not on the chunk."""
    cases: list[Case] = [
        (codec, algorithm, numel, torch.float32)
        for codec in (CODEC, Codec(Eden(3), block=BLOCK))
        for algorithm in ("all_gather", "gather")
        for numel in (31 * BLOCK + 77, 24 * BLOCK + 1, BLOCK)
    ]
    by_rank = ranks.run(reduce_in_chunks, world_size, cases)
    for case, *results in zip(cases, *by_rank, strict=True):
        codec, algorithm, numel, dtype = case
        inputs = [data(rank, numel, dtype) for rank in range(world_size)]
        expected = simulated(inputs, codec, KEY, algorithm)
        for result in results:
            assert same_bits(result, expected), case


def test_two_shot_in_chunks_changes_no_bit(ranks: Ranks) -> None:
    """Another rank may own a block, but what it does with it is the same."""
    case: Case = (CODEC, "two_shot", 31 * BLOCK + 77, torch.float32)
    expected = simulated([data(rank, case[2]) for rank in range(3)], CODEC, KEY, "two_shot")
    for (result,) in ranks.run(reduce_in_chunks, 3, [case]):
        assert same_bits(result, expected)


def want_in_chunks(rank: int, world_size: int) -> list[int | None]:
    """Only one chunk of one rank is too spiky for a single transform."""
    block, wanted = 4 * BLOCK, []  # the bound of Gaussian blocks of 256 exceeds the tolerance
    for algorithm in ALGORITHMS:
        for spike in (0, 17 * block, None):
            x = torch.randn(24 * block, generator=torch.Generator().manual_seed(rank))
            if rank == 1 and spike is not None:
                x[spike : spike + block] = 0
                x[spike] = 100
            with chunks_of(4 if algorithm == "two_shot" else 12):
                wanted.append(
                    rhtcomm.all_reduce(
                        *(x, Codec(QuicFL(4), "auto", block), KEY, rhtcomm.TorchCommunicator()),
                        algorithm=algorithm,
                        min_numel=0,
                    )
                )
    return wanted


def test_chunks_want_as_many_rotations_as_the_neediest(ranks: Ranks) -> None:
    assert ranks.run(want_in_chunks, 3) == [[2, 2, 1] * len(ALGORITHMS)] * 3


def log_of_exchanges(rank: int, world_size: int, algorithm: Algorithm) -> list[str]:
    """What is started and waited for, in its order."""
    communicator, log = rhtcomm.TorchCommunicator(), []

    def logged(name: str, start: Callable[[torch.Tensor], Callable[[], Any]]) -> Any:
        def wrapped(x: torch.Tensor) -> Callable[[], Any]:
            log.append(f"start {name}")
            finish = start(x)
            return lambda: log.append(f"finish {name}") or finish()

        return wrapped

    for name in ("all_gather", "all_to_all", "gather", "broadcast"):
        start = getattr(communicator, f"start_{name}")
        setattr(communicator, f"start_{name}", logged(name, start))
    with chunks_of(1 if algorithm == "two_shot" else 2):
        rhtcomm.all_reduce(
            *(data(rank, 6 * BLOCK), CODEC, KEY, communicator),
            **{"algorithm": algorithm, "min_numel": 0, "check": False},  # type: ignore[arg-type]
        )
    return log


def test_chunks_travel_while_others_are_encoded_and_decoded(ranks: Ranks) -> None:
    one_trip = ["start all_gather"] * 3 + ["finish all_gather"] * 3
    assert ranks.run(log_of_exchanges, 2, "all_gather") == [one_trip] * 2
    for algorithm, there, back in [
        ("two_shot", "all_to_all", "all_gather"),
        ("gather", "gather", "broadcast"),
    ]:
        turn = [f"finish {there}", f"start {back}"]
        expected = [f"start {there}"] * 3 + turn * 3 + [f"finish {back}"] * 3
        assert ranks.run(log_of_exchanges, 2, algorithm) == [expected] * 2


def reduce_with_a_broken_chunk(
    rank: int, world_size: int, algorithm: Algorithm
) -> tuple[str, torch.Tensor]:
    """What rank 0 receives in the second of three chunks is damaged; then once more without."""
    communicator, calls = rhtcomm.TorchCommunicator(), 0
    name = {"all_gather": "start_all_gather", "two_shot": "start_all_to_all"}.get(
        algorithm, "start_gather"
    )
    start = getattr(communicator, name)

    def damaged(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        nonlocal calls
        calls += 1
        if rank or calls != 2:
            return start(x)
        finish = start(x)

        def finish_damaged() -> torch.Tensor:
            payloads = finish()
            payloads[1, 9] ^= 1
            return payloads

        return finish_damaged

    setattr(communicator, name, damaged)
    options: Any = {"algorithm": algorithm, "min_numel": 0, "check": False}
    with chunks_of(1 if algorithm == "two_shot" else 3):
        message = ""
        try:
            rhtcomm.all_reduce(data(rank, 9 * BLOCK), CODEC, KEY, communicator, **options)
        except rhtcomm.PayloadError as error:
            message = str(error)
        x = data(rank, 9 * BLOCK)
        rhtcomm.all_reduce(x, CODEC, KEY, communicator, **options)
    return message, x


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_broken_chunk_leaves_no_rank_waiting(algorithm: Algorithm, ranks: Ranks) -> None:
    results = ranks.run(reduce_with_a_broken_chunk, 3, algorithm)
    messages, after = zip(*results, strict=True)
    assert "the payload of rank 1 was made with a configuration other" in messages[0]
    for message in messages[1:]:
        if algorithm == "all_gather":  # to which nobody owes a second payload
            assert message == ""
        else:
            assert "rank 0 could not decode what the ranks sent it" in message
    expected = simulated([data(rank, 9 * BLOCK) for rank in range(3)], CODEC, KEY, algorithm)
    for result in after:
        assert same_bits(result, expected)


# ---- Errors -----------------------------------------------------------------------------------


def reduce_wrong_dtypes(rank: int, world_size: int) -> list[str]:
    messages = []
    for dtype in (torch.float64, torch.int32, torch.int64, torch.uint8, torch.complex64):
        for check in (True, False):
            for numel in (3, 20_000):  # of the uncompressed and of the compressed path
                x = torch.full((numel,), rank, dtype=dtype)
                with pytest.raises(TypeError, match="only float32, bfloat16 and float16") as error:
                    rhtcomm.all_reduce(x, CODEC, KEY, rhtcomm.TorchCommunicator(), check=check)
                assert bool((x == rank).all())
        messages.append(str(error.value))
    return messages


def test_other_dtypes_are_refused_on_every_rank(ranks: Ranks) -> None:
    for messages in ranks.run(reduce_wrong_dtypes, 2):
        for name, message in zip(("float64", "int32", "int64", "uint8"), messages, strict=False):
            assert f"torch.{name}," in message


def reduce_by_other_things(rank: int, world_size: int) -> None:
    x, communicator = data(rank, 5), rhtcomm.TorchCommunicator()
    with pytest.raises(TypeError, match=r"codec=QuicFL\(bits=4.* must be a Codec, such as"):
        rhtcomm.all_reduce(x, QuicFL(4), KEY, communicator)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"process group; give rhtcomm.TorchCommunicator\(group\)"):
        rhtcomm.all_reduce(x, CODEC, KEY, dist.group.WORLD)  # type: ignore[arg-type]


def test_other_things_are_refused_by_name(ranks: Ranks) -> None:
    ranks.run(reduce_by_other_things, 2)


def reduce_by_unknown_algorithm(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="'foo' must be one of auto, all_gather, two_shot"):
        rhtcomm.all_reduce(
            data(rank, 5),
            CODEC,
            KEY,
            rhtcomm.TorchCommunicator(),
            algorithm="foo",  # type: ignore[arg-type]
        )


def test_unknown_algorithm(ranks: Ranks) -> None:
    ranks.run(reduce_by_unknown_algorithm, 2)


# What one rank has in place of the others' value, and the field that the error must name.
DISAGREEMENTS: dict[str, dict[str, Any]] = {
    "bits": {"codec": Codec(QuicFL(3), block=BLOCK)},
    "quantizer": {"codec": Codec(Eden(4), block=BLOCK)},
    "rotations": {"codec": Codec(QuicFL(4), rotations=3, block=BLOCK)},
    "block": {"codec": Codec(QuicFL(4), block=2 * BLOCK)},
    "algorithm": {"algorithm": "two_shot"},
    "min_numel": {"min_numel": 7},
    "shape": {"numel": 5000},
    "dtype": {"dtype": torch.bfloat16},
    "key": {"key": Key(KEY.seed, KEY.step + 1, KEY.bucket)},
}
ALIKE: dict[str, Any] = {"codec": CODEC, "key": KEY, "numel": 5120, "dtype": torch.float32}


def reduce_as_told(
    rank: int,
    *,
    codec: Codec,
    key: Key,
    numel: int,
    dtype: torch.dtype,
    min_numel: int = 0,
    algorithm: Algorithm = "auto",
) -> torch.Tensor:
    x = data(rank, numel, dtype)
    communicator = rhtcomm.TorchCommunicator()
    rhtcomm.all_reduce(x, codec, key, communicator, algorithm=algorithm, min_numel=min_numel)
    return x


def disagree(rank: int, world_size: int, odd_one: int) -> tuple[dict[str, str], torch.Tensor]:
    messages = {}
    for field, otherwise in DISAGREEMENTS.items():
        arguments = ALIKE | (otherwise if rank == odd_one else {})
        with pytest.raises(DisagreementError) as error:
            reduce_as_told(rank, **arguments)
        messages[field] = str(error.value)
    return messages, reduce_as_told(rank, **ALIKE)


@pytest.mark.parametrize(("world_size", "odd_one"), [(2, 0), (3, 2)])
def test_disagreement_is_named_on_every_rank(world_size: int, odd_one: int, ranks: Ranks) -> None:
    inputs = [data(rank, ALIKE["numel"]) for rank in range(world_size)]
    usable = simulated(inputs, CODEC, KEY, "auto")
    results = ranks.run(disagree, world_size, odd_one)
    for messages, after in results:
        assert messages == results[0][0]
        assert same_bits(after, usable), "the process group is not usable any more"
    for field, message in results[0][0].items():
        assert f"differently in {field} (" in message
        assert f"on rank {odd_one}" in message
        assert message.count(" on rank") == 2, f"more than {field} is named: {message}"


def disagree_in_two_fields(rank: int, world_size: int) -> str:
    facts = {"color": ["red", "green", "red"][rank], "same": 1, "size": rank}
    if rank == 0:
        facts["extra"] = "x"
    with pytest.raises(DisagreementError) as error:
        check_agreement(rhtcomm.TorchCommunicator(), facts, torch.device("cpu"))
    return str(error.value)


def test_all_differing_fields_are_named_with_their_values(ranks: Ranks) -> None:
    expected = (
        "differently in color (red on ranks 0, 2; green on rank 1), "
        "size (0 on rank 0; 1 on rank 1; 2 on rank 2), extra (x on rank 0; absent on ranks 1, 2);"
    )
    for message in ranks.run(disagree_in_two_fields, 3):
        assert expected in message


def disagree_at_the_end(rank: int, world_size: int) -> str:
    same, long = list(range(500)), [*range(500), rank]
    with pytest.raises(DisagreementError) as error:
        check_agreement(
            rhtcomm.TorchCommunicator(), {"same": same, "long": long}, torch.device("cpu")
        )
    return str(error.value)


def test_long_values_are_compared_to_their_end(ranks: Ranks) -> None:
    for message in ranks.run(disagree_at_the_end, 2):
        assert "differently in long ([0, 1, 2," in message
        assert len(message) < 400


def reduce_out_of_step(rank: int, world_size: int, algorithm: Algorithm) -> str:
    """Without the check, the payloads' headers tell."""
    key = Key(KEY.seed, KEY.step + rank)
    with pytest.raises(rhtcomm.PayloadError) as error:
        rhtcomm.all_reduce(
            data(rank, 5120),
            CODEC,
            key,
            rhtcomm.TorchCommunicator(),
            algorithm=algorithm,
            min_numel=0,
            check=False,
        )
    return str(error.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_payload_of_another_step_is_refused(algorithm: Algorithm, ranks: Ranks) -> None:
    for message in ranks.run(reduce_out_of_step, 2, algorithm):
        assert "out of step" in message


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


# ---- The stopwatch ----------------------------------------------------------------------------


def time_parts(rank: int, world_size: int) -> list[list[str]]:
    parts = []
    for algorithm, min_numel in [*((known, 0) for known in ALGORITHMS), ("auto", 1 << 20)]:
        stopwatch = mock.MagicMock()
        rhtcomm.all_reduce(
            data(rank, 5120),
            CODEC,
            KEY,
            rhtcomm.TorchCommunicator(),
            algorithm=algorithm,  # type: ignore[arg-type]
            min_numel=min_numel,
            stopwatch=stopwatch,
        )
        parts.append([part for part, _ in groupby(c.args[0] for c in stopwatch.call_args_list)])
    return parts


def test_stopwatch_is_told_every_part(ranks: Ranks) -> None:
    round_trip = ["encode", "exchange", "decode"]
    assert ranks.run(time_parts, 2) == [
        # Whatever comes at the end, each rank waits there until the others have what it sent.
        [*([*parts, "exchange"] for parts in (round_trip, 2 * round_trip, by_gather)), ["exchange"]]
        for by_gather in (2 * round_trip, round_trip)
    ]


# ---- Two levels -------------------------------------------------------------------------------


def two_levels(rank: int, nodes: int, ranks_of_a_node: int) -> rhtcomm.HierarchicalCommunicator:
    """Rank i is number i % L of node i // L."""
    numbers = torch.arange(nodes * ranks_of_a_node).view(nodes, ranks_of_a_node)
    within, _ = dist.new_subgroups_by_enumeration(numbers.tolist())
    between, _ = dist.new_subgroups_by_enumeration(numbers.t().tolist())
    return rhtcomm.HierarchicalCommunicator(within, between)


HIERARCHICAL: list[tuple[Codec | Lattice, Algorithm, int, torch.dtype]] = [
    (CODEC, "all_gather", 10 * BLOCK + 77, torch.float32),
    (CODEC, "all_gather", 10 * BLOCK + 77, torch.bfloat16),
    (CODEC, "two_shot", 10 * BLOCK, torch.float32),
    (CODEC, "gather", 10 * BLOCK, torch.float16),
    (Codec(Eden(3), block=BLOCK), "auto", 9 * BLOCK, torch.float32),
    (CODEC, "auto", BLOCK, torch.float32),  # one block: the other shards of a node are empty
    (Lattice(4, block=BLOCK), "auto", 10 * BLOCK + 77, torch.float32),
]


def reduce_hierarchically(
    rank: int, world_size: int, ranks_of_a_node: int
) -> tuple[list[torch.Tensor], list[int], torch.Tensor]:
    communicator = two_levels(rank, world_size // ranks_of_a_node, ranks_of_a_node)
    assert (communicator.rank, communicator.world_size) == (rank, world_size)
    order = communicator.all_gather(torch.tensor([rank, 100 + rank], dtype=torch.uint8))
    assert order.tolist() == [[other, 100 + other] for other in range(world_size)]
    results, sent = [], []
    for codec, algorithm, numel, dtype in HIERARCHICAL:
        x, before = data(rank, numel, dtype), communicator.bytes_sent
        rhtcomm.all_reduce(
            x, codec, KEY, communicator, algorithm=algorithm, min_numel=0, check=False
        )
        results.append(x)
        sent.append(communicator.bytes_sent - before)
    small = data(rank, 1000)
    rhtcomm.all_reduce(small, CODEC, KEY, communicator)
    return results, sent, small


@pytest.mark.parametrize(("nodes", "ranks_of_a_node"), [(2, 2), (1, 3), (3, 1)])
def test_two_levels_equal_their_simulation(nodes: int, ranks_of_a_node: int, ranks: Ranks) -> None:
    """Exact means of nodes, and their mean as if each node were one rank."""
    n = nodes * ranks_of_a_node
    outcomes = ranks.run(reduce_hierarchically, n, ranks_of_a_node)
    for case, (codec, algorithm, numel, dtype) in enumerate(HIERARCHICAL):
        inputs = [data(rank, numel, dtype).float() for rank in range(n)]
        node_means = []
        for node in range(nodes):
            total = torch.zeros(numel)
            for x in inputs[node * ranks_of_a_node : (node + 1) * ranks_of_a_node]:
                total += x
            node_means.append(total / ranks_of_a_node)
        results = [of_rank[0][case] for of_rank in outcomes]
        assert all(same_bits(result, results[0]) for result in results)
        if nodes == 1:
            assert same_bits(results[0], node_means[0].to(dtype))
        elif isinstance(codec, Codec):
            if ranks_of_a_node == 1 or algorithm != "two_shot":  # shards of shards else
                expected = simulated(node_means, codec, KEY, algorithm).to(dtype)
                assert same_bits(results[0], expected)
            sent = sum(of_rank[1][case] for of_rank in outcomes)
            formula = 2 * (nodes - 1) * codec.nbytes(numel)
            if algorithm == "all_gather":
                formula = nodes * (nodes - 1) * codec.nbytes(numel)
            headers = 2 * 16 * n * n
            assert formula <= sent <= formula + headers + 4 * BLOCK * n
        exact = torch.stack(inputs).double().mean(0)
        error = ((results[0] - exact).square().sum() / exact.square().sum()).item()
        assert error < 0.5
    for _, _, small in outcomes:
        assert same_bits(small, outcomes[0][2])
    exact = torch.stack([data(rank, 1000) for rank in range(n)]).double().mean(0)
    torch.testing.assert_close(outcomes[0][2].double(), exact, rtol=1e-6, atol=1e-5)


def reduce_out_of_step_on_two_levels(rank: int, world_size: int, codec: Codec | Lattice) -> str:
    """Rank 1 is another node's, and the ranks of its place find out."""
    communicator = two_levels(rank, 2, 2)
    key = Key(KEY.seed, KEY.step + (rank == 1))
    with pytest.raises(rhtcomm.PayloadError) as error:
        rhtcomm.all_reduce(
            data(rank, 10 * BLOCK), codec, key, communicator, min_numel=0, check=False
        )
    x = torch.full((10,), float(rank))
    rhtcomm.all_reduce(x, CODEC, KEY, communicator)  # the groups are at one place still
    assert x.tolist() == [1.5] * 10
    return str(error.value)


@pytest.mark.parametrize("codec", [CODEC, Codec(QuicFL(4), "auto", BLOCK), Lattice(4, block=BLOCK)])
def test_a_share_that_fails_leaves_no_rank_of_the_node_waiting(
    codec: Codec | Lattice, ranks: Ranks
) -> None:
    messages = ranks.run(reduce_out_of_step_on_two_levels, 4, codec)
    for message in messages[1::2]:
        assert "out of step" in message
    for message in messages[0::2]:
        assert "another rank of this node could not decode its share" in message


def from_device_mesh(rank: int, world_size: int) -> tuple[int, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2))
    communicator = rhtcomm.HierarchicalCommunicator.from_mesh(mesh)
    with pytest.raises(ValueError, match=r"has 1 dimension.*takes two: \(nodes, ranks of a node"):
        rhtcomm.HierarchicalCommunicator.from_mesh(init_device_mesh("cpu", (4,)))
    x = data(rank, 5000)
    rhtcomm.all_reduce(x, CODEC, KEY, communicator, min_numel=0)
    with pytest.raises(DisagreementError, match=r"bits \(4 on ranks 0, 1, 2; 3 on rank 3\)"):
        rhtcomm.all_reduce(x, Codec(QuicFL(4 if rank < 3 else 3)), KEY, communicator)
    return communicator.rank, x


def test_two_levels_from_a_device_mesh(ranks: Ranks) -> None:
    outcomes = ranks.run(from_device_mesh, 4)
    assert [number for number, _ in outcomes] == [0, 1, 2, 3]
    inputs = [(data(2 * node, 5000) + data(2 * node + 1, 5000)) / 2 for node in range(2)]
    for _, x in outcomes:
        assert same_bits(x, simulated(inputs, CODEC, KEY, "all_gather"))


def reduce_by_uneven_nodes(rank: int, world_size: int) -> None:
    """Nodes of ranks (0, 1) and (2,), so rank 1 finds its like in no other node."""
    within, _ = dist.new_subgroups_by_enumeration([[0, 1], [2]])
    between, _ = dist.new_subgroups_by_enumeration([[0, 2], [1]])
    communicator = rhtcomm.HierarchicalCommunicator(within, between)
    x = data(rank, 5000)
    for check, min_numel in ((True, 0), (False, 0), (False, 5001)):
        with pytest.raises(ValueError, match=r"1 to 2 ranks, and places in a node 1 to 2 nodes"):
            rhtcomm.all_reduce(x, CODEC, KEY, communicator, min_numel=min_numel, check=check)


def test_uneven_nodes_are_refused_on_every_rank(ranks: Ranks) -> None:
    ranks.run(reduce_by_uneven_nodes, 3)


def fail_while_nobody_looks(
    rank: int, world_size: int, dtype: torch.dtype, block: int, place: int
) -> tuple[str, torch.Tensor, torch.Tensor, str]:
    """As on CUDA, where the host does not wait for headers; one place in a node cannot decode."""
    communicator, codec = two_levels(rank, 2, 2), Lattice(4, block=block)
    options: Any = {"min_numel": 0, "check": False, "segments": [7, 6 * BLOCK, 4 * BLOCK + 70]}
    x = data(rank, 10 * BLOCK + 77, dtype)
    x[7 : 6 * BLOCK + 7] *= rank == 3  # this node alone knows of it
    expected = x.clone()
    rhtcomm.all_reduce(expected, codec, KEY, communicator, **options)
    key = Key(KEY.seed, KEY.step, KEY.bucket + (rank == place))
    message, later, checks = "", "", DeferredChecks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rhtcomm.codec, "_to_host", lambda headers: (Event(), headers.clone()))
        patch.setattr(DeferredChecks, "devices", ("cpu",))
        with checks.deferring():
            try:
                rhtcomm.all_reduce(x, codec, key, communicator, **options)
            except rhtcomm.PayloadError as error:
                message = str(error)
        try:
            checks.raise_failed(wait=True)
        except rhtcomm.PayloadError as error:
            later = str(error)
    return message, x, expected, later


class Event:
    """Of CUDA, what deferred checks ask of it."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize(
    ("dtype", "block", "place"),
    [*((dtype, BLOCK, 1) for dtype in DTYPES), (torch.float32, 4096, 0)],  # one block: all of it
)
def test_a_failed_share_is_nan_where_headers_are_looked_at_later(
    dtype: torch.dtype, block: int, place: int, ranks: Ranks
) -> None:
    shard = split_into_shards(10 * BLOCK + 77, block, 2)[place]
    outcomes = ranks.run(fail_while_nobody_looks, 4, dtype, block, place)
    for rank, (message, x, expected, later) in enumerate(outcomes):
        assert bool(x[shard].isnan().all()), "finite numbers that are no mean"
        assert same_bits(x[: shard.start], expected[: shard.start])
        if rank % 2 == place:
            assert "another rank has codes that cannot be added" in message
            assert not later
        else:
            assert not message
            assert f"could not decode its share for {KEY}: rank {place} of the node" in later


def reduce_with_a_foreign_share(rank: int, world_size: int) -> str:
    """What rank 2 gets from its node begins with something else."""
    communicator = two_levels(rank, 2, 2)
    start = communicator.within.start_all_gather

    def foreign(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        finish = start(x)

        def finish_foreign() -> torch.Tensor:
            gathered = finish()
            gathered[1, 3] ^= rank == 2
            return gathered

        return finish_foreign

    communicator.within.start_all_gather = foreign  # type: ignore[method-assign]
    x = data(rank, 10 * BLOCK)
    try:
        rhtcomm.all_reduce(x, CODEC, KEY, communicator, min_numel=0, check=False)
    except rhtcomm.PayloadError as error:
        return str(error)
    return ""


def test_a_share_has_a_mark(ranks: Ranks) -> None:
    messages = ranks.run(reduce_with_a_foreign_share, 4)
    assert "from rank 1 of this node" in messages.pop(2)
    assert messages == [""] * 3


def want_on_two_levels(rank: int, world_size: int, dtype: torch.dtype) -> list[int | None]:
    """Only one shard of one rank is too spiky for a single transform."""
    codec, communicator = Codec(QuicFL(4), "auto", 4 * BLOCK), two_levels(rank, 2, 2)
    wanted = []
    for spike in (0, 17 * codec.block, None):
        x = torch.randn(20 * codec.block, generator=torch.Generator().manual_seed(rank)).to(dtype)
        if spike is not None:
            x[spike : spike + codec.block] = 0
            if rank == 1:
                x[spike] = 100
        wanted.append(
            rhtcomm.all_reduce(
                *(x, codec, KEY, communicator),
                min_numel=0,
                check=False,
                segments=[1000, 20 * codec.block - 1000],
            )
        )
    return wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_wishes_of_all_shards_reach_all_ranks(dtype: torch.dtype, ranks: Ranks) -> None:
    assert ranks.run(want_on_two_levels, 4, dtype) == [[2, 2, 1]] * 4


def train_on_two_levels(rank: int, world_size: int) -> list[torch.Tensor | str]:
    """Buckets 0 to 2; the payload that rank 1 receives in bucket 1 is damaged."""
    communicator, step = two_levels(rank, 2, 2), 0
    start = rhtcomm.TorchCommunicator.start_all_gather

    def damaged(self: Any, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        finish, between_nodes = start(self, x), bytes(x[:2].tolist()) == b"RH"

        def finish_damaged() -> torch.Tensor:
            gathered = finish()
            if between_nodes and (rank, step) == (1, 1):
                gathered[1, 9] ^= 1
            return gathered

        return finish_damaged

    outcomes: list[torch.Tensor | str] = []
    with (
        pytest.MonkeyPatch.context() as patch,
        RHTState(block=BLOCK, min_numel=0, communicator=communicator) as state,
    ):
        patch.setattr(rhtcomm.TorchCommunicator, "start_all_gather", damaged)
        for step in range(3):
            x = data(rank, 10 * BLOCK + step)
            bucket = SimpleNamespace(
                **{"buffer": lambda x=x: x, "parameters": lambda x=x: [x]},
                **{"index": lambda: 0, "is_last": lambda: True},
            )
            try:
                outcomes.append(state.submit(bucket).wait())
            except RuntimeError as error:
                outcomes.append(str(error))
    return outcomes


def test_other_nodes_hear_of_a_failed_share(ranks: Ranks) -> None:
    """They could decode, but the node of the failure will not go on."""
    outcomes = ranks.run(train_on_two_levels, 4)
    gone = "another rank died, or failed and gave up"
    causes = [
        # What rank 1 gives back to its node may be lost as it leaves.
        f"rank 1 of the node; its own error says more|{gone}",
        "the payload of rank 1 was made with a configuration",
        *[gone] * 2,
    ]
    for rank, (first, second, third) in enumerate(outcomes):
        assert same_bits(first, outcomes[0][0])
        # The other node has the mean already, and hears of it behind the step's last result.
        assert re.search(causes[rank], third if rank > 1 else second)
        assert "an earlier bucket failed" in third
