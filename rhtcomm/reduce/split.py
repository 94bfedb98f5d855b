"""How a tensor is split into chunks and shards, and the choice of the algorithm."""

from typing import Literal, get_args

from rhtcomm.codec import Codec
from rhtcomm.lattice import Lattice
from rhtcomm.randomness import MAX_COORDINATES, MAX_RANKS

__all__ = [
    "FEWEST",
    "MOST",
    "Algorithm",
    "check_algorithm",
    "check_streams",
    "choose_algorithm",
    "split_into_chunks",
    "split_into_shards",
]

Algorithm = Literal["auto", "all_gather", "two_shot", "gather"]

# Additional bytes that a rank may send to save a round trip: 1 ms at 1 Gbit/s. There the two were
# measured to take equally long with 70 KiB between 3 ranks and 280 between 8 on two cores, which
# posting messages keeps busy; on faster links with more (benchmarks/README.md).
_EXTRA_BYTES = 1 << 17
# Coordinates of a chunk's shard (for all_gather, of the chunk): a third of the tensor's, within
# these limits. They were measured (benchmarks/README.md); more chunks cost more messages.
FEWEST, MOST = 1 << 18, 3 << 18


def check_algorithm(algorithm: str, codec: Codec | Lattice) -> None:
    """Raise ValueError unless the algorithm is one of `Algorithm` and fits the codec."""
    if algorithm not in get_args(Algorithm):
        raise ValueError(
            f"rhtcomm: algorithm={algorithm!r} must be one of {', '.join(get_args(Algorithm))}"
        )
    if isinstance(codec, Lattice) and algorithm != "auto":
        raise ValueError(
            f"rhtcomm: algorithm={algorithm!r} is for payloads, but a Lattice has none: its codes "
            'are summed by an all-reduce; leave the algorithm at "auto"'
        )


def check_streams(numel: int, world_size: int) -> None:
    """Raise ValueError if the random streams of a key do not suffice and would repeat."""
    if world_size > MAX_RANKS or numel > MAX_COORDINATES:
        raise ValueError(
            f"rhtcomm: {numel} coordinates on {world_size} ranks exceed the streams of a key, "
            f"which suffice for {MAX_COORDINATES} coordinates on {MAX_RANKS} ranks; split the "
            "tensor"
        )


def choose_algorithm(
    algorithm: Algorithm, world_size: int, payload_bytes: int
) -> Literal["all_gather", "two_shot", "gather"]:
    """The choice of "auto": fewest bytes, unless the extra round trip costs more than it saves."""
    if algorithm != "auto":
        return algorithm
    # (n - 1) P against 2 (n - 1) / n P
    extra_bytes = (world_size - 1) * (world_size - 2) * payload_bytes // world_size
    return "all_gather" if extra_bytes <= _EXTRA_BYTES else "two_shot"


def split_into_chunks(numel: int, block: int, shards: int) -> list[slice]:
    """Consecutive chunks, as equal as whole blocks for each shard allow."""
    count = max(min(numel // (shards * FEWEST), 3), -(-numel // (shards * MOST)), 1)
    length = max(1, -(-numel // (count * shards * block))) * shards * block
    return [slice(offset, min(numel, offset + length)) for offset in range(0, numel, length)]


def split_into_shards(numel: int, block: int, world_size: int) -> list[slice]:
    """One shard of whole blocks per rank, of equal length except the last ones, which get the
    rest."""
    length = -(-numel // (block * world_size)) * block
    full = [slice(offset, min(numel, offset + length)) for offset in range(0, numel, length or 1)]
    return full + [slice(0, 0)] * (world_size - len(full))
