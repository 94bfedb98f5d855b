"""Segments that are zero on all ranks: exact zeros, whatever their neighbours are."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from groups import Alone, two_levels
from harness import Ranks
from models import wrapped
from problems import DTYPES, numbers
from simulation import ALGORITHMS, BLOCK, CODEC, chunks_of, data, same_bits
from states import TIMEOUT
from torch import nn

import rhtcomm
from rhtcomm import ECDQ, Codec, Eden, Key, Lattice, QuicFL, VectorQuantizer
from rhtcomm.hooks import RHTState
from rhtcomm.reduce import Algorithm
from rhtcomm.segments import Segments, pack, unpack

KEY = Key(seed=5, step=2, bucket=1)

# ---- Finding and clearing them ----------------------------------------------------------------


def lengths_of(count: int, numel: int, seed: int = 0) -> list[int]:
    """(count,) lengths with sum numel, of widely different sizes, some of them zero."""
    random = torch.Generator().manual_seed(seed)
    cuts = (torch.rand(count - 1, generator=random) ** 2 * numel).long().sort().values
    edges = [0, *cuts.tolist(), numel]
    return [stop - start for start, stop in pairwise(edges)]


def with_values(dtype: torch.dtype, lengths: Sequence[int]) -> tuple[torch.Tensor, list[bool]]:
    """One more kind of segment each time, and whether it counts as used. Of zeros, some are -0."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal
    values = [None, 1.0, math.nan, -0.0, -math.inf, smallest, -smallest, None]
    x, expected, start = torch.zeros(sum(lengths), dtype=dtype), [], 0
    x[::3] = -0.0
    for i, length in enumerate(lengths):
        value = values[i % len(values)]
        if length and value is not None:
            x[start + i * 7919 % length] = value  # anywhere
        if length:
            expected.append(value is not None and value != 0)
        start += length
    return x, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_used_segments_are_found_and_others_restored(dtype: torch.dtype, where: str) -> None:
    """Both ways run on CPU tensors here."""
    for lengths in ([5], [1, 0, 3], [40_000, 3, 90_000], lengths_of(33, 900), [0] * 3 + [1] * 1000):
        segments = Segments(lengths, sum(lengths))
        for shift in range(8):  # so that every kind meets every length
            rotated = lengths[shift % len(lengths) :] + lengths[: shift % len(lengths)]
            segments = Segments(rotated, sum(rotated))
            x, expected = with_values(dtype, rotated)
            used = getattr(segments, f"_used_on_{where}")(x)
            assert used.shape == (4 * -(-len(expected) // 32),)
            assert unpack(used).tolist() == expected + [0] * (8 * len(used) - len(expected))
            for value in (None, torch.arange(len(x)).to(dtype)):
                restored, right = x.clone(), x.clone()
                getattr(segments, f"_restore_on_{where}_")(restored, used, value)
                start = 0
                for kept, length in zip(expected, segments.lengths, strict=True):
                    run = slice(start, start + length)
                    if not kept:
                        right[run] = 0.0 if value is None else value[run]
                    start += length
                assert same_bits(restored, right)


def test_flags_are_packed_lowest_first() -> None:
    flags = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.5
    octets = [sum(int(flag) << i for i, flag in enumerate(part)) for part in flags.view(8, 8)]
    assert pack(flags).tolist() == octets
    assert unpack(pack(flags)).tolist() == flags.int().tolist()


@pytest.mark.parametrize("segments", [[5], [5, 6], [12, -2], [], [2.5, 7.5]])
def test_segments_that_do_not_make_up_the_tensor_are_refused(segments: list[Any]) -> None:
    residual = torch.zeros(10)
    with pytest.raises(
        (ValueError, TypeError), match=r"segments has|segments=\[2\.5, 7\.5\] must hold"
    ):
        rhtcomm.all_reduce(
            torch.ones(10), CODEC, KEY, Alone(), segments=segments, check=False, residual=residual
        )


# ---- all_reduce -------------------------------------------------------------------------------

NUMEL = 31 * BLOCK + 77
# Cut by the edges of blocks, chunks and shards, and within them; some are empty.
LENGTHS = [*lengths_of(40, 20 * BLOCK), 0, 5 * BLOCK, BLOCK, 3, *[7] * 30, 0]
LENGTHS += [NUMEL - sum(LENGTHS), 0]
Case = tuple[Codec | Lattice, Algorithm, torch.dtype, Sequence[int]]
CASES: list[Case] = [
    *((CODEC, algorithm, dtype, LENGTHS) for algorithm in ALGORITHMS for dtype in DTYPES),
    *((Codec(Eden(1), block=BLOCK), algorithm, torch.float32, LENGTHS) for algorithm in ALGORITHMS),
    (Codec(QuicFL(2, 1 / 512), block=1024), "auto", torch.float32, LENGTHS),
    *(
        (Codec(ECDQ(2.5), block=BLOCK), algorithm, torch.float32, LENGTHS)
        for algorithm in ALGORITHMS
    ),
    (Codec(VectorQuantizer(2), "auto", block=BLOCK), "two_shot", torch.float32, LENGTHS),
    *((Lattice(4, block=BLOCK), "auto", dtype, LENGTHS) for dtype in DTYPES),
    *((CODEC, algorithm, torch.float32, lengths_of(1000, NUMEL)) for algorithm in ALGORITHMS),
    (CODEC, "two_shot", torch.float32, [NUMEL - 1, 1]),
    (Codec(QuicFL(4), block=8192), "auto", torch.float32, LENGTHS),  # one: there are empty shards
    (CODEC, "all_gather", torch.float32, [3, NUMEL - 3]),
]


def runs_of(lengths: Sequence[int]) -> list[slice]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def gradient(
    rank: int, world_size: int, dtype: torch.dtype, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every three segments one is zero on all ranks, one on all ranks but the last, one on none.

    Returns:
        x (numel,), and which coordinates are zero on all ranks.
    """
    x, unused = data(rank, sum(lengths), dtype), torch.zeros(sum(lengths), dtype=torch.bool)
    for i, run in enumerate(runs_of(lengths)):
        if i % 3 == 1 or (i % 3 == 2 and rank < world_size - 1):
            x[run] = -0.0 if rank == 1 else 0.0
        if i % 3 == 1:
            unused[run] = True
    return x, unused


def communicator_of(rank: int, world_size: int, nodes: int) -> Any:
    return two_levels(rank, nodes, world_size // nodes) if nodes else rhtcomm.TorchCommunicator()


def reduce_cases(
    rank: int, world_size: int, nodes: int, cases: list[Case], broken: bool
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Of each case the mean with and without segments, and how many bytes more it sends."""
    communicator, outcomes = communicator_of(rank, world_size, nodes), []
    with chunks_of(2):
        for codec, algorithm, dtype, lengths in cases:
            x, unused = gradient(rank, world_size, dtype, lengths)
            if broken and rank == world_size - 1:  # in blocks that unused segments lie in too
                x[~unused] = torch.where(x[~unused].abs() > 9, torch.nan, x[~unused])
            means, sent = [], [communicator.bytes_sent]
            for segments in (lengths, None):
                means.append(x.clone())
                rhtcomm.all_reduce(
                    *(means[-1], codec, KEY, communicator),
                    algorithm=algorithm,
                    min_numel=0,
                    segments=segments,
                    check=False,
                )
                sent.append(communicator.bytes_sent)
            outcomes.append((means[0], means[1], 2 * sent[1] - sent[0] - sent[2]))
    return outcomes


@pytest.mark.parametrize(
    ("world_size", "nodes"), [(2, 0), (3, 0), (4, 0), (4, 2), (3, 1), (3, 3), (2, 2)]
)
def test_zeros_on_all_ranks_come_back_and_nothing_else_changes(
    world_size: int, nodes: int, ranks: Ranks
) -> None:
    for broken in (False, True):
        cases = CASES if not broken else CASES[::4]
        by_rank = ranks.run(reduce_cases, world_size, nodes, cases, broken, timeout=100)
        for number, case in enumerate(cases):
            _, unused = gradient(0, world_size, *case[2:])
            assert unused.any()
            expected = by_rank[0][number][1].clone()
            # Otherwise the case shows nothing. A node's own mean is exact, and few coordinates
            # may happen to be.
            assert expected[unused].any() or nodes == 1 or unused.sum() < 10
            assert bool(expected.isnan().any()) == broken
            expected[unused] = 0.0
            for rank, outcomes in enumerate(by_rank):
                assert same_bits(outcomes[number][0], expected), f"{case} on rank {rank}"


def test_a_bit_a_segment_is_sent(ranks: Ranks) -> None:
    n, star = 3, []
    cases: list[Case] = [(CODEC, a, torch.float32, LENGTHS) for a in ALGORITHMS]
    cases += [(CODEC, "all_gather", torch.float32, [0, NUMEL, 0])]
    words = 4 * math.ceil(sum(length > 0 for length in LENGTHS) / 32)
    for outcomes in ranks.run(reduce_cases, n, 0, cases, False):
        all_gather, two_shot, gather, one = [more for _, _, more in outcomes]
        assert (all_gather, two_shot, one) == ((n - 1) * words, (n - 1) * words, 0)
        star.append(gather)
    assert star == [(n - 1) * words, words, words]


def reduce_zeros(rank: int, world_size: int, nodes: int) -> list[torch.Tensor]:
    communicator, results = communicator_of(rank, world_size, nodes), []
    codecs = (CODEC, Codec(QuicFL(1), 1, BLOCK), Codec(Eden(3)), Codec(ECDQ(2), block=BLOCK))
    for codec in (*codecs, Lattice(4, block=BLOCK)):
        for algorithm in (*ALGORITHMS, "auto")[-1 if isinstance(codec, Lattice) else 0 :]:
            for dtype in DTYPES:
                x = torch.full((NUMEL,), -0.0 if rank == 1 else 0.0, dtype=dtype)
                rhtcomm.all_reduce(
                    *(x, codec, KEY, communicator),
                    algorithm=algorithm,  # type: ignore[arg-type]
                    min_numel=0,
                    check=False,
                )
                results.append(x)
    return results


@pytest.mark.parametrize(("world_size", "nodes"), [(3, 0), (4, 2)])
def test_a_tensor_of_zeros_needs_no_segments(world_size: int, nodes: int, ranks: Ranks) -> None:
    for results in ranks.run(reduce_zeros, world_size, nodes):
        for x in results:
            assert same_bits(x, torch.zeros_like(x))


def disagree(rank: int, world_size: int) -> None:
    for segments in ([rank, 1000 - rank], None if rank else [1000]):
        with pytest.raises(rhtcomm.DisagreementError, match=r"in segments \("):
            rhtcomm.all_reduce(
                *(data(rank, 1000), CODEC, KEY, rhtcomm.TorchCommunicator()),
                segments=segments,
            )


def test_segments_must_be_those_of_the_other_ranks(ranks: Ranks) -> None:
    ranks.run(disagree, 2)


# ---- Error feedback ---------------------------------------------------------------------------

STEPS = 5
BIASED = Codec(Eden(1, biased=True), block=BLOCK)
# (codec, algorithm, dtype, min_numel, segments)
FEEDBACK: list[tuple[Codec, Algorithm, torch.dtype, int, list[int] | None]] = [
    *((BIASED, algorithm, torch.float32, 0, LENGTHS) for algorithm in ALGORITHMS),
    (Codec(QuicFL(2), block=BLOCK), "two_shot", torch.bfloat16, 0, LENGTHS),
    (BIASED, "auto", torch.float32, NUMEL + 1, LENGTHS),  # uncompressed
    (BIASED, "all_gather", torch.float32, 0, None),
    (BIASED, "auto", torch.float16, NUMEL + 1, None),
]


def gradient_at(
    rank: int, world_size: int, step: int, dtype: torch.dtype, case: int
) -> torch.Tensor:
    """Used throughout at step 0; later as `gradient` is, or, as one segment, at even steps."""
    x = (rank + 1) * numbers(rank, step, shape=(NUMEL,)).to(dtype)
    if FEEDBACK[case][4] is None:
        return x * (step % 2 == 0)
    if step:
        x[gradient(rank, world_size, dtype, LENGTHS)[0] == 0] = 0
    return x


def feed_back(rank: int, world_size: int, nodes: int) -> list[list[torch.Tensor]]:
    """Of each case and step the mean, and the residual after it."""
    communicator, outcomes = communicator_of(rank, world_size, nodes), []
    with chunks_of(2):
        for case, (codec, algorithm, dtype, min_numel, segments) in enumerate(FEEDBACK):
            residual, seen = (rank - 1.5) * torch.ones(NUMEL), []
            for step in range(STEPS):
                x = gradient_at(rank, world_size, step, dtype, case)
                rhtcomm.all_reduce(
                    *(x, codec, Key(1, step), communicator),
                    algorithm=algorithm,
                    min_numel=min_numel,
                    segments=segments,
                    check=False,
                    residual=residual,
                )
                seen += [x, residual.clone()]
            outcomes.append(seen)
    return outcomes


@pytest.mark.parametrize(("world_size", "nodes"), [(1, 0), (2, 0), (3, 0), (4, 2)])
def test_what_is_left_of_an_unused_segment_stays(world_size: int, nodes: int, ranks: Ranks) -> None:
    by_rank = ranks.run(feed_back, world_size, nodes, timeout=100)
    for case, (_, _, dtype, _, segments) in enumerate(FEEDBACK):
        started = torch.stack([(rank - 1.5) * torch.ones(NUMEL) for rank in range(world_size)])
        put_in, sent = started.double().mean(0), torch.zeros(NUMEL, dtype=torch.float64)
        for step in range(STEPS):
            xs = [gradient_at(r, world_size, step, dtype, case) for r in range(world_size)]
            put_in += torch.stack(xs).double().mean(0)
            results = [outcomes[case][2 * step] for outcomes in by_rank]
            left = [outcomes[case][2 * step + 1] for outcomes in by_rank]
            assert all(same_bits(result, results[0]) for result in results)
            sent += results[0]
            bound = 1e-4 * float(put_in.abs().max() + torch.stack(left).abs().max())
            torch.testing.assert_close(
                sent + torch.stack(left).double().mean(0), put_in, rtol=0, atol=bound
            )
            unused = torch.zeros(NUMEL, dtype=torch.bool)
            for run in runs_of(segments or [NUMEL]):
                unused[run] = not any(bool(x[run].any()) for x in xs)
            assert unused.any() == (step > 0 if segments else step % 2 == 1)
            assert same_bits(results[0][unused], torch.zeros_like(results[0][unused]))
            assert results[0][~unused].any() or unused.all()
            if step:
                for outcomes in by_rank:
                    before, after = outcomes[case][2 * step - 1], outcomes[case][2 * step + 1]
                    assert same_bits(before[unused], after[unused])


# ---- The hook ---------------------------------------------------------------------------------


class Two(nn.Module):
    """A layer that is used and one that is not, small parameters between large ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.ParameterList(
            [torch.randn(numel, dtype=dtype) / 9 for numel in (3, 900, 1, 3000)]
        )
        self.unused = nn.ParameterList(
            [torch.randn(numel, dtype=dtype) / 9 for numel in (700, 1, 1300, 5)]
        )

    def forward(self, factor: float, both: bool) -> torch.Tensor:
        taken = [*self.used, *self.unused] if both else list(self.used)
        return factor * torch.stack([weight.abs().square().sum() for weight in taken]).sum()


def train(
    rank: int, world_size: int, dtype: torch.dtype, nodes: int, options: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The largest gradients of the layers after each step, and all parameters at the end."""
    communicator = two_levels(rank, nodes, world_size // nodes) if nodes else None
    timeout = None if nodes else TIMEOUT
    model = Two(dtype)
    with RHTState(
        block=BLOCK,
        min_numel=0,
        warmup_steps=0,
        communicator=communicator,
        timeout=timeout,
        **options,
    ) as state:
        ddp = wrapped(model, state, find_unused_parameters=True, gradient_as_bucket_view=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-4)  # which float16 holds
        largest = []
        for step in range(4):
            optimizer.zero_grad(set_to_none=False)
            ddp(1.0 + rank, both=step == 0).backward()
            if step:  # so the optimizer has seen nothing of the unused layer but zeros
                optimizer.step()
                grads = [
                    [p.grad for p in layer if p.grad is not None]
                    for layer in (model.used, model.unused)
                ]
                largest.append(torch.stack([torch.cat(grad).abs().max().float() for grad in grads]))
    return largest, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("world_size", "nodes", "dtype", "options"),
    [
        (2, 0, torch.float32, {}),
        (3, 0, torch.float32, {"algorithm": "two_shot", "bits": 2}),
        (3, 0, torch.float32, {"algorithm": "gather", "quantizer": "eden", "rotations": "auto"}),
        (2, 0, torch.bfloat16, {"quantizer": "vector"}),
        (2, 0, torch.float16, {"quantizer": "lattice"}),
        (2, 0, torch.complex64, {}),
        (3, 0, torch.float32, {"quantizer": "eden", "bits": 1, "error_feedback": True}),
        (4, 2, torch.float32, {}),
        (4, 2, torch.bfloat16, {"rotations": "auto"}),
        (4, 2, torch.float32, {"quantizer": "ecdq", "bits": 2.5, "error_feedback": True}),
    ],
)
def test_a_layer_that_no_rank_used_does_not_move(
    world_size: int, nodes: int, dtype: torch.dtype, options: dict[str, Any], ranks: Ranks
) -> None:
    before = Two(dtype)
    by_rank = ranks.run(train, world_size, dtype, nodes, options)
    for largest, parameters in by_rank:
        for used, unused in largest:
            assert used > 0
            assert unused == 0
        for old, new in zip(before.parameters(), parameters, strict=True):
            layer = before.unused if any(old is p for p in before.unused) else before.used
            assert torch.equal(old.detach(), new) == (layer is before.unused)
        for ours, theirs in zip(parameters, by_rank[0][1], strict=True):
            assert torch.equal(ours, theirs)
