"""Counter-based random streams: any rank can compute any range of a stream at any time.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011). It is a keyed bijection of 128-bit counters, so a stream has no state: ranks
with the same `Key` get the same random signs and dither without communication.

    key words      seed, low and high half
    counter words  (call, bucket, step, stream + 16 hop + 256 rank)

One call yields four 32-bit words. Streams are laid out over the coordinates of a bucket: signs take
one bit per coordinate (a call serves 128), dither takes one byte (a call serves 16).
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from rhtcomm.arguments import integer

__all__ = ["Key", "Stream", "dither", "philox4x32", "signs", "stratum"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF

MAX_RANKS = 1 << 24
MAX_COORDINATES = 1 << 36  # of a bucket: 2^32 calls of 16 bytes of dither


class Stream(IntEnum):
    """The purpose of a stream; streams of different purposes are independent."""

    SIGNS_1 = 0
    SIGNS_2 = 1
    SIGNS_3 = 2
    DITHER = 3


@dataclass(frozen=True)
class Key:
    """What all ranks share when they compress one bucket in one step.

    Args:
        seed: of the run, 0 <= seed < 2^64.
        step: 0 <= step < 2^32; a new step gives new randomness.
        bucket: 0 <= bucket < 2^32, tells the tensors of one step apart.
        hop: 0 <= hop < 16, tells the encodings of one tensor apart where it travels in
            several hops; set by the collectives.
        owner: 0 <= owner < 2^32, tells the users of one communicator apart. It changes no random
            number, only the check in a payload's header; set by the DDP hook.

    Raises:
        TypeError: a field is not an integer.
        ValueError: a field is out of its range.
    """

    seed: int
    step: int = 0
    bucket: int = 0
    hop: int = 0
    owner: int = 0

    def __post_init__(self) -> None:
        widths = {"seed": 64, "step": 32, "bucket": 32, "hop": 4, "owner": 32}
        for name, width in widths.items():
            value = integer(getattr(self, name), "Key", name)
            object.__setattr__(self, name, value)  # convert any integer to a plain int
            if not 0 <= value < 1 << width:
                raise ValueError(f"Key: {name}={value} must lie in [0, 2^{width})")

    def next_hop(self) -> "Key":
        """The key for encoding the same tensor again, with independent randomness."""
        return replace(self, hop=self.hop + 1)


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[int, int]
) -> torch.Tensor:
    """Philox4x32-10 of a batch of counters.

    Args:
        counter: four int64 tensors that broadcast to (n,), each value in [0, 2^32).
        key: two 32-bit words.

    Returns:
        (n, 4) int64, each value in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products overflow into the sign bit; the masks below drop it.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def words(
    key: Key, stream: Stream, call: int, count: int, rank: int, device: torch.device
) -> torch.Tensor:
    """Calls call .. call + count - 1 of a stream: (count, 4) int64 with 32-bit words."""
    if call + count > 1 << 32:
        raise ValueError(f"a stream has 2^32 calls, but {call + count} were requested")
    if not 0 <= rank < MAX_RANKS:
        raise ValueError(f"rank={rank} must lie in [0, {MAX_RANKS})")

    def word(value: int) -> torch.Tensor:
        return torch.full((), value, dtype=torch.int64, device=device)

    calls = torch.arange(call, call + count, dtype=torch.int64, device=device)
    purpose = word(stream + 16 * key.hop + 256 * rank)
    return philox4x32(
        (calls, word(key.bucket), word(key.step), purpose), (key.seed & _MASK, key.seed >> 32)
    )


def signs(
    key: Key, stream: Stream, offset: int, count: int, rank: int, device: torch.device
) -> torch.Tensor:
    """Random signs of the coordinates offset .. offset + count - 1: (count,) float32 of +1 and -1.

    Coordinate j takes bit j mod 128 of call j // 128, counted from the lowest bit of the first
    word; a set bit means minus. `offset` and `count` must be multiples of 8.
    """
    call, stop = offset // 128, -(-(offset + count) // 128)
    drawn = words(key, stream, call, stop - call, rank, device)
    octets = drawn.to(torch.int32).view(torch.uint8).flatten()  # little-endian
    skip = offset // 8 - call * 16
    bit = torch.arange(8, dtype=torch.uint8, device=device)
    minus = (octets[skip : skip + count // 8, None] >> bit) & 1
    return (1 - 2 * minus.view(torch.int8)).float().flatten()


def stratum(rank: int, world_size: int) -> int:
    """What a rank adds to the shared dither, in units of 1/256: rank i of n adds i/n."""
    return 256 * rank // world_size


def dither(
    key: Key, offset: int, count: int, stratum: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent uniform 16-bit numbers per coordinate: (u, v), each (count,) int32.

    Coordinate j owns byte j mod 4 of word (j // 4) mod 4 of call j // 16. Rotating that word until
    the byte is on top gives 32 uniform bits, the upper 16 being v and the lower 16 being u. So u
    and v are exactly uniform and independent, for one byte per coordinate. Coordinates of one word
    share their lower bits, which does not change the distribution of any of them. `stratum`, in
    units of 1/256, is added to both, modulo one. The top byte of v, all that a receiver needs,
    depends only on the coordinate's own byte.

    `offset` and `count` must be multiples of 16.
    """
    drawn = words(key, Stream.DITHER, offset // 16, count // 16, 0, device).view(-1, 1)
    turn = torch.arange(8, 40, 8, device=device)
    turned = (drawn >> turn) | (drawn << (32 - turn))
    u, v = (turned & 0xFFFF).int(), ((turned >> 16) & 0xFFFF).int()
    if stratum:
        u, v = (u + 256 * stratum) & 0xFFFF, (v + 256 * stratum) & 0xFFFF
    return u.flatten(), v.flatten()
