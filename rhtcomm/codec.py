"""Rotation, quantizer and packing <-> one uint8 payload whose length is known beforehand.

Wire format, version 1, little-endian (docs/format.md has the rest, and the arithmetic):

    offset  bytes
    0       2                  "RH"
    2       1                  version
    3       1                  number of rotations; above it, times 16, the number that the sender
                               wants for the next payload of the same bucket (0: it is fixed)
    4       4                  check of key, rank, world size, first coordinate, numel and owner
    8       8                  fingerprint of the configuration
    16      4 n_1              scales of the n_1 full blocks, float32
            n_1 (d_1 b / 8     their packed codes, block by block (see bitpack), each followed by
             + e(d_1))         its exact coordinates (QuicFL.exact_bytes, zero by default)
            4 + d_2 b / 8      the same of the tail block, if there is one
             + e(d_2)

A scale is the root mean square that a block's values are in units of (Eden: times its correction).
NaN in its place marks a block that held inf or NaN, zero a block of zeros.
"""

import math
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch

from rhtcomm.kernels import DTYPES, Section, Task, kernel_for
from rhtcomm.memory import memory_of, overlap, refuse_fake_mode
from rhtcomm.quantizers import Quantizer, QuicFL
from rhtcomm.randomness import MAX_COORDINATES, MAX_RANKS, Key, check_key
from rhtcomm.rotation import (
    MOMENTS,
    RandomizedHadamard,
    rotations_for,
    split_into_blocks,
)
from rhtcomm.versions import VERSIONS, WIRE

__all__ = ["DTYPES", "Codec", "DeferredChecks", "PayloadError"]

HEADER_BYTES = 16
AUTO: Literal["auto"] = "auto"


class PayloadError(ValueError):
    """A payload is not what this codec, key and length call for."""


class DeferredChecks:
    """Checks of payloads on CUDA that wait for nothing.

    To look at headers on a device stops the host until the device has come to them. Within
    `deferring()`, on the same thread, `Codec.decode_mean` has them copied to pinned memory instead,
    16 bytes a payload, and goes on; `raise_failed` makes the checks of those that have arrived.
    Kernels stay in bounds whatever the bytes of a payload are, so until then a result can only be
    wrong. Headers that say how to decode, as with rotations="auto", are read at once all the same.
    """

    devices = ("cuda",)
    most = 4096  # pending, before the oldest is waited for

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, Callable[[], object]]] = deque()

    @contextmanager
    def deferring(self) -> Iterator[None]:
        token = _deferred.set(self)
        try:
            yield
        finally:
            _deferred.reset(token)

    def add(self, headers: torch.Tensor, check: Callable[[torch.Tensor], object]) -> None:
        arrived, copy = _to_host(headers)
        self._pending.append((arrived, partial(check, copy)))

    def raise_failed(self, wait: bool = False) -> None:
        """Make the checks of what has arrived or, with `wait`, of all.

        Raises:
            PayloadError: the first that failed; those after it are forgotten.
        """
        while self._pending:
            arrived, check = self._pending[0]
            if wait or len(self._pending) > self.most:
                arrived.synchronize()
            elif not arrived.query():
                return
            self._pending.popleft()
            try:
                check()
            except PayloadError:
                self._pending.clear()
                raise


_deferred: ContextVar[DeferredChecks | None] = ContextVar("rhtcomm deferred checks", default=None)


def _to_host(x: torch.Tensor) -> tuple[torch.cuda.Event, torch.Tensor]:
    """x on CUDA -> an event, and the tensor that holds x after it."""
    copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    copy.copy_(x, non_blocking=True)
    return torch.cuda.current_stream(x.device).record_event(), copy


@dataclass(frozen=True)
class Codec:
    """Compresses flat tensors; immutable and stateless, so one may serve many threads.

    Args:
        quantizer: `QuicFL`, `Eden` or `VectorQuantizer`.
        rotations: randomized Hadamard transforms, 1 to 3, or "auto"; by default as many as the
            quantizer's promise needs for every input. With "auto" that is what `encode` takes
            unless it is told another number, while every payload says how many transforms its own
            tensor needs (see `choose_rotations`); `wanted_rotations` reads it.
        block: coordinates in a block, a power of two from 32 to 2^24.

    Raises:
        ValueError: an argument is out of its range.
    """

    quantizer: Quantizer
    rotations: int | Literal["auto"] | None = None
    block: int = 4096

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, type) or not hasattr(self.quantizer, "group"):
            raise TypeError(
                f"Codec: quantizer={self.quantizer!r} must be an object such as QuicFL(bits=4)"
            )
        if self.rotations is None:
            object.__setattr__(self, "rotations", self.quantizer.rotations)
        if isinstance(self.rotations, str) and self.rotations != AUTO:
            raise ValueError(f'Codec: rotations={self.rotations!r} must be 1, 2, 3 or "auto"')
        RandomizedHadamard(self.default_rotations, self.block)  # checks the arguments

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.quantizer, self.rotations, self.block)  # made anew, nothing kept

    @property
    def configuration(self) -> dict[str, object]:
        """What two ranks must have in common to understand each other, by name."""
        return {**VERSIONS, **self._facts}

    @property
    def _facts(self) -> dict[str, object]:
        facts: dict[str, object] = {
            "byteorder": sys.byteorder,
            "quantizer": type(self.quantizer).__name__,
            "bits": self.quantizer.bits,
            "rotations": self.rotations,
            "block": self.block,
        }
        if isinstance(self.quantizer, QuicFL) and self.quantizer.exact_fraction:
            facts["exact_fraction"] = self.quantizer.exact_fraction
        if getattr(self.quantizer, "biased", False):
            facts["biased"] = True
        return facts

    @cached_property
    def fingerprint(self) -> bytes:
        """8 bytes that differ between configurations, and between tables of levels."""
        everything = repr(({"format": WIRE, **self._facts}, self.quantizer.fingerprint))
        return blake2b(everything.encode(), digest_size=8).digest()

    def nbytes(self, numel: int) -> int:
        """Length of the payload of `numel` coordinates, in bytes.

        Raises:
            TypeError: numel is no integer.
            ValueError: numel is negative.
        """
        return _length(_layout(self, operator.index(numel)))

    def encode(
        self,
        x: torch.Tensor,
        key: Key,
        rank: int = 0,
        world_size: int = 1,
        *,
        first: int = 0,
        rotations: int | None = None,
        wanted: int | None = None,
        shards: int | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compress one rank's tensor.

        Args:
            x: (numel,) float32, bfloat16 or float16, contiguous or not.
            key: what all ranks share.
            rank, world_size: place of this tensor among those whose mean is wanted.
            first: where x begins in its bucket, a multiple of `block`. A shard encoded with its
                own place takes the randomness that it would take inside the whole bucket.
            rotations: with "auto" alone: how many transforms this payload takes, the same on all
                ranks.
            wanted: with "auto" alone: say that at least so many, 1 to 3, are wanted next.
            shards: give a payload of each of so many equal parts, of whole blocks. It is what the
                part encoded alone with its own `first` gives, but faster than one by one; with
                "auto" all of them say what x needs.
            out: to write into, contiguous uint8 at an address that 4 divides.

        Returns:
            (nbytes(numel),) uint8, or (shards, nbytes(numel / shards)), on the device of x: `out`
            or new.

        Raises:
            TypeError: x has another dtype, or x or out is no tensor or has no memory of its own
                (see `rhtcomm.memory.memory_of`), or key is no Key.
            ValueError: x is not flat or has no such parts, out is not as above or overlaps x, or an
                argument is out of its range.
        """
        rotation = self._rotation(rotations)
        if wanted is not None:
            wanted = self._check_wanted(operator.index(wanted))
        check_key(key, "Codec.encode")
        memory = memory_of(x, "Codec.encode", "x")
        refuse_fake_mode("Codec.encode")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"Codec.encode: x is {x.dtype}, but only float32, bfloat16 and float16 can be "
                "compressed; convert it first"
            )
        if x.dim() != 1:
            raise ValueError(f"Codec.encode: x has shape {tuple(x.shape)}; flatten it first")
        rank, world_size, first = self._check_place(rank, world_size, first)
        x = _plain(x)
        count = 1 if shards is None else operator.index(shards)
        if count < 1 or (count > 1 and x.numel() % (count * self.block)):
            raise ValueError(
                f"Codec.encode: {x.numel()} coordinates do not make shards={shards} equal parts of "
                f"whole blocks of {self.block}"
            )
        each = x.numel() // count
        layout = _layout(self, each)
        nbytes = _length(layout)
        shape = (nbytes,) if shards is None else (count, nbytes)
        out = self._check_out(out, x, shape, memory)
        payloads = out.unsqueeze(0) if shards is None else out
        kernel = kernel_for(x.device, self.quantizer)
        moments = []
        for section in layout:
            if self.rotations == AUTO:
                blocks = count * section.blocks.count
                moments.append(torch.empty(blocks, MOMENTS, dtype=torch.float32, device=x.device))
            task = Task(rotation, self.quantizer, key, section, first, rank, world_size)
            kernel.encode(task, x, payloads, moments[-1] if moments else None)
        if moments:
            quantizer = self.quantizer
            choice = rotations_for(torch.cat(moments), quantizer.group, quantizer.rotations)
            wanted = max(wanted or 1, choice)
        fourth = rotation.rotations + 16 * (wanted or 1 if self.rotations == AUTO else 0)
        _write_headers(
            payloads,
            [
                self._header(fourth, key, rank, world_size, first + i * each, each)
                for i in range(count)
            ],
        )
        return out

    def decode_mean(
        self,
        payloads: torch.Tensor,
        key: Key,
        numel: int,
        *,
        first: int = 0,
        out: torch.Tensor | None = None,
        first_rank: int = 0,
        world_size: int | None = None,
    ) -> torch.Tensor:
        """Mean of what K ranks encoded.

        Args:
            payloads: (K, nbytes(numel)) uint8, row i encoded as rank `first_rank` + i of
                `world_size`.
            key, first: as given to `encode`.
            first_rank, world_size: by default 0 and K, that is all of the ranks.
            numel: length of the tensor.
            out: (numel,) float32, bfloat16 or float16, contiguous, to write into.

        Returns:
            (numel,), `out` or a new float32 tensor. A block where any rank had inf or NaN is NaN.

        Raises:
            PayloadError: a payload has the wrong length, version, configuration, key or place
                (within `DeferredChecks.deferring` on CUDA only the length is looked at).
            TypeError: payloads or out is no tensor or has no memory of its own (see
                `rhtcomm.memory.memory_of`), or key is no Key.
            ValueError: out has another shape, dtype or layout, or overlaps the payloads.
        """
        numel = operator.index(numel)
        self._check_memory(payloads, out, "Codec.decode_mean")
        layout = self._check_payloads(payloads, numel, "Codec.decode_mean")
        if world_size is None:
            world_size = len(payloads)
        place = (key, numel, first, out, first_rank, world_size)
        return self._decode(layout, payloads.unsqueeze(1), *place, "Codec.decode_mean")

    def decode_shards(
        self,
        payloads: torch.Tensor,
        key: Key,
        numel: int,
        *,
        first: int = 0,
        out: torch.Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> torch.Tensor:
        """What one rank encoded with `shards`, put together.

        Args:
            payloads: (shards, nbytes(numel / shards)) uint8.
            key, first, rank, world_size: as given to `encode`.
            numel, out: of all shards; as for `decode_mean`.

        Returns:
            (numel,), `out` or a new float32 tensor.

        Raises:
            PayloadError, TypeError, ValueError: as `decode_mean` does.
        """
        numel = operator.index(numel)
        self._check_memory(payloads, out, "Codec.decode_shards")
        count = payloads.shape[0] if payloads.dim() else 0
        layout = self._check_payloads(payloads, numel // max(1, count), "Codec.decode_shards")
        if count > 1 and numel % (count * self.block):
            raise ValueError(
                f"Codec.decode_shards: {numel} coordinates are not {count} equal parts of "
                f"whole blocks of {self.block}"
            )
        place = (key, numel, first, out, rank, world_size)
        return self._decode(layout, payloads.unsqueeze(0), *place, "Codec.decode_shards")

    def _decode(
        self,
        layout: tuple[Section, ...],
        payloads: torch.Tensor,
        key: Key,
        numel: int,
        first: int,
        out: torch.Tensor | None,
        first_rank: int,
        world_size: int,
        owner: str,
    ) -> torch.Tensor:
        """Mean of payloads (K, shards, nbytes), of K ranks, each in equal shards."""
        ranks, shards, _ = payloads.shape
        check_key(key, owner)
        first_rank, world_size, first = self._check_place(first_rank, world_size, first, ranks)
        each = numel // shards
        payloads = _plain(payloads, copy=False)
        if out is not None:
            self._check_mean(out, payloads, numel, owner)
        places = [(first_rank + i, first + j * each) for i in range(ranks) for j in range(shards)]
        later = _deferred.get()
        if later and payloads.device.type in later.devices and self.rotations != AUTO:
            headers = payloads[..., :HEADER_BYTES].contiguous()
            later.add(headers, partial(self._check_headers, key, places, each, world_size))
            rotation = self._rotation(None)
        else:
            rotation = self._check_headers(key, places, each, world_size, payloads)
        # The scales are read as float32 where they lie.
        *steps, step = payloads.stride()
        if step != 1 or (math.gcd(*steps, payloads.data_ptr(), payloads.storage_offset()) % 4):
            payloads = payloads.clone(memory_format=torch.contiguous_format)
        if out is None:
            out = torch.empty(numel, dtype=torch.float32, device=payloads.device)
        target = out.detach() if out.requires_grad else out
        kernel = kernel_for(payloads.device, self.quantizer)
        for section in layout:
            task = Task(rotation, self.quantizer, key, section, first, first_rank, world_size)
            kernel.decode(task, payloads, target)
        return out

    @staticmethod
    def _check_memory(payloads: torch.Tensor, out: torch.Tensor | None, owner: str) -> None:
        memory = memory_of(payloads, owner, "payloads")
        if out is not None and overlap(memory, memory_of(out, owner, "out")):
            raise ValueError(
                f"{owner}: out overlaps the payloads in memory; give it memory of its own"
            )
        refuse_fake_mode(owner)

    @staticmethod
    def _check_mean(out: torch.Tensor, payloads: torch.Tensor, numel: int, owner: str) -> None:
        if out.device != payloads.device:
            raise ValueError(
                f"{owner}: out lies on {out.device}, the payloads on {payloads.device}; "
                "move one to the other"
            )
        whole = out.is_contiguous() and not out.is_neg()
        if out.shape != (numel,) or out.dtype not in DTYPES or not whole:
            layout = "contiguous" if whole else "negated" if out.is_neg() else "strided"
            raise ValueError(
                f"{owner}: out is {layout} {out.dtype} of shape {tuple(out.shape)}; it "
                f"must be contiguous float32, bfloat16 or float16 of shape ({numel},)"
            )

    def _check_payloads(
        self, payloads: torch.Tensor, numel: int, owner: str
    ) -> tuple[Section, ...]:
        """The layout of each of them, of so many coordinates."""
        layout = _layout(self, numel)
        length = _length(layout)
        fits = payloads.dim() == 2 and payloads.shape[0] > 0 and payloads.shape[1] == length
        if payloads.dtype != torch.uint8 or not fits:
            raise PayloadError(
                f"{owner}: payloads is {payloads.dtype} of shape {tuple(payloads.shape)}, but "
                f"{numel} coordinates take (K, {length}) torch.uint8: a payload was cut short, or "
                "made with another configuration or length"
            )
        return layout

    def wanted_rotations(self, payloads: torch.Tensor) -> int | None:
        """How many transforms the senders want next, payloads (K, nbytes); None if it is fixed."""
        return int((payloads[:, 3] >> 4).max()) if self.rotations == AUTO else None

    @property
    def default_rotations(self) -> int:
        """How many transforms `encode` takes unless it is told."""
        if self.rotations is None or self.rotations == AUTO:
            return self.quantizer.rotations
        return self.rotations

    def _rotation(self, rotations: int | None) -> RandomizedHadamard:
        """The transform of one payload."""
        if self.rotations != AUTO and rotations not in (None, self.rotations):
            raise ValueError(
                f"Codec.encode: rotations={rotations}, but this codec was made with "
                f'rotations={self.rotations}; only rotations="auto" leaves a choice'
            )
        count = self.default_rotations if rotations is None else rotations
        return _transform(count, self.block)

    def _header(
        self, count: int, key: Key, rank: int, world_size: int, first: int, numel: int
    ) -> bytes:
        owner = f", {key.owner}" if key.owner else ""
        place = (
            f"({key.seed}, {key.step}, {key.bucket}, {key.hop}, {rank}, {world_size}, {first}, "
            f"{numel}{owner})"
        )
        check = blake2b(place.encode(), digest_size=4).digest()
        return b"RH" + bytes((WIRE, count)) + check + self.fingerprint

    def _check_headers(
        self,
        key: Key,
        places: list[tuple[int, int]],
        numel: int,
        world_size: int,
        payloads: torch.Tensor,
    ) -> RandomizedHadamard:
        """The transform that payloads, or their headers alone, (K, shards, ...), were made by.

        Each comes from one of `places`, (rank, first).
        """
        headers = _read_headers(payloads)
        chosen = self.rotations == AUTO
        rotations = headers[0][3] % 16
        if not chosen or rotations not in (1, 2, 3):
            rotations = self.default_rotations
        for (rank, first), found in zip(places, headers, strict=True):
            # A wish that no sender has is replaced by one that differs from it.
            count = rotations + (16 * min(max(found[3] >> 4, 1), 3) if chosen else 0)
            wanted = self._header(count, key, rank, world_size, first, numel)
            if found != wanted:
                fact = self._difference(found, wanted) or (
                    f"was made for another key, rank, world size, place or length than {key}, "
                    f"rank={rank}, world_size={world_size}, first={first}, numel={numel}: "
                    "the ranks are out of step"
                )
                raise PayloadError(f"rhtcomm.Codec: the payload of rank {rank} {fact}")
        return _transform(rotations, self.block)

    def _difference(self, found: bytes, wanted: bytes) -> str | None:
        """What is wrong with a header in words, None if it is its check alone."""
        if found[:2] != wanted[:2]:
            return "does not begin with the mark of a payload"
        if found[2] != wanted[2]:
            return f"has format version {found[2]}, this is version {WIRE}; update the older"
        if self.rotations == AUTO and found[3] != wanted[3] and found[8:] == wanted[8:]:
            rotations, wish = found[3] % 16, found[3] >> 4
            if rotations not in (1, 2, 3) or wish not in (1, 2, 3):
                return (
                    f"was rotated {rotations} times and wants {wish} next, but only 1, 2 and 3 can "
                    "be: it is damaged"
                )
            return (
                f"was rotated {rotations} times, another one {wanted[3] % 16} times: the ranks "
                "took different checkpoints, or are out of step"
            )
        if found[3] != wanted[3] or found[8:] != wanted[8:]:
            return f"was made with a configuration other than {self.configuration} (or tables)"
        return None

    @staticmethod
    def _check_out(
        out: torch.Tensor | None,
        x: torch.Tensor,
        shape: tuple[int, ...],
        memory: tuple[int, int],
    ) -> torch.Tensor:
        """`out` or a new one, for an x that was given in this memory."""
        if out is None:
            return torch.empty(shape, dtype=torch.uint8, device=x.device)
        if overlap(memory, memory_of(out, "Codec.encode", "out")):
            raise ValueError("Codec.encode: out overlaps x in memory; give it memory of its own")
        if out.shape != shape or out.dtype != torch.uint8 or out.device != x.device:
            raise ValueError(
                f"Codec.encode: out is {out.dtype} of shape {tuple(out.shape)} on {out.device}, "
                f"but {x.numel()} coordinates take {shape} torch.uint8 on {x.device}"
            )
        unaligned = out.data_ptr() % 4 or out.storage_offset() % 4
        if not out.is_contiguous() or unaligned or out.is_neg():
            raise ValueError(
                "Codec.encode: out must be contiguous and begin at an address that 4 divides; "
                "leave it out, and copy the result"
            )
        return out

    def _check_wanted(self, wanted: int) -> int:
        if self.rotations != AUTO:
            raise ValueError(
                f"Codec.encode: wanted={wanted}, but this codec was made with "
                f'rotations={self.rotations}; only rotations="auto" leaves a choice'
            )
        if wanted not in (1, 2, 3):
            raise ValueError(f"Codec.encode: wanted={wanted} must be 1, 2 or 3")
        return wanted

    def _check_place(
        self, rank: int, world_size: int, first: int, ranks: int = 1
    ) -> tuple[int, int, int]:
        """The place of `ranks` adjacent ones, as plain ints whatever integers were given: headers
        hold a hash of them."""
        try:
            rank, world_size, first = map(operator.index, (rank, world_size, first))
        except TypeError:
            raise TypeError(
                f"Codec: rank={rank!r}, world_size={world_size!r} and first={first!r} must be "
                "integers"
            ) from None
        if not 0 <= rank <= world_size - ranks:
            wrong = rank if rank < 0 else rank + ranks - 1
            raise ValueError(f"Codec: rank={wrong} must lie in [0, world_size={world_size})")
        if world_size > MAX_RANKS:
            raise ValueError(
                f"Codec: world_size={world_size} exceeds the {MAX_RANKS} streams of a key"
            )
        if first % self.block or not 0 <= first < MAX_COORDINATES:
            raise ValueError(
                f"Codec: first={first} must be a multiple of block={self.block} below 2^36"
            )
        return rank, world_size, first


def _plain(x: torch.Tensor, copy: bool = True) -> torch.Tensor:
    """x as kernels take it: without autograd's graph and the negative bit; contiguous if `copy`."""
    if x.requires_grad:  # seldom, and to detach takes longer than all else here
        x = x.detach()
    if x.is_neg():  # the imaginary part of a conjugate
        x = x.resolve_neg()
    return x.contiguous() if copy else x


# What a training step asks for again and again, as it waits for the answer.


@lru_cache(maxsize=1024)
def _layout(codec: Codec, numel: int) -> tuple[Section, ...]:
    if numel < 0:
        raise ValueError(f"Codec: numel={numel} must not be negative")
    quantizer, sections, at = codec.quantizer, [], HEADER_BYTES
    for part in split_into_blocks(numel, codec.block):
        exact = quantizer.exact_bytes(part.size) if isinstance(quantizer, QuicFL) else 0
        middle = at + 4 * part.count
        stop = middle + part.count * (part.size * quantizer.bits // 8 + exact)
        sections.append(Section(part, at, middle, stop))
        at = stop
    return tuple(sections)


def _length(layout: tuple[Section, ...]) -> int:
    return layout[-1].stop if layout else HEADER_BYTES


_transform = lru_cache(maxsize=64, typed=True)(RandomizedHadamard)


def _write_headers(payloads: torch.Tensor, headers: list[bytes]) -> None:
    """Into payloads (n, nbytes), without waiting for their device."""
    rows = np.frombuffer(bytearray().join(headers), np.uint8).reshape(len(headers), HEADER_BYTES)
    if payloads.is_cpu:  # where torch takes several times as long for so few bytes
        payloads.numpy()[:, :HEADER_BYTES] = rows
        return
    source = torch.from_numpy(rows)
    if payloads.device.type == "cuda":  # from other memory a copy makes the host wait
        source = source.pin_memory()
    payloads[:, :HEADER_BYTES].copy_(source, non_blocking=True)


def _read_headers(payloads: torch.Tensor) -> list[bytes]:
    if payloads.is_cpu:
        joined = payloads.numpy()[..., :HEADER_BYTES].tobytes()
    else:
        joined = payloads[..., :HEADER_BYTES].cpu().numpy().tobytes()
    return [joined[at : at + HEADER_BYTES] for at in range(0, len(joined), HEADER_BYTES)]
