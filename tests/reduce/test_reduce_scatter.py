"""rhtcomm.reduce.reduce_scatter in real processes, against the payloads written out."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from problems import CANONICAL_NAN, DTYPES
from simulation import BLOCK, CODEC, KEY, chunks_of, data, same_bits

import rhtcomm
from rhtcomm import ECDQ, Codec, DisagreementError, Eden, Key, Lattice, QuicFL, VectorQuantizer
from rhtcomm.reduce import Report, reduce_scatter


def shard_mean(inputs: list[torch.Tensor], owner: int, codec: Codec, key: Key) -> torch.Tensor:
    """What any rank would decode for `owner`: float32, from the payloads of all ranks.

    Shard i begins, as far as randomness is concerned, at the i-th multiple of whole blocks.
    """
    world_size, m = len(inputs), inputs[0].numel() // len(inputs)
    offset = owner * math.ceil(m / codec.block) * codec.block
    payloads = [
        codec.encode(x[owner * m : (owner + 1) * m], key, rank, world_size, offset=offset)
        for rank, x in enumerate(inputs)
    ]
    return codec.decode_mean(torch.stack(payloads), key, m, offset=offset)


# ---- Bits -------------------------------------------------------------------------------------

Case = tuple[Codec, int, torch.dtype, torch.dtype]  # with m, and the dtypes of tensor and output


def scatter_cases(rank: int, world_size: int, cases: list[Case]) -> list[torch.Tensor]:
    communicator, results = rhtcomm.TorchCommunicator(), []
    for codec, m, dtype, out_dtype in cases:
        tensor = data(rank, world_size * m, dtype)
        before, output = tensor.clone(), torch.full((m,), torch.nan, dtype=out_dtype)
        reduce_scatter(output, tensor, codec, KEY, communicator, min_numel=0)
        assert same_bits(tensor, before), "the tensor was changed"
        results.append(output)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_gets_what_any_rank_would_decode(world_size: int, ranks: Ranks) -> None:
    eden = Codec(Eden(3), block=BLOCK)
    cases: list[Case] = [(CODEC, 10 * BLOCK + 77, dtype, dtype) for dtype in DTYPES]
    cases += [(CODEC, 1000, torch.float32, dtype) for dtype in DTYPES]
    cases += [(CODEC, 1000, torch.bfloat16, torch.float32), (eden, 999, *[torch.float32] * 2)]
    cases += [(CODEC, m, *[torch.float32] * 2) for m in (1, BLOCK - 1, BLOCK, BLOCK + 1)]
    cases.append((Codec(QuicFL(2), "auto", BLOCK), 5 * BLOCK, *[torch.float32] * 2))
    cases.append((Codec(VectorQuantizer(2), block=BLOCK), 3 * BLOCK, *[torch.float32] * 2))
    cases += [(Codec(ECDQ(1.25), block=BLOCK), m, *[torch.float32] * 2) for m in (9, 3 * BLOCK + 1)]
    outcomes = ranks.run(scatter_cases, world_size, cases)
    for rank, results in enumerate(outcomes):
        for (codec, m, dtype, out_dtype), result in zip(cases, results, strict=True):
            inputs = [data(other, world_size * m, dtype) for other in range(world_size)]
            expected = inputs[0].float()  # of one rank alone, which has nothing to compress
            if world_size > 1:
                expected = shard_mean(inputs, rank, codec, KEY)
            assert same_bits(result, expected.to(out_dtype)), f"{codec}, {m}, {dtype}, {out_dtype}"


def scatter_in_chunks(rank: int, world_size: int, m: int) -> list[Any]:
    """Whole, and in chunks of five blocks; each time the exchanges are counted."""
    results: list[Any] = []
    for chunks in (nullcontext(), chunks_of(5)):
        communicator, starts = rhtcomm.TorchCommunicator(), []
        start = communicator.start_all_to_all
        communicator.start_all_to_all = lambda x, s=start, n=starts: n.append(x) or s(x)  # type: ignore
        tensor, output = data(rank, world_size * m), torch.empty(m)
        with chunks:
            report = reduce_scatter(output, tensor, CODEC, KEY, communicator, min_numel=0)
        results += [output, len(starts), report.bytes_sent]
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_chunks_change_no_bit(world_size: int, ranks: Ranks) -> None:
    m = 14 * BLOCK + 100
    inputs = [data(rank, world_size * m) for rank in range(world_size)]
    for rank, outcome in enumerate(ranks.run(scatter_in_chunks, world_size, m)):
        whole, once, sent, in_chunks, times, sent_in_chunks = outcome
        assert (once, times) == (1, 3)
        assert same_bits(whole, shard_mean(inputs, rank, CODEC, KEY))
        assert same_bits(in_chunks, whole)
        assert sent == (world_size - 1) * CODEC.nbytes(m)
        assert sent_in_chunks == sent + 2 * (world_size - 1) * 16  # the headers of two more


# ---- Errors of the mean -----------------------------------------------------------------------


def scatter_many_keys(rank: int, world_size: int, codec: Codec, m: int, n: int) -> torch.Tensor:
    """(2, m): the mean of n results, and of their squared errors."""
    communicator, tensor = rhtcomm.TorchCommunicator(), spiky(rank, world_size * m)
    tensors = [spiky(other, world_size * m).double() for other in range(world_size)]
    exact = torch.stack(tensors).mean(0).view(world_size, m)[rank]
    total, squares = torch.zeros(2, m, dtype=torch.float64)
    for step in range(n):
        output = torch.empty(m)
        key = Key(7, step)
        reduce_scatter(output, tensor, codec, key, communicator, min_numel=0, check=step == 0)
        total += output
        squares += (output - exact).square()
    return torch.stack([total / n - exact, squares / n])


def spiky(rank: int, numel: int) -> torch.Tensor:
    """Far from Gaussian: heavy tails, of which some coordinates stand out on one rank alone."""
    x = data(rank, numel)
    x[rank :: 5 * BLOCK] *= 20
    return x


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("world_size", [2, 3])
def test_unbiased_over_keys(world_size: int, bits: int, ranks: Ranks) -> None:
    """The error of the mean of N results is that of one over N, and each as large as expected."""
    m, n, codec = 5 * BLOCK + 33, 200, Codec(QuicFL(bits), block=BLOCK)
    tensors = torch.stack([spiky(rank, world_size * m) for rank in range(world_size)])
    energy = tensors.square().mean(0).view(world_size, m).sum(1)
    outcomes = ranks.run(scatter_many_keys, world_size, codec, m, n, timeout=120)
    for rank, (bias, squares) in enumerate(outcomes):
        error = squares.sum().item()
        assert error == pytest.approx(
            {2: 0.24583, 4: 0.011587}[bits] * energy[rank].item() / world_size, rel=0.1
        )
        # The sum of squares over 1313 coordinates has a relative deviation of about sqrt(2 / m).
        assert bias.square().sum().item() * n / error == pytest.approx(1, abs=0.25)


# ---- Exactly ----------------------------------------------------------------------------------


def with_non_finite(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    x = data(rank, numel, dtype)
    x[5 % numel] = torch.inf if rank == 0 else -torch.inf
    x[9 % numel] = torch.nan
    return x


def scatter_exactly(rank: int, world_size: int, m: int) -> list[torch.Tensor]:
    communicator, results = rhtcomm.TorchCommunicator(), []
    for dtype in DTYPES:
        for out_dtype in DTYPES:
            tensor = with_non_finite(rank, world_size * m, dtype)
            output = torch.zeros(m, dtype=out_dtype)
            report = reduce_scatter(output, tensor, CODEC, KEY, communicator)
            assert report.rotations is None
            assert report.bytes_sent == (world_size - 1) * m * dtype.itemsize
            results.append(output)
    return results


@pytest.mark.parametrize(("world_size", "m"), [(1, 10), (2, 8191), (3, 1), (4, 1000)])
def test_below_min_numel_sums_are_float32_in_the_order_of_ranks(
    world_size: int, m: int, ranks: Ranks
) -> None:
    for rank, results in enumerate(ranks.run(scatter_exactly, world_size, m)):
        shard = slice(rank * m, (rank + 1) * m)
        for index, result in enumerate(results):
            dtype = DTYPES[index // 3]
            inputs = [with_non_finite(r, world_size * m, dtype)[shard] for r in range(world_size)]
            total = torch.zeros(m)
            for x in inputs:
                total += x.float()
            mean = total / world_size
            expected = mean.to(result.dtype)
            integers = torch.int32 if result.dtype == torch.float32 else torch.int16
            expected.view(integers)[mean.isnan()] = CANONICAL_NAN[result.dtype]
            assert same_bits(result, expected)
            exact = torch.stack(inputs).double().mean(0)
            eps = torch.finfo(result.dtype).eps
            torch.testing.assert_close(
                *(mean.double(), exact), rtol=eps, atol=world_size * eps, equal_nan=True
            )


def scatter_around_min_numel(rank: int, world_size: int) -> list[int | None]:
    communicator = rhtcomm.TorchCommunicator()
    reports = [
        reduce_scatter(torch.empty(m), data(rank, 2 * m), CODEC, KEY, communicator, min_numel=1000)
        for m in (499, 500)
    ]
    return [report.rotations for report in reports]


def test_min_numel_counts_the_whole_tensor(ranks: Ranks) -> None:
    assert ranks.run(scatter_around_min_numel, 2) == [[None, 2]] * 2


def scatter_nothing(rank: int, world_size: int) -> list[Report]:
    communicator = rhtcomm.TorchCommunicator()
    communicator.start_all_to_all = None  # type: ignore[assignment]  # nobody needs it
    return [
        reduce_scatter(torch.empty(0), torch.empty(0), CODEC, KEY, communicator, min_numel=least)
        for least in (0, 1)
    ]


def test_nothing_to_scatter(ranks: Ranks) -> None:
    for reports in ranks.run(scatter_nothing, 2):
        assert [report.bytes_sent for report in reports] == [0, 0]


# ---- Layout, reports, failures ----------------------------------------------------------------


def scatter_shaped(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, Report, int]:
    communicator = rhtcomm.TorchCommunicator()
    flat, shaped = torch.empty(3000), torch.empty(30, 100, requires_grad=True)
    tensor = data(rank, 6000)
    report = reduce_scatter(flat, tensor, CODEC, KEY, communicator, min_numel=0)
    sent = communicator.bytes_sent
    leaf = tensor.view(2, 30, 100).requires_grad_()
    reduce_scatter(shaped, leaf, CODEC, KEY, communicator, min_numel=0, check=False)
    return flat, shaped.detach().reshape(-1), report, sent


def test_any_shape_and_what_the_report_says(ranks: Ranks) -> None:
    for flat, shaped, report, sent in ranks.run(scatter_shaped, 2):
        assert same_bits(flat, shaped)
        assert report.bytes_sent == CODEC.nbytes(3000) < sent  # the comparison is not the tensor's
        assert report.bytes_uncompressed == 12000  # half of a ring all-reduce
        assert (report.rotations, report.wanted_rotations) == (2, None)
        assert min(report.encode_seconds, report.exchange_seconds, report.decode_seconds) > 0


def scatter_auto(rank: int, world_size: int) -> list[int | None]:
    communicator, codec, wanted = rhtcomm.TorchCommunicator(), Codec(QuicFL(4), "auto"), []
    for spike in (False, True):
        tensor = torch.randn(4 * 4096, generator=torch.Generator().manual_seed(rank))
        if spike and rank == 1:
            tensor[:4096] = 0
            tensor[0] = 100  # in the shard of rank 0
        report = reduce_scatter(torch.empty(2 * 4096), tensor, codec, KEY, communicator)
        assert report.rotations == 2
        wanted.append(report.wanted_rotations)
    return wanted


def test_all_owners_hear_how_many_rotations_any_shard_wants(ranks: Ranks) -> None:
    assert ranks.run(scatter_auto, 2) == [[1, 2]] * 2


def scatter_infinite(rank: int, world_size: int) -> torch.Tensor:
    tensor, output = data(rank, 20 * BLOCK), torch.empty(10 * BLOCK)
    if rank == 0:
        tensor[3 * BLOCK + 5] = torch.inf
        tensor[17 * BLOCK] = torch.nan
    reduce_scatter(output, tensor, CODEC, KEY, rhtcomm.TorchCommunicator(), min_numel=0)
    return output


def test_blocks_with_non_finite_values_become_nan(ranks: Ranks) -> None:
    inputs = [data(rank, 20 * BLOCK) for rank in range(2)]
    for rank, (output, block) in enumerate(
        zip(ranks.run(scatter_infinite, 2), (3, 7), strict=True)
    ):
        expected = shard_mean(inputs, rank, CODEC, KEY)
        expected[block * BLOCK : (block + 1) * BLOCK] = torch.nan
        assert same_bits(output, expected)


def scatter_out_of_step(rank: int, world_size: int) -> str:
    """Rank 1 of three alone is at another key."""
    communicator = rhtcomm.TorchCommunicator()
    key = Key(KEY.seed, KEY.step + (rank == 1))
    with pytest.raises(rhtcomm.PayloadError) as error:
        reduce_scatter(
            *(torch.empty(1000), data(rank, 3000), CODEC, key, communicator),
            min_numel=0,
            check=False,
        )
    x = torch.full((10,), float(rank))
    rhtcomm.all_reduce(x, CODEC, KEY, communicator)  # the ranks are in step still
    assert x.tolist() == [1.0] * 10
    return str(error.value)


def test_a_payload_of_another_key_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(scatter_out_of_step, 3):
        assert "out of step" in message


def scatter_damaged(rank: int, world_size: int) -> str:
    """Of ranks 1 and 2, what the first receives is damaged."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return ""
    communicator = rhtcomm.TorchCommunicator(group)
    start = communicator.start_all_to_all

    def damaged(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        finish = start(x)

        def finish_damaged() -> torch.Tensor:
            received = finish()
            received[1, 9] ^= communicator.rank == 0  # of the configuration's fingerprint
            return received

        return finish_damaged

    communicator.start_all_to_all = damaged  # type: ignore[method-assign]
    message, output = "", torch.empty(1000)
    try:
        reduce_scatter(
            *(output, data(rank, 2000), CODEC, KEY, communicator), min_numel=0, check=False
        )
    except rhtcomm.PayloadError as error:
        message = str(error)
    communicator.start_all_to_all = start  # type: ignore[method-assign]
    reduce_scatter(*(output, data(rank, 2000), CODEC, KEY, communicator), min_numel=0, check=False)
    return message


def test_a_failure_leaves_no_rank_waiting_and_names_ranks_of_the_world(ranks: Ranks) -> None:
    nobody, failed, other = ranks.run(scatter_damaged, 3, timeout=20)
    assert (nobody, other) == ("", "")
    assert "the payload of rank 1 was made with a configuration other than" in failed
    assert "in this group rank 0 (rank 1 of the world), rank 1 (rank 2 of the world)" in failed


def scatter_by_other_things(rank: int, world_size: int) -> None:
    world, alone = dist.group.WORLD, [dist.new_group([other]) for other in range(2)][rank]
    communicator = rhtcomm.TorchCommunicator()
    good: dict[str, Any] = {"codec": CODEC, "key": KEY, "communicator": communicator}
    wrong: list[tuple[str, Any, type[Exception], str]] = [
        ("codec", QuicFL(4), TypeError, r"reduce_scatter: codec=.* must be a Codec"),
        ("codec", Lattice(4), TypeError, "a Lattice has no payload for a single rank"),
        ("key", 3, TypeError, "reduce_scatter: key=3 must be a rhtcomm.Key"),
        ("communicator", world, TypeError, r"process group; pass rhtcomm.TorchCommunicator"),
        (
            *("communicator", rhtcomm.HierarchicalCommunicator(world, alone), ValueError),
            "the communicator has two levels",
        ),
    ]
    for name, value, kind, message in wrong:
        with pytest.raises(kind, match=message):
            reduce_scatter(torch.empty(5), data(rank, 10), **(good | {name: value}))
    with pytest.raises(TypeError, match=r"output is a list; make it a torch\.Tensor"):
        reduce_scatter([0.0], data(rank, 10), **good)  # type: ignore[arg-type]
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(TypeError, match=f"the tensor is {dtype}, but only float32"):
            reduce_scatter(torch.empty(5), data(rank, 10).to(dtype), **good)
    good["codec"] = Codec(QuicFL(4 - rank), block=BLOCK)
    with pytest.raises(DisagreementError, match=r"bits \(4 on rank 0; 3 on rank 1\)"):
        reduce_scatter(torch.empty(5), data(rank, 10), **good)


def test_other_things_are_refused_by_name(ranks: Ranks) -> None:
    ranks.run(scatter_by_other_things, 2)
