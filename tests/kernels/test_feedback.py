"""Kernels that update a residual: the bits of the equations, computed by torch one by one."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from libraries import needs_library, variants
from problems import DTYPES
from simulation import same_bits

from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL, VectorQuantizer
from rhtcomm.kernels import Feedback, Residual, reference, use
from rhtcomm.quantizers import Quantizer

KEY = Key(1, 2)


class Shape(NamedTuple):
    block: int
    numel: int
    rotations: int | None = None
    """None: the quantizer's default."""
    threads: int = 1

    @property
    def edges(self) -> list[int]:
        """Of the pieces of a residual, one of them empty."""
        return [0, 100, 100, 101, self.numel * 5 // 8, self.numel]

    @property
    def mine(self) -> slice:
        """Coordinates that a rank owns."""
        return slice(2 * self.block, 4 * self.block)


SHAPES = {
    "small blocks": Shape(32, 9 * 32 + 13),
    "one rotation": Shape(256, 9 * 256 + 77, 1),
    "two rotations": Shape(256, 9 * 256 + 77, 2),
    "three rotations": Shape(512, 9 * 512 + 77, 3),
    "several units": Shape(4096, 2 * (1 << 16) + 3 * 4096 + 77, threads=3),
}


class Case(NamedTuple):
    ranks: int
    own: int
    """The rank that has the residual."""
    others: float = 1.0
    """How large the other ranks' numbers are."""
    again: bool = False
    """Whether there is a second hop."""


CASES = [
    *(Case(2, 1), Case(3, 0), Case(4, 2), Case(6, 5), Case(2, 1, others=1e37)),
    Case(3, 2, again=True),
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def first_residual(shape: Shape) -> torch.Tensor:
    r = torch.randn(shape.numel, generator=torch.Generator().manual_seed(8)) / 3
    r[4 * shape.block : 5 * shape.block] = -0.0  # as x is, of all ranks
    return r


class Sent(NamedTuple):
    x: torch.Tensor
    """Of the rank that has a residual."""
    payloads: torch.Tensor
    """(ranks, shards, nbytes)"""


def send(
    codec: Codec, dtype: torch.dtype, residual: Residual, case: Case, shape: Shape, shards: int = 1
) -> Sent:
    coder = codec.coder(shape.numel, shards)
    generator = torch.Generator().manual_seed(5)
    xs = [case.others * torch.randn(shape.numel, generator=generator) for _ in range(case.ranks)]
    xs[case.own] = (xs[case.own] / case.others).to(dtype)
    payloads = torch.zeros(case.ranks, shards, coder.nbytes, dtype=torch.uint8)
    for rank, x in enumerate(xs):
        x[4 * shape.block : 5 * shape.block] = -0.0
        added = residual if rank == case.own else None
        coder.encode(x, KEY, 0, rank, case.ranks, payloads[rank], residual=added)
    return Sent(xs[case.own], payloads)


def decoded(codec: Codec, sent: Sent, case: Case, own: bool) -> torch.Tensor:
    """The mean, or what one rank sent, shard by shard."""
    rows = sent.payloads[case.own :][:1] if own else sent.payloads
    length = len(sent.x) // rows.shape[1]
    first = {"first_rank": case.own} if own else {}
    return torch.cat(
        [
            codec.decode_mean(
                *(rows[:, shard], KEY, length),
                offset=shard * length,
                world_size=case.ranks,
                **first,
            )
            for shard in range(rows.shape[1])
        ]
    )


def by_hand(
    codec: Codec, sent: Sent, r: torch.Tensor, case: Case, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the residual."""
    total = sent.x.float() + r
    shards = sent.payloads.shape[1]
    expected = codec.encode(total, KEY, case.own, case.ranks, shards=shards)
    assert torch.equal(sent.payloads[case.own], expected)
    left = (total - decoded(codec, sent, case, own=True)) + 0.0
    if case.again:
        found = codec.decode_mean(second_hop(codec, shape), KEY.next_hop(), shape.numel)
        left[shape.mine] += case.ranks * (mean_of_owner(shape) - found[shape.mine])
    else:
        found = decoded(codec, sent, case, own=False)
    mean = found.to(sent.x.dtype)
    if mean.dtype != torch.float32:
        left += found - mean.float()
    return mean, left


def second_hop(codec: Codec, shape: Shape) -> torch.Tensor:
    x = torch.randn(shape.numel, generator=torch.Generator().manual_seed(6))
    return codec.encode(x, KEY.next_hop())[None]


def mean_of_owner(shape: Shape) -> torch.Tensor:
    return torch.randn(2 * shape.block, generator=torch.Generator().manual_seed(7))


@needs_library
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("two rotations", dtype) for dtype in DTYPES),
        *(("small blocks", torch.bfloat16), ("one rotation", torch.float32)),
        *(("three rotations", torch.float16), ("several units", torch.bfloat16)),
    ],
)
@pytest.mark.parametrize(
    "quantizer",
    [QuicFL(4, 1 / 512), Eden(2, biased=True), ECDQ(3), VectorQuantizer(2, biased=True)],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_every_kernel_leaves_the_bits_of_the_equations(
    quantizer: Quantizer, name: str, dtype: torch.dtype
) -> None:
    shape = SHAPES[name]
    torch.set_num_threads(shape.threads)
    codec, r = Codec(quantizer, shape.rotations, block=shape.block), first_residual(shape)
    for case in CASES if shape.numel < 1 << 16 else CASES[1::2]:
        with use(reference):
            sent = send(codec, dtype, Residual.of([r]), case, shape)
            expected = by_hand(codec, sent, r, case, shape)
        for by, kernel in {"reference": reference, **variants()}.items():
            with use(kernel):
                bound = torch.zeros(1)
                pieces = [r[a:b].clone() for a, b in pairwise(shape.edges)]
                residual = Residual.of(pieces, bound)
                x, payloads = send(codec, dtype, residual, case, shape)
                assert torch.equal(sent.payloads, payloads), (by, case)
                own = (KEY, case.own, case.ranks, payloads[case.own])
                out, coder = x.clone(), codec.coder(shape.numel)
                if case.again:
                    mean = (mean_of_owner(shape), shape.mine.start, case.ranks)
                    hop = second_hop(codec, shape)[None]
                    feedback = Feedback(residual, *own, *mean)
                    coder.decode(hop, KEY.next_hop(), 0, 0, 1, out, feedback)
                else:
                    coder.decode(payloads, KEY, 0, 0, case.ranks, out, Feedback(residual, *own))
            assert same_bits(out, expected[0]), (by, case)
            assert same_bits(residual.read(shape.numel), expected[1]), (by, case)
            largest = expected[1].abs().max()
            assert largest <= bound <= 8 * largest, (by, case)


@needs_library
@pytest.mark.parametrize("quantizer", [QuicFL(4), Eden(2, biased=True), ECDQ(3)])
def test_shards_leave_what_they_would_leave_one_by_one(quantizer: Quantizer) -> None:
    shape, case, shards = Shape(256, 3 * 3 * 256, threads=2), Case(4, 2), 3
    torch.set_num_threads(shape.threads)
    codec, r = Codec(quantizer, block=shape.block), first_residual(shape)
    with use(reference):
        sent = send(codec, torch.bfloat16, Residual.of([r]), case, shape, shards)
        expected = by_hand(codec, sent, r, case, shape)
    for name, kernel in {"reference": reference, **variants()}.items():
        residual = Residual.of([r.clone()], torch.zeros(1))
        with use(kernel):
            x, payloads = send(codec, torch.bfloat16, residual, case, shape, shards)
            feedback = Feedback(residual, KEY, case.own, case.ranks, payloads[case.own])
            codec.coder(shape.numel, shards).decode(payloads, KEY, 0, 0, case.ranks, x, feedback)
        assert torch.equal(payloads, sent.payloads)
        assert same_bits(x, expected[0]), name
        assert same_bits(residual.read(shape.numel), expected[1]), name


@needs_library
@pytest.mark.parametrize("quantizer", [QuicFL(4), Eden(2, biased=True), ECDQ(3)])
def test_a_rank_keeps_its_error_when_the_payloads_of_others_alone_are_decoded(
    quantizer: Quantizer,
) -> None:
    shape, case = SHAPES["two rotations"], Case(4, 0)
    codec, ones = Codec(quantizer, block=shape.block), torch.ones(shape.numel)
    found = {}
    for first in (0, 1, 3):
        case = case._replace(own=first)
        for name, kernel in {"reference": reference, **variants()}.items():
            residual = Residual.of([ones.clone()], torch.ones(1))
            with use(kernel):
                x, payloads = send(codec, torch.float32, residual, case, shape)
                feedback = Feedback(residual, KEY, case.own, case.ranks, payloads[case.own])
                codec.coder(shape.numel).decode(payloads[1:3], KEY, 0, 1, case.ranks, x, feedback)
            found[name] = (x, residual.read(shape.numel))
            assert not torch.equal(residual.read(shape.numel), ones)
            for a, b in zip(found[name], found["reference"], strict=True):
                assert same_bits(a, b), (name, first)
