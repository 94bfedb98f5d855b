"""Rows of a parameter that are zero on all ranks, such as those of symbols that no rank met."""

import math
from typing import Any

import pytest
import torch
from groups import two_levels
from harness import Ranks
from models import wrapped
from problems import DTYPES
from simulation import BLOCK, same_bits
from states import TIMEOUT
from torch import nn

from rhtcomm.hooks import RHTState
from rhtcomm.segments import Segments, unpack

# ---- Finding and clearing them ----------------------------------------------------------------

# Of each tensor the length, and in how many segments it falls.
WAYS: list[list[tuple[int, int]]] = [
    [(12, 3)],
    [(40, 1), (700 * 33, 700), (0, 1), (5, 1), (3 * 70_000, 3)],
    [(64 * 2000, 64), (300 * 257, 300)],
    [(0, 0), (7, 7), (1, 1)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("way", WAYS)
def test_used_rows_are_found_and_others_restored(
    way: list[tuple[int, int]], where: str, dtype: torch.dtype
) -> None:
    """Both ways run on CPU tensors here. A row that is used may begin with any number of zeros."""
    lengths, rows = zip(*way, strict=True)
    segments = Segments(lengths, sum(lengths), rows)
    each = [length // count for length, count in way if length for _ in range(count)]
    assert segments.lengths == each
    assert len(segments) == len(each)
    random = torch.Generator().manual_seed(1)
    for share in (0.0, 0.3, 1.0):
        x = torch.zeros(sum(lengths), dtype=dtype)
        x[::3] = -0.0
        expected, start = [], 0
        for length in each:
            used = bool(torch.rand((), generator=random) < share)
            if used:
                at = int(torch.randint(length, (), generator=random))
                x[start + at] = math.nan if at % 5 == 0 else -1e-3
            expected.append(used)
            start += length
        used = getattr(segments, f"_used_on_{where}")(x)
        assert unpack(used)[: len(each)].tolist() == expected
        assert not unpack(used)[len(each) :].any()
        mask = torch.tensor(expected).repeat_interleave(torch.tensor(each))
        for value in (None, torch.arange(len(x)).to(dtype)):
            restored = x.clone()
            getattr(segments, f"_restore_on_{where}_")(restored, used, value)
            other = torch.zeros_like(x) if value is None else value
            assert same_bits(restored, torch.where(mask, x, other))


# ---- The hook ---------------------------------------------------------------------------------

SYMBOLS, WIDTH = 50, 64


class Words(nn.Module):
    """An embedding between other parameters, one of which has rows too short to be segments."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(7, dtype=dtype))
        self.embedding = nn.Embedding(SYMBOLS, WIDTH, dtype=dtype)
        self.narrow = nn.Parameter(torch.randn(9, 63, dtype=dtype))

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        rows = self.embedding(symbols)
        return rows.square().sum() * self.scale.mean() + self.narrow[:5].square().sum()


def symbols_of(rank: int, step: int) -> torch.Tensor:
    """All at step 0; later each row is met by one rank or none."""
    return torch.arange(SYMBOLS) if step == 0 else torch.arange(2 + rank, 20, 3)


def met_at(step: int, world_size: int) -> torch.Tensor:
    met = torch.zeros(SYMBOLS, dtype=torch.bool)
    for rank in range(world_size):
        met[symbols_of(rank, step)] = True
    return met


def is_vector(parameter: torch.Tensor) -> bool:
    return parameter.dim() < 2


def train(
    rank: int, world_size: int, dtype: torch.dtype, nodes: int, options: dict[str, Any]
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """After each step the embedding's gradient, all parameters (it last), and the bytes sent."""
    communicator = two_levels(rank, nodes, world_size // nodes) if nodes else None
    timeout = None if nodes else TIMEOUT
    model, found = Words(dtype), []
    with RHTState(
        block=BLOCK,
        min_numel=0,
        warmup_steps=0,
        communicator=communicator,
        timeout=timeout,
        **options,
    ) as state:
        ddp = wrapped(model, state, gradient_as_bucket_view=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.0, 0.9), eps=1e-4)
        for step in range(4):
            optimizer.zero_grad(set_to_none=False)
            (ddp(symbols_of(rank, step)) * (1 + rank)).backward()
            optimizer.step()
            assert model.embedding.weight.grad is not None
            parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
            sent = state.stats().bytes_sent
            found.append((model.embedding.weight.grad.clone(), parameters, sent))
    return found


@pytest.mark.parametrize(
    ("world_size", "nodes", "dtype", "options"),
    [
        (2, 0, torch.float32, {}),
        (2, 0, torch.float32, {"quantizer": "ecdq", "bits": 2}),
        (3, 0, torch.float32, {"algorithm": "two_shot", "bits": 2}),
        (3, 0, torch.float32, {"algorithm": "gather", "quantizer": "eden", "rotations": "auto"}),
        (2, 0, torch.bfloat16, {"quantizer": "vector"}),
        (2, 0, torch.float16, {"quantizer": "lattice"}),
        (2, 0, torch.float32, {"exclude": is_vector}),
        (3, 0, torch.float32, {"quantizer": "eden", "bits": 1, "error_feedback": True}),
        (4, 2, torch.float32, {}),
        (4, 2, torch.float32, {"quantizer": "ecdq", "bits": 1.75, "error_feedback": True}),
    ],
)
def test_rows_that_no_rank_met_do_not_move(
    world_size: int, nodes: int, dtype: torch.dtype, options: dict[str, Any], ranks: Ranks
) -> None:
    by_rank = ranks.run(train, world_size, dtype, nodes, options)
    for step in range(4):
        met = met_at(step, world_size)
        assert met.all() == (step == 0)
        for found in by_rank:
            gradient, parameters, _ = found[step]
            assert same_bits(gradient[~met], torch.zeros_like(gradient[~met]))
            assert gradient[met].any(dim=1).all()
            assert torch.equal(parameters, by_rank[0][step][1])
            if step:  # without momentum Adam moves what has a gradient, and nothing else
                moved = (parameters - found[step - 1][1])[-SYMBOLS * WIDTH :]
                assert torch.equal(moved.view(SYMBOLS, WIDTH).any(dim=1), met)


def test_a_bit_a_row_is_sent(ranks: Ranks) -> None:
    found = ranks.run(train, 2, torch.float32, 0, {})[0]
    sent = found[1][2] - found[0][2]
    numel = 7 + SYMBOLS * WIDTH + 9 * 63
    with_one = ranks.run(send_flat, 2, numel)[0]
    # Three parameters would be one word; 50 rows and two others are two.
    assert sent - with_one == 4 * math.ceil((SYMBOLS + 2) / 32)


def send_flat(rank: int, world_size: int, numel: int) -> int:
    """Bytes of a bucket of one parameter, which has no segments."""
    model = nn.ParameterList([torch.ones(numel)])
    with RHTState(block=BLOCK, min_numel=0, warmup_steps=0, timeout=TIMEOUT) as state:
        ddp = wrapped(Sum(model), state)
        for _ in range(2):
            before = state.stats().bytes_sent
            ddp(1.0 + rank).backward()
        return state.stats().bytes_sent - before


class Sum(nn.Module):
    def __init__(self, weights: nn.ParameterList) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, factor: float) -> torch.Tensor:
        return factor * torch.stack([weight.sum() for weight in self.weights]).sum()
