"""What the tests of trainers share: a task that each of them trains, and the same without any."""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from harness import ROOT, load_module
from models import parameters_of
from problems import numbers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rhtcomm.hooks

__all__ = [
    "EPOCH",
    "OPTIONS",
    "RATE",
    "Net",
    "batches",
    "check_example",
    "check_logged",
    "check_resumed",
    "check_resumed_example",
    "check_same",
    "example",
    "launched",
    "loss_of",
    "plain",
    "seeded",
]

# With error feedback each rank has a state of its own.
OPTIONS: dict[str, Any] = {
    "bits": 2,
    "quantizer": "eden",
    "error_feedback": True,
    "block": 256,
    "min_numel": 0,
    "warmup_steps": 2,
}
RATE = 0.05
EPOCH = 3  # steps


class Net(nn.Module):
    """DDP lays its gradients out anew after the first step: layers are used in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 8)
        self.first = nn.Linear(32, 48)
        self.middle = nn.Linear(48, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(self.middle(self.first(x).tanh()).tanh())
        return output


def seeded() -> Net:
    torch.manual_seed(0)
    return Net()


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model(x)
    return output.square().mean()


def batches(rank: int) -> list[torch.Tensor]:
    """Of an epoch."""
    return [numbers(rank, step, shape=(4, 32)) for step in range(EPOCH)]


def plain(rank: int, epochs: int) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Parameters and figures of each step with the hook in DDP, without a trainer."""
    model = seeded()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    figures = []
    with rhtcomm.hooks.register(ddp, **OPTIONS) as handle:
        for x in batches(rank) * epochs:
            loss_of(ddp, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            figures.append(handle.figures())
    return parameters_of(model), figures


@contextlib.contextmanager
def launched(rank: int, world_size: int) -> Iterator[None]:
    """The environment that torchrun would give to a rank."""
    before = dict(os.environ)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # of nobody: torch.distributed runs already
        "TORCHELASTIC_RUN_ID": "test",
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def check_logged(rows: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, float]]) -> None:
    """What a trainer logged, against the figures of the same steps without it."""
    assert len(rows) == len(figures)
    for row, expected in zip(rows, figures, strict=True):
        for name, value in expected.items():
            if name.endswith("seconds"):
                assert float(row[name]) > 0
            else:  # the trainer may have made a float32 of it
                assert float(row[name]) == pytest.approx(value, rel=1e-6), name
    assert figures[0] != figures[-1], "after the warm-up a step takes other bytes"


def check_same(results: Sequence[Mapping[str, Any]]) -> None:
    """That each rank ended with the bits of the same training without the trainer."""
    for result in results:
        assert torch.equal(result["whole"], result["plain"])


def check_resumed(results: Sequence[Mapping[str, Any]]) -> None:
    """That each rank's resumed run ended as the whole one, and that it needed the hook's state."""
    for result in results:
        assert torch.equal(result["resumed"], result["whole"])
        assert not torch.equal(result["forgotten"], result["whole"]), "the state changes nothing"


def example(name: str, *arguments: str) -> str:
    """What a script of launch/examples prints, run as this rank."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        load_module(str(ROOT / "launch/examples" / name)).main(*arguments)
    return printed.getvalue()


def check_example(printed: str, loss: float) -> str:
    """That a script of launch/examples has learned, and sent less. Returns the loss."""
    found = re.search(r"loss ([0-9.]+), ([0-9.]+) times fewer bytes\s*$", printed)
    assert found, printed
    assert float(found[1]) < loss
    assert 4 < float(found[2]) <= 8
    return found[1]


def check_resumed_example(printed: list[str], loss: float) -> None:
    """The same of a whole run and one that went on from its checkpoint: they end alike."""
    whole, resumed = (check_example(text, loss) for text in printed)
    assert resumed == whole
