"""How many Python calls an exchange takes: on small buckets they are most of its time."""

import cProfile
import pstats

import torch
import torch.distributed as dist
from harness import Ranks

import rhtcomm
from rhtcomm import Codec, Key, QuicFL
from rhtcomm.reduce import Reducer

MOST = 140  # per exchange of one chunk, sockets included; 473 before routes were kept, over Gloo
NUMEL, TIMES = 5120, 50


def profile_exchanges(rank: int, world_size: int) -> dict[str, float]:
    """Calls per exchange by function, of Python and of C, over connections as the hook makes."""
    world = dist.group.WORLD
    assert world is not None
    communicator = rhtcomm.TorchCommunicator.of_its_own(world, "cpu")
    reducer = Reducer(Codec(QuicFL(4)), communicator, min_numel=0)
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank))
    for step in range(10):
        reducer.mean_(x, Key(0, step))
    keys = [Key(1, step) for step in range(TIMES)]
    profile = cProfile.Profile()
    profile.enable()
    for key in keys:
        reducer.mean_(x, key)
    profile.disable()
    communicator.close()
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return {
        f"{'/'.join(file.split('/')[-2:])}:{line} {name}": count / TIMES
        for (file, line, name), (_, count, *_) in stats.items()
    }


def test_an_exchange_takes_few_python_calls(ranks: Ranks) -> None:
    for calls in ranks.run(profile_exchanges, 2):
        by_function = sorted(calls.items(), key=lambda item: -item[1])
        table = "\n".join(f"{count:6.2f} {name}" for name, count in by_function)
        print(f"{sum(calls.values()):.1f} calls\n{table}")  # what pytest shows where it fails
        assert sum(calls.values()) <= MOST
