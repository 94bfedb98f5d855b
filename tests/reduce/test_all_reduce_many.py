"""rhtcomm.reduce.all_reduce_many against all_reduce of the flattened tensor, in real processes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from groups import two_levels
from harness import Ranks
from problems import DTYPES
from simulation import BLOCK, CODEC, KEY, same_bits

import rhtcomm
from rhtcomm import ECDQ, Codec, DisagreementError, Eden, Key, Lattice, QuicFL
from rhtcomm.reduce import Report, all_reduce_many

FEEDBACK = Codec(Eden(4, biased=True), block=BLOCK)


def base(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(1000 + rank + 100 * len(shape) + sum(shape))
    return ((rank + 1) * torch.randn(*shape, generator=random)).to(dtype)


# Of any layout: what the caller holds, and the view of it that is to be averaged.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "strided": lambda x: x[::3, 1::2],
    "negated": torch._neg_view,
    "strided and negated": lambda x: torch._neg_view(x[:, ::2]),
    "a column": lambda x: x[:, 3],
    "a number": lambda x: x[2, 2],
    "empty": lambda x: x[:0],
    "channels last": lambda x: x.view(2, 3, 5, 20).contiguous(memory_format=torch.channels_last),
    "a leaf": lambda x: x.requires_grad_(),
}


def segments_of(tensors: list[torch.Tensor]) -> list[int]:
    """The lengths of their rows, or of those whose rows are short or that have none."""
    lengths = []
    for x in tensors:
        each = math.prod(x.shape[1:])
        lengths += [each] * len(x) if x.dim() > 1 and each >= 64 else [x.numel()]
    return lengths


def tensors_of(rank: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the caller holds, and the views."""
    held = [base(rank, 30, 20 + i, dtype=dtype) for i in range(len(LAYOUTS))]
    held[8] = base(rank, 30, 20, dtype=dtype)
    return held, [
        layout(x).detach() if name != "a leaf" else layout(x)
        for (name, layout), x in zip(LAYOUTS.items(), held, strict=True)
    ]


def reduce_both_ways(
    rank: int, world_size: int, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, Report, Report]:
    communicator = rhtcomm.TorchCommunicator()
    held, views = tensors_of(rank, dtype)
    flat = torch.cat([view.detach().resolve_neg().reshape(-1) for view in views])
    segments = segments_of(views)
    many = all_reduce_many(views, CODEC, KEY, communicator, **options)
    one = rhtcomm.all_reduce(flat, CODEC, KEY, communicator, segments=segments, **options)
    return (
        [x.detach() for x in held],
        [view.detach().resolve_neg().contiguous() for view in views],
        flat,
        many,
        one,
    )


OPTIONS: list[dict[str, Any]] = [
    {"min_numel": 0},
    {"min_numel": 0, "algorithm": "two_shot", "check": False},
    {"min_numel": 0, "algorithm": "gather"},
    {},  # too small to be compressed
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bits_of_all_reduce_with_segments(
    options: dict[str, Any], dtype: torch.dtype, ranks: Ranks
) -> None:
    world_size = 3
    outcomes = ranks.run(reduce_both_ways, world_size, dtype, options)
    for rank, (held, views, flat, many, one) in enumerate(outcomes):
        assert same_bits(flat, outcomes[0][2])
        lengths = [view.numel() for view in views]
        for name, view, mean in zip(LAYOUTS, views, flat.split(lengths), strict=True):
            assert same_bits(view.reshape(-1), mean), name
        # What lies between the elements of a strided view stays as it was.
        before, _ = tensors_of(rank, dtype)
        between = torch.ones_like(before[2], dtype=torch.bool)
        between[::3, 1::2] = False
        assert same_bits(held[2][between], before[2].detach()[between])
        assert (many.bytes_sent, many.bytes_uncompressed) == (
            one.bytes_sent,
            one.bytes_uncompressed,
        )
        assert many.rotations == one.rotations == (2 if "min_numel" in options else None)
    exact = [tensors_of(rank, dtype)[1] for rank in range(world_size)]
    for i, name in enumerate(LAYOUTS):
        mean = torch.stack([views[i].detach().double() for views in exact]).mean(0)
        error = (outcomes[0][1][i] - mean).square().sum()
        assert error <= 0.3 * mean.square().sum(), f"{name} has another tensor's mean"


def reduce_unused(rank: int, world_size: int, codec: Codec | Lattice) -> list[torch.Tensor]:
    tensors = [base(rank, 300), torch.zeros(7, 9), -torch.zeros(100), base(rank, 1000)]
    if rank == 1:
        tensors[0] *= 0  # used on the other ranks
    tensors[3][500] = torch.inf
    all_reduce_many(tensors, codec, KEY, rhtcomm.TorchCommunicator(), min_numel=0)
    return tensors


@pytest.mark.parametrize("codec", [CODEC, Lattice(4, block=BLOCK)])
def test_a_tensor_that_no_rank_used_comes_back_as_zeros(
    codec: Codec | Lattice, ranks: Ranks
) -> None:
    """Even where a block holds it together with what is not finite."""
    for used, unused, negative, infinite in ranks.run(reduce_unused, 3, codec):
        assert used[:BLOCK].isfinite().all()
        assert used[:BLOCK].any()
        assert same_bits(unused, torch.zeros(7, 9))
        assert same_bits(negative, torch.zeros(100))
        assert infinite.isnan().any()


# ---- Rows ---------------------------------------------------------------------------------------


def with_rows(rank: int) -> list[torch.Tensor]:
    """Of four rows the first is used by rank 0 alone, the second by rank 1, the third by all.

    The first tensor has no rows, those of the third are short.
    """
    shapes = [(7,), (50, 64), (9, 63), (8, 4, 16), (30, 70)]
    tensors = [base(rank, *shape) for shape in shapes]
    tensors[4] = base(rank, 70, 30).t()
    for x in tensors[1:]:
        for i in range(len(x)):
            if i % 4 == 3 or (i % 4 < 2 and i % 4 != rank):
                x[i] = -0.0 if rank else 0.0
    return tensors


def reduce_rows(
    rank: int, world_size: int, nodes: int, codec: Codec | Lattice, algorithm: Any, feedback: bool
) -> list[Any]:
    """By many and by one with the rows as its segments: the results, and the bytes."""
    communicator: Any = rhtcomm.TorchCommunicator()
    if nodes:
        communicator = two_levels(rank, nodes, world_size // nodes)
    found: list[Any] = []
    for many in (True, False):
        residual, tensors = None, with_rows(rank)
        if feedback:
            residual = torch.ones(sum(x.numel() for x in tensors)) * (rank + 1)
        options = {"algorithm": algorithm, "min_numel": 0, "residual": residual}
        flat = torch.cat([x.reshape(-1) for x in tensors])
        if many:
            report = all_reduce_many(tensors, codec, KEY, communicator, **options)
            flat = torch.cat([x.reshape(-1) for x in tensors])
        else:
            segments = segments_of(tensors)
            report = rhtcomm.all_reduce(
                flat, codec, KEY, communicator, segments=segments, **options
            )
        found.append((flat, residual, report.bytes_sent))
    return found


@pytest.mark.parametrize(
    ("world_size", "nodes", "codec", "algorithm", "feedback"),
    [
        (2, 0, CODEC, "all_gather", False),
        (3, 0, CODEC, "two_shot", False),
        (3, 0, Codec(ECDQ(2), block=BLOCK), "gather", False),
        (2, 0, Lattice(4, block=BLOCK), "auto", False),
        (2, 0, Codec(ECDQ(2), block=BLOCK), "all_gather", True),
        (4, 2, CODEC, "auto", False),
    ],
)
def test_rows_that_no_rank_used_come_back_as_zeros(
    world_size: int,
    nodes: int,
    codec: Codec | Lattice,
    algorithm: str,
    feedback: bool,
    ranks: Ranks,
) -> None:
    inputs = [with_rows(rank) for rank in range(world_size)]
    sizes = [x.numel() for x in inputs[0]]
    by_rank = ranks.run(reduce_rows, world_size, nodes, codec, algorithm, feedback)
    for rank, (many, one) in enumerate(by_rank):
        assert many[2] == one[2]
        assert same_bits(many[0], one[0])
        assert same_bits(many[0], by_rank[0][0][0])
        if feedback:
            assert same_bits(many[1], one[1])
        for i, mean in enumerate(many[0].split(sizes)):
            shape = inputs[0][i].shape
            if len(shape) == 1:
                continue
            used = torch.stack([x[i].reshape(shape[0], -1).any(dim=1) for x in inputs]).any(dim=0)
            assert 0 < used.sum() < len(used)
            rows = mean.view(shape[0], -1)
            assert rows[used].any(dim=1).all()
            if i != 2:
                assert same_bits(rows[~used], torch.zeros_like(rows[~used]))
            elif not feedback:
                assert rows[~used].any(), "it shows nothing where rows are zero anyhow"
            if feedback and i != 2:
                left = many[1].split(sizes)[i].view(shape[0], -1)
                assert bool((left[~used] == rank + 1).all())


def reduce_with_feedback(rank: int, world_size: int) -> list[torch.Tensor]:
    """Three steps: the tensors, and the residual; by many and by one."""
    communicator, results = rhtcomm.TorchCommunicator(), []
    for many in (True, False):
        residual = torch.zeros(1300)
        for step in range(3):
            key, tensors = Key(0, step), [base(rank, 10, 30), base(rank + step, 1000)]
            options: dict[str, Any] = {"min_numel": 0, "residual": residual}
            if many:
                all_reduce_many(tensors, FEEDBACK, key, communicator, **options)
                flat = torch.cat([x.reshape(-1) for x in tensors])
            else:
                flat = torch.cat([x.reshape(-1) for x in tensors])
                rhtcomm.all_reduce(
                    flat, FEEDBACK, key, communicator, segments=[300, 1000], **options
                )
            results.append(flat)
        results.append(residual)
    return results


def test_error_feedback_of_all_tensors(ranks: Ranks) -> None:
    for results in ranks.run(reduce_with_feedback, 2):
        assert results[3].any()
        for many, one in zip(results[:4], results[4:], strict=True):
            assert same_bits(many, one)


def reduce_on_two_levels(rank: int, world_size: int) -> list[torch.Tensor]:
    communicator = two_levels(rank, 2, 2)
    tensors = [base(rank, 30, 20).t(), base(rank, 1000)]
    flat = torch.cat([x.reshape(-1) for x in tensors])
    all_reduce_many(tensors, CODEC, KEY, communicator, min_numel=0)
    rhtcomm.all_reduce(flat, CODEC, KEY, communicator, min_numel=0, segments=[600, 1000])
    return [torch.cat([x.reshape(-1) for x in tensors]), flat]


def test_two_levels(ranks: Ranks) -> None:
    outcomes = ranks.run(reduce_on_two_levels, 4)
    for many, one in outcomes:
        assert same_bits(many, one)
        assert same_bits(many, outcomes[0][0])


def be_alone(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    x = base(rank, 40).requires_grad_()
    before, communicator = x.detach().clone(), rhtcomm.TorchCommunicator()
    report = all_reduce_many([x, x[:0]], CODEC, KEY, communicator, min_numel=0)
    return before, x.detach(), report.bytes_sent


def test_one_rank_alone_keeps_its_tensors(ranks: Ranks) -> None:
    [(before, after, sent)] = ranks.run(be_alone, 1)
    assert same_bits(before, after)
    assert sent == 0


def count_exchanges(rank: int, world_size: int) -> list[int]:
    """Of 20 tensors: all-gathers with the comparison of the ranks, and without."""
    counts = []
    for check in (True, False):
        communicator, starts = rhtcomm.TorchCommunicator(), []
        start = communicator.start_all_gather
        communicator.start_all_gather = lambda x, s=start, n=starts: n.append(x) or s(x)  # type: ignore
        tensors = [base(rank, 100 + i) for i in range(20)]
        all_reduce_many(tensors, CODEC, KEY, communicator, min_numel=0, check=check)
        counts.append(len(starts))
    return counts


def test_one_comparison_and_one_exchange(ranks: Ranks) -> None:
    assert ranks.run(count_exchanges, 2) == [[2, 1]] * 2


def disagree(rank: int, world_size: int) -> None:
    communicator = rhtcomm.TorchCommunicator()
    cases: list[tuple[str, list[torch.Tensor], dict[str, Any]]] = [
        ("shapes", [base(0, 10), base(0, 20 + rank)], {}),
        ("shapes", [base(0, 10, 6)] if rank else [base(0, 6, 10)], {}),  # of one length
        ("shapes", [base(0, 60)] if rank else [base(0, 30), base(0, 30)], {}),
        ("dtypes", [base(0, 10, dtype=DTYPES[rank])], {}),
        ("min_numel", [base(0, 10)], {"min_numel": rank}),
        ("algorithm", [base(0, 10)], {"algorithm": ("auto", "two_shot")[rank]}),
    ]
    for field, tensors, options in cases:
        with pytest.raises(DisagreementError, match=rf"differently in (dtypes.*)?{field} \("):
            all_reduce_many(tensors, CODEC, KEY, communicator, **options)


def test_disagreement_is_named(ranks: Ranks) -> None:
    ranks.run(disagree, 2)


def be_refused(rank: int, world_size: int) -> None:
    communicator = rhtcomm.TorchCommunicator()
    good = [base(rank, 10)]
    with pytest.raises(ValueError, match=r"one dtype and device, but have torch.bfloat16 on cpu, "):
        all_reduce_many([*good, base(rank, 10, dtype=torch.bfloat16)], CODEC, KEY, communicator)
    with pytest.raises(ValueError, match="but have nothing"):
        all_reduce_many([], CODEC, KEY, communicator)
    with pytest.raises(TypeError, match=r"tensors\[1\] is torch\.int32, but only float32"):
        all_reduce_many([*good, torch.ones(3).int()], CODEC, KEY, communicator)
    with pytest.raises(TypeError, match=r"tensors\[1\] is a float; make it a torch\.Tensor"):
        all_reduce_many([*good, 1.5], CODEC, KEY, communicator)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"all_reduce_many: codec=QuicFL.* must be a Codec"):
        all_reduce_many(good, QuicFL(4), KEY, communicator)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'foo' must be one of auto"):
        all_reduce_many(good, CODEC, KEY, communicator, algorithm="foo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must decode each rank's own codes"):
        all_reduce_many(good, Lattice(4), KEY, communicator, residual=torch.zeros(10))


def test_bad_inputs_are_refused(ranks: Ranks) -> None:
    ranks.run(be_refused, 2)
