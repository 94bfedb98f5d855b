"""Arguments that the collectives refuse: all ranks raise, and can go on together."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Ranks
from simulation import BLOCK, CODEC

import rhtcomm
from rhtcomm import Codec, DisagreementError, Eden, Key, QuicFL
from rhtcomm.reduce import all_reduce_many, reduce_scatter
from rhtcomm.reduce.split import check_streams

AUTO = Codec(QuicFL(4), "auto", BLOCK)
FEEDBACK = Codec(Eden(4, biased=True), block=BLOCK)
KEY = Key(seed=3)


def data(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank))


def scatter(communicator: Any, output: torch.Tensor, tensor: torch.Tensor) -> None:
    reduce_scatter(output, tensor, CODEC, KEY, communicator, min_numel=0)


def many(communicator: Any, tensors: list[torch.Tensor], **options: Any) -> None:
    all_reduce_many(tensors, FEEDBACK, KEY, communicator, min_numel=0, **options)


def one(communicator: Any, tensor: torch.Tensor, **options: Any) -> None:
    rhtcomm.all_reduce(tensor, FEEDBACK, KEY, communicator, min_numel=0, **options)


def overlapping(communicator: Any, rank: int) -> None:
    x = data(rank, 2000)
    scatter(communicator, x[:1000], x)


# What a rank of two does that is not allowed, and what its error says.
REFUSED: dict[str, tuple[Callable[[Any, int], None], str]] = {
    "expanded": (lambda c, rank: one(c, data(rank, 1).expand(2000)), "share memory"),
    "an expanded residual": (
        lambda c, rank: one(c, data(rank, 2000), residual=torch.zeros(1).expand(2000)),
        "the residual was expanded",
    ),
    "many, expanded": (
        lambda c, rank: many(c, [data(rank, 1000), data(rank, 1).expand(1000)]),
        r"the tensors\[1\] was expanded",
    ),
    "many, float64": (
        lambda c, rank: many(c, [data(rank, 1000), data(rank, 1000).double()]),
        r"the tensors\[1\] is torch.float64",
    ),
    "many, mixed": (
        lambda c, rank: many(c, [data(rank, 1000), data(rank, 1000).half()]),
        "have torch.float16 on cpu, torch.float32 on cpu",
    ),
    "many, none": (lambda c, rank: many(c, []), "have nothing"),
    "many, another residual": (
        lambda c, rank: many(c, [data(rank, 1000)] * 2, residual=torch.zeros(1999)),
        r"shape \(1999,\) on cpu, but \(2000,\) on cpu is needed",
    ),
    "scatter, strided output": (
        lambda c, rank: scatter(c, torch.zeros(2000)[::2], data(rank, 2000)),
        r"output is strided; pass output.contiguous\(\)",
    ),
    "scatter, negated tensor": (
        lambda c, rank: scatter(c, torch.zeros(1000), torch._neg_view(data(rank, 2000))),
        r"tensor is negated; pass tensor.resolve_neg\(\)",
    ),
    "scatter, float64 output": (
        lambda c, rank: scatter(c, torch.zeros(1000).double(), data(rank, 2000)),
        "the output is torch.float64",
    ),
    "scatter, short output": (
        lambda c, rank: scatter(c, torch.zeros(999), data(rank, 2000)),
        "tensor has 2000 coordinates and output 999, but 2 ranks need 2 shards",
    ),
    "scatter, overlapping": (overlapping, "output overlaps tensor"),
}
ALLOWED: dict[str, Callable[[Any, int], None]] = {
    "scatter": lambda c, rank: scatter(c, torch.zeros(1000), data(rank, 2000)),
    "many": lambda c, rank: many(c, [data(rank, 1000)] * 2),
    "": lambda c, rank: one(c, data(rank, 2000)),
}


def be_refused(rank: int, world_size: int, odd_ones: tuple[int, ...]) -> dict[str, tuple[str, str]]:
    """Where all ranks do alike, and where some do."""
    communicator = rhtcomm.TorchCommunicator()
    raised = {}
    for name, (refused, _) in REFUSED.items():
        allowed = ALLOWED[name.partition(",")[0] if "," in name else ""]
        with pytest.raises((ValueError, TypeError, DisagreementError)) as error:
            (refused if rank in odd_ones else allowed)(communicator, rank)
        raised[name] = (type(error.value).__name__, str(error.value))
        x = torch.full((10,), float(rank))
        rhtcomm.all_reduce(x, CODEC, KEY, communicator)  # the ranks are in step still
        assert x.tolist() == [0.5] * 10
    return raised


def test_what_no_rank_may_do_is_refused_by_its_own_error(ranks: Ranks) -> None:
    for raised in ranks.run(be_refused, 2, (0, 1)):
        for name, (kind, message) in raised.items():
            assert kind in ("ValueError", "TypeError"), name
            assert re.search(REFUSED[name][1], message), f"{name}: {message}"


@pytest.mark.parametrize("odd_one", [0, 1])
def test_what_one_rank_may_not_do_is_refused_on_all(odd_one: int, ranks: Ranks) -> None:
    for raised in ranks.run(be_refused, 2, (odd_one,)):
        for name, (kind, message) in raised.items():
            assert kind == "DisagreementError", f"{name}: {message}"
            assert "arguments (" in message
            assert f"valid on rank {1 - odd_one}" in message, name
            assert f"rhtcomm.{'reduce_scatter' if 'scatter' in name else 'all_reduce'}" in message


def take_rotations(rank: int, world_size: int) -> None:
    communicator = rhtcomm.TorchCommunicator()
    for codec in (AUTO, CODEC):
        for rotations in (0, 4, True, "2", 2.0):
            with pytest.raises(ValueError, match=r"rotations=.* must be 1, 2 or 3 \(an int\)"):
                rhtcomm.all_reduce(data(rank, 500), codec, KEY, communicator, rotations=rotations)
    with pytest.raises(ValueError, match=r"rotations=3, but this Codec was made with rotations=2"):
        rhtcomm.all_reduce(data(rank, 500), CODEC, KEY, communicator, rotations=3)
    for rotations in (1, 2, 3, None):
        report = rhtcomm.all_reduce(
            *(data(rank, 500), AUTO, KEY, communicator), min_numel=0, rotations=rotations
        )
        assert report.rotations == (rotations or 2)


def test_rotations_that_no_codec_takes(ranks: Ranks) -> None:
    ranks.run(take_rotations, 2)


def keep_negated_residual(rank: int, world_size: int) -> list[torch.Tensor]:
    """The same residual in memory of its own, and in that of its negative."""
    communicator, results = rhtcomm.TorchCommunicator(), []
    plain, negative = torch.zeros(2000), torch.zeros(2000)
    for residual in (plain, torch._neg_view(negative)):
        for step in range(3):
            x = data(rank, 2000)
            x[:700] *= step < 2  # unused in the last step, so that its residual stays
            rhtcomm.all_reduce(
                *(x, FEEDBACK, Key(0, step), communicator),
                min_numel=0,
                segments=[700, 1300],
                residual=residual,
            )
        results.append(residual.resolve_neg())
    return results


def test_a_negated_residual(ranks: Ranks) -> None:
    for plain, negated in ranks.run(keep_negated_residual, 2):
        assert plain[:700].any()
        assert torch.equal(plain, negated)


def give_wrong_residual(rank: int, world_size: int) -> None:
    for residual in (torch.zeros(500).double(), torch.zeros(500).half(), torch.zeros(501)):
        with pytest.raises(ValueError, match=r"the residual is torch\.float"):
            one(rhtcomm.TorchCommunicator(), data(rank, 500), residual=residual)


def test_a_residual_of_another_dtype_or_length(ranks: Ranks) -> None:
    ranks.run(give_wrong_residual, 2)


@pytest.mark.parametrize(("numel", "world_size"), [(1 << 36, 1 << 24), (1, 1)])
def test_streams_suffice(numel: int, world_size: int) -> None:
    check_streams(numel, world_size)
    if numel > 1:
        for more in ((numel + 1, world_size), (numel, world_size + 1)):
            with pytest.raises(ValueError, match="exceed the streams of a key"):
                check_streams(*more)
