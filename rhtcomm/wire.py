"""The wire format, version 1, little-endian (docs/format.md has the rest, and the arithmetic).

    offset  bytes
    0       2                  "RH"
    2       1                  version
    3       1                  number of rotations, plus 16 times the number that the sender wants
                               for the next payload of the same bucket (0: it is fixed)
    4       4                  check of key, rank, world size, offset, numel and owner
    8       8                  fingerprint of the configuration
    16      4 n_1              scales of the n_1 full blocks, float32
            nbytes(n_1, d_1)   their codes (`Quantizer.nbytes`): block by block the packed codes
                               (see bitpack), and of QuicFL's exact mode its exact coordinates; of
                               ECDQ unit by unit (see rans)
            4 + nbytes(1, d_2) the same of the tail block, if there is one

The values of a block are decoded in units of its scale: the root mean square of the block (EDEN:
times a correction; ECDQ: a quarter of the grid's step). NaN marks a block that held inf or NaN,
zero a block of zeros.
"""

import sys
from collections.abc import Mapping, Sequence
from ctypes import memmove
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import torch

from rhtcomm.quantizers import Quantizer, QuicFL
from rhtcomm.randomness import Key
from rhtcomm.rotation import Blocks, split_into_blocks
from rhtcomm.versions import WIRE

__all__ = [
    "HEADER_BYTES",
    "Headers",
    "PayloadError",
    "Section",
    "facts_of",
    "fingerprint_of",
    "layout",
    "length_of",
]

HEADER_BYTES = 16
MARK = b"RH"


class PayloadError(ValueError):
    """A payload does not fit this codec, key and length."""


# Layout ------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """The blocks of one size in a payload, and their positions, in bytes from its beginning."""

    blocks: Blocks
    """The B blocks; their offset counts from the beginning of the payload's tensor."""
    scales: int
    codes: int
    stop: int

    def views(self, payloads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """payloads (..., nbytes) uint8 -> scales (..., B) float32 and codes (..., B, row bytes).

        For quantizers that code single blocks: a row has the codes of one block.
        """
        codes = payloads[..., self.codes : self.stop]
        return (
            payloads[..., self.scales : self.codes].view(torch.float32),
            codes.view(*payloads.shape[:-1], self.blocks.count, -1),
        )

    def part(
        self, payloads: torch.Tensor, rows: slice, quantizer: Quantizer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """payloads (..., nbytes) uint8 -> scales (..., R) float32 and codes (..., n) of R blocks.

        These must be whole units: `rows` begins at a unit.
        """
        begin, end = (
            self.codes + quantizer.nbytes(row, self.blocks.size) for row in (rows.start, rows.stop)
        )
        scales = payloads[..., self.scales : self.codes].view(torch.float32)
        return scales[..., rows], payloads[..., begin:end]


@lru_cache(maxsize=1024)  # each training step needs the same ones
def layout(quantizer: Quantizer, block: int, numel: int) -> tuple[Section, ...]:
    """The sections of the payload of `numel` coordinates: full blocks, then a tail."""
    sections, scales = [], HEADER_BYTES
    for blocks in split_into_blocks(numel, block):
        codes = scales + 4 * blocks.count
        stop = codes + quantizer.nbytes(blocks.count, blocks.size)
        sections.append(Section(blocks, scales, codes, stop))
        scales = stop
    return tuple(sections)


def length_of(sections: tuple[Section, ...]) -> int:
    """Bytes of a payload of these sections."""
    return sections[-1].stop if sections else HEADER_BYTES


# Configuration -----------------------------------------------------------------------------------


def facts_of(quantizer: Quantizer, rotations: object, block: int) -> dict[str, object]:
    """What determines the meaning of a payload, by name."""
    facts: dict[str, object] = {
        "byteorder": sys.byteorder,
        "quantizer": type(quantizer).__name__,
        "bits": quantizer.bits,
        "rotations": rotations,
        "block": block,
    }
    if isinstance(quantizer, QuicFL) and quantizer.exact_fraction:
        facts["exact_fraction"] = quantizer.exact_fraction
    if getattr(quantizer, "biased", False):
        facts["biased"] = True
    return facts


def fingerprint_of(quantizer: Quantizer, rotations: object, block: int) -> bytes:
    """8 bytes that differ between configurations, and between tables of levels."""
    facts = {"format": WIRE, **facts_of(quantizer, rotations, block)}
    return blake2b(repr((facts, quantizer.fingerprint)).encode(), digest_size=8).digest()


# Headers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headers:
    """Writes and checks the headers of one codec's payloads.

    Args:
        fingerprint: of the codec's configuration, 8 bytes.
        configuration: by name, for errors.
        rotations: the codec's default number.
        auto: whether the number can be chosen per payload, and payloads carry the number that their
            senders want next.
    """

    fingerprint: bytes
    configuration: Mapping[str, object]
    rotations: int
    auto: bool

    def make(
        self,
        counts: Sequence[int],
        shards: int,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        numel: int,
    ) -> bytes:
        """The headers of payloads (K, shards) of `numel` coordinates each, one for each count.

        They come from K adjacent ranks, starting with `rank`, and the first shard is at `offset`. A
        count is a number of rotations, plus 16 times the number that the sender wants next, which
        is 0 unless "auto".
        """
        owner = f", {key.owner}" if key.owner else ""
        step, headers = f"({key.seed}, {key.step}, {key.bucket}, {key.hop}", b""
        for i, count in enumerate(counts):
            sender, shard = rank + i // shards, offset + i % shards * numel
            origin = f"{step}, {sender}, {world_size}, {shard}, {numel}{owner})"
            check = blake2b(origin.encode(), digest_size=4).digest()
            headers += MARK + bytes((WIRE, count)) + check + self.fingerprint
        return headers

    def write(
        self,
        payloads: torch.Tensor,
        rotations: int,
        wanted: int | None,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        numel: int,
    ) -> None:
        """Write the headers of payloads (shards, at least 16) of `numel` coordinates each.

        The first shard is at `offset`; `wanted` is passed only with "auto". The host does not wait
        for the payloads' device.
        """
        shards = payloads.shape[0]
        counts = (rotations + 16 * (wanted or 0),) * shards
        headers = self.make(counts, shards, key, offset, rank, world_size, numel)
        if payloads.is_cpu:  # torch takes several times as long for so few bytes
            address, stride = payloads.data_ptr(), payloads.stride(0)
            for i in range(shards):
                header = headers[i * HEADER_BYTES : (i + 1) * HEADER_BYTES]
                memmove(address + i * stride, header, HEADER_BYTES)
            return
        source = torch.frombuffer(bytearray(headers), dtype=torch.uint8).view(shards, HEADER_BYTES)
        if payloads.device.type == "cuda":  # a copy from pageable memory blocks the host
            source = source.pin_memory()
        payloads[:, :HEADER_BYTES].copy_(source, non_blocking=True)

    def check(
        self,
        payloads: torch.Tensor,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        numel: int,
    ) -> tuple[int, int | None]:
        """Check the headers of payloads (K, shards, at least 16).

        They come from K adjacent ranks, starting with `rank`. Shards have `numel` coordinates each,
        and the first is at `offset`.

        Returns:
            The number of rotations that all of them used, and the largest number that a sender
            wants next (None if it is fixed).

        Raises:
            PayloadError: a header is not the expected one.
        """
        ranks, shards, _ = payloads.shape
        if payloads.is_cpu:  # slicing is faster in NumPy than in torch
            found = payloads.numpy()[..., :HEADER_BYTES].tobytes()
        else:
            found = payloads[..., :HEADER_BYTES].cpu().numpy().tobytes()
        rotations = found[3] % 16 if self.auto else self.rotations
        if rotations not in (1, 2, 3):
            rotations = self.rotations
        counts: Sequence[int] = (rotations,) * (ranks * shards)
        most = None
        if self.auto:  # replace an invalid number, so that the header differs
            wanted = [min(max(count >> 4, 1), 3) for count in found[3::HEADER_BYTES]]
            counts, most = [rotations + 16 * number for number in wanted], max(wanted)
        expected = self.make(counts, shards, key, offset, rank, world_size, numel)
        for i in range(0, len(found), HEADER_BYTES) if found != expected else ():
            header, other = found[i : i + HEADER_BYTES], expected[i : i + HEADER_BYTES]
            if header != other:
                number = i // HEADER_BYTES
                sender, shard = rank + number // shards, offset + number % shards * numel
                fact = self._difference(header, other) or (
                    f"was made for another key, rank, world size, offset or length than {key}, "
                    f"rank={sender}, world_size={world_size}, offset={shard}, numel={numel}: "
                    "the ranks are out of step"
                )
                raise PayloadError(f"rhtcomm.Codec: the payload of rank {sender} {fact}")
        return rotations, most

    def _difference(self, found: bytes, expected: bytes) -> str | None:
        """What is wrong with a header, in words; None if only its check differs."""
        if found[:2] != expected[:2]:
            return "does not begin with the mark of a payload"
        if found[2] != expected[2]:
            return (
                f"has format version {found[2]}, but this is version {WIRE}; update the older one"
            )
        if self.auto and found[3] != expected[3] and found[8:] == expected[8:]:
            rotations, wanted = found[3] % 16, found[3] >> 4
            if rotations not in (1, 2, 3) or wanted not in (1, 2, 3):
                return (
                    f"has {rotations} rotations and requests {wanted} next, but only 1, 2 and 3 "
                    "are valid: it is damaged"
                )
            return (
                f"has {rotations} rotations, another payload {expected[3] % 16}: the ranks loaded "
                "different checkpoints, or are out of step"
            )
        if found[3] != expected[3] or found[8:] != expected[8:]:
            return (
                f"was made with a configuration other than {dict(self.configuration)}, or with "
                "other tables"
            )
        return None
