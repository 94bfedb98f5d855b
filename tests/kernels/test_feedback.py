"""Kernels that update a residual: the bits of the equations, computed by torch one by one."""

from itertools import pairwise

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


def encoded(codec: Codec, dtype: torch.dtype, residual: Residual, ranks: int) -> Encoded:
    """The last rank's tensor, and all ranks' payloads; it has a residual."""
    coder = codec.coder(NUMEL)
    generator = torch.Generator().manual_seed(5)
    xs = [torch.randn(NUMEL, generator=generator).to(dtype) for _ in range(ranks)]
    payloads = torch.zeros(ranks, 1, coder.nbytes, dtype=torch.uint8)
    for rank, x in enumerate(xs):
        added = residual if rank == ranks - 1 else None
        coder.encode(x, KEY, 0, rank, ranks, payloads[rank], residual=added)
    return xs[-1], payloads


def by_hand(
    codec: Codec, x: torch.Tensor, payloads: torch.Tensor, r: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the residual."""
    ranks = len(payloads)
    total = x.float() + r
    expected = codec.encode(total, KEY, ranks - 1, ranks)
    assert torch.equal(payloads[-1, 0], expected)
    own = codec.decode_mean(payloads[-1], KEY, NUMEL, first_rank=ranks - 1, world_size=ranks)
    left = (total - own) + 0.0
    if again:
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
    for ranks, again in ((2, False), (6, False), (3, True)):
        with use(reference):
            x, payloads = encoded(codec, dtype, Residual.of([r]), ranks)
            expected = by_hand(codec, x, payloads, r, again)
        for name, kernel in {"reference": reference, **variants()}.items():
            with use(kernel):
                residual = Residual.of([r[a:b].clone() for a, b in pairwise(EDGES)])
                x, found = encoded(codec, dtype, residual, ranks)
                assert torch.equal(found, payloads), name
                own = (KEY, ranks - 1, ranks, payloads[-1])
                out, coder = x.clone(), codec.coder(NUMEL)
                if again:
                    mean = (mean_of_owner(), MINE.start, ranks)
                    hop, feedback = second_hop(codec)[None], Feedback(residual, *own, *mean)
                    coder.decode(hop, KEY.next_hop(), 0, 0, 1, out, feedback)
                else:
                    coder.decode(payloads, KEY, 0, 0, ranks, out, Feedback(residual, *own))
            assert torch.equal(out, expected[0]), (name, ranks)
            assert torch.equal(residual.read(NUMEL), expected[1]), (name, ranks)
