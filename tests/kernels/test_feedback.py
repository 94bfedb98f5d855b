"""Kernels that update a residual: the bits of the equations, computed by torch one by one."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from libraries import needs_library, variants
from problems import DTYPES

from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL, VectorQuantizer
from rhtcomm.kernels import Feedback, Residual, reference, use
from rhtcomm.quantizers import Quantizer

BLOCK, NUMEL, KEY = 256, 9 * 256 + 77, Key(1, 2)
EDGES = [0, 100, 100, 101, 1500, NUMEL]  # of pieces, one of them empty
MINE = slice(2 * BLOCK, 4 * BLOCK)  # coordinates that a rank owns

Encoded = tuple[torch.Tensor, torch.Tensor]


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


def encoded(codec: Codec, dtype: torch.dtype, residual: Residual, case: Case) -> Encoded:
    """A rank's tensor, and all ranks' payloads; it has a residual."""
    coder = codec.coder(NUMEL)
    generator = torch.Generator().manual_seed(5)
    xs = [case.others * torch.randn(NUMEL, generator=generator) for _ in range(case.ranks)]
    xs[case.own] = (xs[case.own] / case.others).to(dtype)
    payloads = torch.zeros(case.ranks, 1, coder.nbytes, dtype=torch.uint8)
    for rank, x in enumerate(xs):
        added = residual if rank == case.own else None
        coder.encode(x, KEY, 0, rank, case.ranks, payloads[rank], residual=added)
    return xs[case.own], payloads


def by_hand(
    codec: Codec, x: torch.Tensor, payloads: torch.Tensor, r: torch.Tensor, case: Case
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the residual."""
    ranks, own = case.ranks, case.own
    total = x.float() + r
    expected = codec.encode(total, KEY, own, ranks)
    assert torch.equal(payloads[own, 0], expected)
    sent = codec.decode_mean(payloads[own], KEY, NUMEL, first_rank=own, world_size=ranks)
    left = (total - sent) + 0.0
    if case.again:
        hop = second_hop(codec)
        decoded = codec.decode_mean(hop, KEY.next_hop(), NUMEL)
        left[MINE] += ranks * (mean_of_owner() - decoded[MINE])
    else:
        decoded = codec.decode_mean(payloads[:, 0], KEY, NUMEL)
    mean = decoded.to(x.dtype)
    left += decoded - mean.float()
    return mean, left


def second_hop(codec: Codec) -> torch.Tensor:
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(6))
    return codec.encode(x, KEY.next_hop())[None]


def mean_of_owner() -> torch.Tensor:
    return torch.randn(MINE.stop - MINE.start, generator=torch.Generator().manual_seed(7))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "quantizer",
    [QuicFL(4, 1 / 512), Eden(2, biased=True), ECDQ(3), VectorQuantizer(2, biased=True)],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_every_kernel_leaves_the_bits_of_the_equations(
    quantizer: Quantizer, dtype: torch.dtype
) -> None:
    codec = Codec(quantizer, block=BLOCK)
    r = torch.randn(NUMEL, generator=torch.Generator().manual_seed(8)) / 3
    for case in CASES:
        with use(reference):
            x, payloads = encoded(codec, dtype, Residual.of([r]), case)
            expected = by_hand(codec, x, payloads, r, case)
        for name, kernel in {"reference": reference, **variants()}.items():
            with use(kernel):
                bound = torch.zeros(1)
                residual = Residual.of([r[a:b].clone() for a, b in pairwise(EDGES)], bound)
                x, found = encoded(codec, dtype, residual, case)
                assert torch.equal(found, payloads), (name, case)
                own = (KEY, case.own, case.ranks, payloads[case.own])
                out, coder = x.clone(), codec.coder(NUMEL)
                if case.again:
                    mean = (mean_of_owner(), MINE.start, case.ranks)
                    hop, feedback = second_hop(codec)[None], Feedback(residual, *own, *mean)
                    coder.decode(hop, KEY.next_hop(), 0, 0, 1, out, feedback)
                else:
                    coder.decode(payloads, KEY, 0, 0, case.ranks, out, Feedback(residual, *own))
            assert torch.equal(out, expected[0]), (name, case)
            assert torch.equal(residual.read(NUMEL), expected[1]), (name, case)
            largest = expected[1].abs().max()
            assert largest <= bound <= 8 * largest, (name, case)


@needs_library
@pytest.mark.parametrize("quantizer", [QuicFL(4), Eden(2, biased=True), ECDQ(3)])
def test_a_rank_keeps_its_error_when_the_payloads_of_others_alone_are_decoded(
    quantizer: Quantizer,
) -> None:
    codec, case = Codec(quantizer, block=BLOCK), Case(4, 0)
    found = {}
    for first in (0, 1, 3):
        case = case._replace(own=first)
        for name, kernel in {"reference": reference, **variants()}.items():
            residual = Residual.of([torch.ones(NUMEL)], torch.ones(1))
            with use(kernel):
                x, payloads = encoded(codec, torch.float32, residual, case)
                feedback = Feedback(residual, KEY, case.own, case.ranks, payloads[case.own])
                codec.coder(NUMEL).decode(payloads[1:3], KEY, 0, 1, case.ranks, x, feedback)
            found[name] = (x, residual.read(NUMEL))
            assert not torch.equal(residual.read(NUMEL), torch.ones(NUMEL))
            for a, b in zip(found[name], found["reference"], strict=True):
                assert torch.equal(a, b), (name, first)
