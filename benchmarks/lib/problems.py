"""What quality.py trains: small models on which a run takes seconds, and their optimizers."""

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.gradients import DEMO, GPT, draw_batch, load_corpus, make_optimizer

__all__ = ["PROBLEMS", "Problem"]

Batch = tuple[Tensor, Tensor]  # inputs, targets
Optimizers = dict[str, Callable[[nn.Module], torch.optim.Optimizer]]


@dataclass(frozen=True)
class Problem:
    """One thing to learn; the score at the end is the loss on `held_out` minus `optimum`."""

    make_model: Callable[[], nn.Module]
    """Called after torch.manual_seed."""
    draw: Callable[[tuple[int, int, int]], Batch]
    """The batch of (seed, step, rank)."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of outputs and targets."""
    held_out: Callable[[], Batch]
    optimizers: Optimizers
    steps: int = 200
    warmup: int = 0
    """Steps in which the learning rate grows."""
    optimum: Callable[[], float] = lambda: 0.0

    def score(self, model: nn.Module) -> float:
        inputs, targets = self.held_out()
        model.eval()
        with torch.no_grad():
            return self.loss(model(inputs), targets).item() - self.optimum()


def optimizers(adamw: float, sgd: float, momentum: float = 0.9) -> Optimizers:
    """By name, with these learning rates at the beginning."""
    return {
        "AdamW": lambda model: torch.optim.AdamW(model.parameters(), adamw, weight_decay=0.0),
        "SGD": lambda model: torch.optim.SGD(model.parameters(), sgd, momentum),
    }


def pick(inputs: Tensor, targets: Tensor, count: int, key: tuple[int, ...]) -> Batch:
    """`count` examples, drawn with replacement."""
    generator = torch.Generator().manual_seed(hash(key) % 2**63)
    chosen = torch.randint(0, len(inputs), (count,), generator=generator)
    return inputs[chosen], targets[chosen]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions of all examples, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


# Sequences with hardly any noise ------------------------------------------------------------------

LENGTH, SYMBOLS = 32, 64


class Columns(nn.Linear):
    """A linear layer whose weight is (inputs, outputs), as GPT-2's are.

    So a row has a column for each query, key and value, whose gradients differ 20 times in size in
    the first steps.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    """A block of GPT-2: causal attention, then a GELU network, with biases and pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = Columns(width, 3 * width)
        self.attention_out = Columns(width, width)
        self.mlp_in, self.mlp_out = Columns(width, 4 * width), Columns(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        qkv = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class Predictor(nn.Module):
    """GPT-2 of two layers and 64 channels: symbols (batch, length) to logits of the next ones."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.positions = nn.Embedding(2 * LENGTH, width)  # of which it uses a half
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.embedding.weight.T


@cache
def sequences() -> Batch:
    """512 arithmetic progressions modulo 64; only the first difference of each is unknown."""
    random = torch.Generator().manual_seed(0)
    step = torch.randint(1, 4, (512, 1), generator=random)
    start = torch.randint(0, SYMBOLS, (512, 1), generator=random)
    x = (torch.arange(LENGTH + 1) * step + start) % SYMBOLS
    return x[:, :-1], x[:, 1:]


# Rare symbols -------------------------------------------------------------------------------------

CLASSES = 64


class Classifier(nn.Module):
    """Symbols (batch,) to the logits of their classes; few rows of it get a gradient."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4096, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embedding(symbols)
        return self.head(x + self.mlp(x))


@cache
def symbols() -> Batch:
    """Each symbol once, and the class that is to be learned of it."""
    classes = torch.randint(0, CLASSES, (4096,), generator=torch.Generator().manual_seed(0))
    return torch.arange(len(classes)), classes


def draw_symbols(key: tuple[int, int, int]) -> Batch:
    """512 symbols by Zipf's law: the rarest one comes every 50th step of a rank."""
    every, classes = symbols()
    generator = torch.Generator().manual_seed(hash(key) % 2**63)
    drawn = torch.multinomial(1 / (every + 10.0), 512, True, generator=generator)
    return drawn, classes[drawn]


# The demo's text ----------------------------------------------------------------------------------


@cache
def corpus() -> Batch:
    return load_corpus(Path(sysconfig.get_path("stdlib")))


# Images -------------------------------------------------------------------------------------------


@cache
def digits() -> Batch:
    """scikit-learn's 1797 images of 8 x 8, in a random order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return images[order], torch.from_numpy(data.target).long()[order]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


# A regression -------------------------------------------------------------------------------------


@cache
def regression() -> Batch:
    """4096 examples of 256 numbers, each of which explains as much as the next times 1.02."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 256, generator=random) * 1.02 ** -torch.arange(256)
    weights = torch.randn(256, 64, generator=random) / 16
    return x, x @ weights + 0.5 * torch.randn(4096, 64, generator=random)


@cache
def least_squares() -> float:
    """The least mean squared error that weights and a bias can have."""
    x, y = (part.double() for part in regression())
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return (x @ torch.linalg.lstsq(x, y).solution - y).square().mean().item()


TEST_IMAGES = 360

PROBLEMS = {
    "sequences": Problem(
        Predictor,
        lambda key: pick(*sequences(), 8, key),
        cross_entropy,
        sequences,
        optimizers(adamw=3e-3, sgd=0.3, momentum=0.0),
    ),
    "symbols": Problem(
        Classifier,
        draw_symbols,
        cross_entropy,
        symbols,  # equally often, so that the rare ones count
        optimizers(adamw=3e-3, sgd=1.0),
        steps=300,
    ),
    "text": Problem(
        lambda: GPT(*DEMO),
        lambda key: draw_batch(corpus()[0], 8, 128, key),
        cross_entropy,
        lambda: draw_batch(corpus()[1], 64, 128, (0,)),
        optimizers(adamw=2e-3, sgd=0.3) | {"AdamW": lambda model: make_optimizer(model, 2e-3)},
        warmup=25,
    ),
    "digits": Problem(
        convolutions,
        lambda key: pick(*(part[TEST_IMAGES:] for part in digits()), 32, key),
        cross_entropy,
        lambda: tuple(part[:TEST_IMAGES] for part in digits()),  # type: ignore[arg-type]
        optimizers(adamw=2e-3, sgd=0.05),
    ),
    "regression": Problem(
        lambda: nn.Linear(256, 64),
        lambda key: pick(*regression(), 64, key),
        F.mse_loss,
        regression,
        optimizers(adamw=1e-2, sgd=1.0),
        optimum=least_squares,
    ),
}


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Of the first one: up during `warmup`, and all the while on a line to zero."""
    return min(1.0, (step + 1) / max(1, warmup)) * (1 - step / steps)
