"""rhtcomm.hooks.compress_fsdp: the gradients of models that `fully_shard` was called on."""

import pytest
from harness import Ranks
from sharded import CLOSE, FINE, backward, errors, exact_mean, net, sharded

from rhtcomm.hooks import compress_fsdp


def train(rank: int, world_size: int) -> float:
    model = sharded(net())
    with compress_fsdp(model, **FINE) as handle:
        worst = 0.0
        for step in range(3):
            found = backward(model, rank, step)
            worst = max(worst, *errors(found, exact_mean(model, list(range(world_size)), step)))
        assert handle.stats().steps == 3
    return worst


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_are_means(world_size: int, ranks: Ranks) -> None:
    assert max(ranks.run(train, world_size)) < CLOSE
