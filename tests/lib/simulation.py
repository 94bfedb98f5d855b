"""The collectives written out in one process, and tensors to compare them on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import rhtcomm
from rhtcomm import Codec, Key, QuicFL
from rhtcomm.reduce import Algorithm, split

ALGORITHMS: tuple[Algorithm, ...] = ("all_gather", "two_shot", "gather")
KEY = Key(seed=11, step=5, bucket=2)
BLOCK = 256
CODEC = Codec(QuicFL(4), block=BLOCK)


def data(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(numel,) numbers of widely different sizes, other ones on every rank."""
    random = torch.Generator().manual_seed(1000 + rank)
    x = torch.randn(numel, generator=random) * torch.randn(numel, generator=random).exp()
    return ((rank + 1) * x).to(dtype)


# ---- The collectives --------------------------------------------------------------------------


def all_gather_mean(inputs: list[torch.Tensor], codec: Codec, key: Key) -> torch.Tensor:
    """Everyone decodes what everyone encoded."""
    world_size = len(inputs)
    payloads = [codec.encode(x, key, rank, world_size) for rank, x in enumerate(inputs)]
    return codec.decode_mean(torch.stack(payloads), key, inputs[0].numel())


def two_shot_mean(inputs: list[torch.Tensor], codec: Codec, key: Key) -> torch.Tensor:
    """Rank r averages blocks w r .. w (r + 1) of all ranks, w = ceil(B / n), and encodes them."""
    world_size, numel = len(inputs), inputs[0].numel()
    width = math.ceil(math.ceil(numel / codec.block) / world_size) * codec.block
    second_key = Key(key.seed, key.step, key.bucket, hop=1)
    result = torch.full((numel,), torch.nan)
    for owner in range(world_size):
        start, stop = width * owner, min(width * (owner + 1), numel)
        if start >= stop:
            continue
        payloads = [
            codec.encode(x[start:stop], key, rank, world_size, offset=start)
            for rank, x in enumerate(inputs)
        ]
        mean = codec.decode_mean(torch.stack(payloads), key, stop - start, offset=start)
        again = codec.encode(mean, second_key, offset=start)
        result[start:stop] = codec.decode_mean(again[None], second_key, stop - start, offset=start)
    return result


def gather_mean(inputs: list[torch.Tensor], codec: Codec, key: Key) -> torch.Tensor:
    """One rank decodes what everyone encoded, and everyone what it encodes again."""
    mean = all_gather_mean(inputs, codec, key)
    second_key = Key(key.seed, key.step, key.bucket, hop=1)
    again = codec.encode(mean, second_key)
    return codec.decode_mean(again[None], second_key, mean.numel())


MEANS = {"all_gather": all_gather_mean, "two_shot": two_shot_mean, "gather": gather_mean}


def simulated(
    inputs: list[torch.Tensor], codec: Codec, key: Key, algorithm: Algorithm
) -> torch.Tensor:
    if algorithm == "auto":
        n, payload_bytes = len(inputs), codec.nbytes(inputs[0].numel())
        more = (n - 1) * payload_bytes - 2 * (n - 1) / n * payload_bytes
        algorithm = "two_shot" if more > 131072 else "all_gather"
    return MEANS[algorithm](inputs, codec, key).to(inputs[0].dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, with NaN equal to NaN and 0 different from -0."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- In real processes ------------------------------------------------------------------------

Case = tuple[Codec, Algorithm, int, torch.dtype]


def reduce_cases(rank: int, world_size: int, cases: list[Case]) -> list[torch.Tensor]:
    communicator = rhtcomm.TorchCommunicator()
    results = []
    for codec, algorithm, numel, dtype in cases:
        x = data(rank, numel, dtype)
        rhtcomm.all_reduce(x, codec, KEY, communicator, algorithm=algorithm, min_numel=0)
        results.append(x)
    return results


@contextmanager
def chunks_of(blocks: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "FEWEST", blocks * BLOCK)
        patch.setattr(split, "MOST", blocks * BLOCK)
        yield
