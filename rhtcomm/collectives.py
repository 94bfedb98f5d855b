"""All-reduce (mean) of a tensor through compressed payloads.

With P the payload bytes of the whole tensor and e the quantizer's vNMSE, a rank of n sends

    all_gather    (n - 1) P                error of the mean e / n
    two_shot      2 (n - 1) / n P          e / n + e
    gather        P, rank 0 (n - 1) P      e / n + e
    lattice       2 (n - 1) / n P w / b    D^2 / 12 / n, see rhtcomm/lattice.py

all_gather: every rank decodes all n payloads. two_shot: each rank gets all payloads of one shard,
decodes and averages them, encodes the mean again, and gathers the shards of the others. gather:
rank 0 does so with the whole tensor, as a parameter server does. Large tensors go through these in
chunks of whole blocks, one behind the other, so that the link and the codec work at the same time;
a block's randomness depends on its place in the tensor, so chunks change no bit of the result.

Over a `HierarchicalCommunicator` the ranks of a node first share out the sum of their tensors in
full precision; each takes its shard to its like in the other nodes by one of the above (n counts
nodes then), and the node puts the shards together again.

Error feedback (Seide et al., INTERSPEECH 2014; Karimireddy et al., ICML 2019) adds to x_t, what a
rank has at step t, the residual r_t of what it could not send before:

    sent = decode(encode(x_t + r_t)),    r_(t+1) = x_t + r_t - sent,    r_0 = 0,

so that over any number of steps the results and the mean residual add up to the exact means. What
an owner of a shard (two_shot; gather: rank 0) loses when it encodes the mean of n ranks again goes
n times into its own residual, which counts as one n-th. What the mean loses as it is rounded to
bfloat16 or float16 is the same on all ranks, and goes into the residual of each.

Segments (whole parameters) that are zero on all ranks come back as zeros, see
rhtcomm/segments.py: a bit for each goes along with the first chunk. With error feedback this looks
at x_t, and such a segment keeps its residual: otherwise a layer that is not used any more would be
moved by what is left.
"""

import contextlib
import hashlib
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from rhtcomm.codec import AUTO, DTYPES, Codec, PayloadError, _deferred
from rhtcomm.communicator import Communicator, HierarchicalCommunicator, users
from rhtcomm.floating_point import GRAIN, assign_, default_mode
from rhtcomm.lattice import Lattice
from rhtcomm.memory import memory_of
from rhtcomm.randomness import Key
from rhtcomm.segments import Segments, merge_, pack, unpack

__all__ = ["Algorithm", "DisagreementError", "all_reduce", "check_agreement", "check_algorithm"]

Algorithm = Literal["auto", "all_gather", "two_shot", "gather"]
Stopwatch = Callable[[str], AbstractContextManager[object]]

_Finish = Callable[[], Any]
# How a chunk travels: yields an exchange with what to send by it, is sent what came of it.
_Course = Generator[tuple[Callable[[torch.Tensor], _Finish], torch.Tensor], Any, int | None]

# What a rank may send beside for one round trip rather than two. By measurement: at 1 Gbit/s, 2 ms.
_EXTRA_BYTES = 1 << 18
# Of what ranks tell each other of their configuration first of all, in every version.
_FACTS_BYTES, _NAME = 4096, "name of the rank"
# Coordinates of a chunk's shard (of the chunk, where all_gather has none): a third of the tensor's,
# within these limits. By measurement, see benchmarks/README.md: more chunks cost more messages.
_FEWEST, _MOST = 1 << 18, 3 << 18
# Of two levels, in front of what a rank gives back to its node: this, plus _FAILED, plus how many
# rotations it wants, as an int32.
_SHARE, _SHARE_BYTES, _FAILED = 0x52480000, 4, 1 << 8


class DisagreementError(RuntimeError):
    """The ranks were not configured alike."""


def all_reduce(
    tensor: torch.Tensor,
    codec: Codec | Lattice,
    key: Key,
    communicator: Communicator | HierarchicalCommunicator,
    *,
    algorithm: Algorithm = "auto",
    min_numel: int = 1 << 14,
    rotations: int | None = None,
    segments: Sequence[int] | None = None,
    check: bool = True,
    residual: torch.Tensor | None = None,
    settle: bool = True,
    user: object = None,
    stopwatch: Stopwatch = lambda _: contextlib.nullcontext(),
) -> int | None:
    """Replace `tensor` by its mean over all ranks, in place; every rank gets the same bits.

    Args:
        tensor: float32, bfloat16 or float16, any shape, contiguous or not, alike on all ranks.
        codec: how to compress. A `Lattice` has a way of its own to travel: one integer all-reduce.
        key: the same on all ranks, and another one for each call: new randomness is what makes
            the errors of successive calls average out.
        communicator: who takes part.
        algorithm: "all_gather", "two_shot", "gather" (to rank 0 and back), or "auto": all_gather
            where it sends at most 256 KiB more than two_shot (as with two ranks), else two_shot.
            "auto" is the only one for a `Lattice`.
        min_numel: smaller tensors travel uncompressed, as float32.
        rotations: where the codec's are "auto", how many to take this time, the same on all ranks:
            what the last call for such a tensor returned, or None for the safe number.
        segments: lengths of the parameters that make up the flattened tensor, the same on all
            ranks; by default it is one. A segment that is zero on all ranks (0.0 or -0.0) comes
            back as 0.0 throughout, even where its neighbours are not finite (below `min_numel` as
            -0.0, if it is on all ranks); with `residual`, what is left of it stays as it is. Zeros
            of other segments are coded as other numbers are.
        check: compare the configuration of all ranks first, at the price of one small exchange.
            The DDP hook does that once, not for each bucket.
        residual: float32 of the tensor's shape and device, zeros before the first step: error
            feedback. It is added to the tensor and replaced by what this rank leaves unsent. Where
            any number of the result is not finite, all of it stays as it was: a gradient scaler
            then skips the step. One bit needs a quantizer with biased=True.
        settle: return only when the other ranks have what this one sent, so that it may leave. The
            DDP hook uses the result first; see `Communicator.settle`.
        user: on whose behalf the communicator is used, by default the calling thread's. Two users
            must not send by one process group at once.
        stopwatch: called with "encode", "exchange" and "decode"; gives a context for that part.

    Returns:
        Where the codec's rotations are "auto", how many do for tensors like this one: the most that
        any rank found its own to need. It came with the payloads; where nothing was compressed,
        `rotations` as given. Else None.

    Raises:
        TypeError: the tensor has another dtype (float64 and integers are never rounded silently)
            or no memory of its own (as a DTensor has none), the codec is a bare quantizer, the
            communicator a process group or another thing that is none, or the key no `Key`.
        ValueError: the algorithm is unknown, or asked for with a `Lattice`; the rotations are not
            those of a codec or `Lattice` that has a fixed number; the segments are not as long as
            the tensor; elements of the tensor share memory; or the residual has another shape,
            dtype or device, or the codec cannot have one.
        DisagreementError: on all ranks, naming the fields in which they differ.
        RuntimeError: another user is sending by the communicator's process group.
        PayloadError: a payload that arrived is not what was expected. On two levels all ranks of
            a node raise it if one does. Ranks that received others may return the mean, so the run
            must not go on after this error; the DDP hook calls the communicator's `abort` then.
    """
    if not isinstance(codec, (Codec, Lattice)):
        raise TypeError(
            f"rhtcomm.all_reduce: codec={codec!r} must be a Codec, such as Codec(QuicFL(bits=4)), "
            "or a Lattice"
        )
    if isinstance(communicator, dist.ProcessGroup):
        raise TypeError(
            "rhtcomm.all_reduce: the communicator is a process group; give "
            "rhtcomm.TorchCommunicator(group)"
        )
    if isinstance(communicator, type) or not hasattr(communicator, "all_reduce_"):
        raise TypeError(
            f"rhtcomm.all_reduce: communicator={communicator!r} must be an object such as "
            "rhtcomm.TorchCommunicator()"
        )
    if not isinstance(key, Key):
        raise TypeError(f"rhtcomm.all_reduce: key={key!r} must be a rhtcomm.Key, such as Key(seed)")
    memory_of(tensor, "rhtcomm.all_reduce", "tensor")
    if residual is not None:
        memory_of(residual, "rhtcomm.all_reduce", "residual")
    user = threading.current_thread() if user is None else user
    # What kernels compute is safe from the mode of torch's threads; here torch itself computes.
    torchs = residual is not None or isinstance(communicator, HierarchicalCommunicator)
    pool = torchs and tensor.numel() > GRAIN
    with users.using(communicator, user), default_mode(pool=pool):
        return _all_reduce(
            *(tensor, codec, key, communicator, algorithm, min_numel, rotations, segments),
            *(check, residual, settle, stopwatch),
        )


def _all_reduce(
    tensor: torch.Tensor,
    codec: Codec | Lattice,
    key: Key,
    communicator: Communicator | HierarchicalCommunicator,
    algorithm: Algorithm,
    min_numel: int,
    rotations: int | None,
    segments: Sequence[int] | None,
    check: bool,
    residual: torch.Tensor | None,
    settle: bool,
    stopwatch: Stopwatch,
) -> int | None:
    """`all_reduce` on behalf of a user who has the communicator."""
    if check:
        facts = {
            **codec.configuration,
            "algorithm": algorithm,
            "min_numel": min_numel,
            "dtype": tensor.dtype,
            "shape": tuple(tensor.shape),
            "key": key,
            "rotations now": rotations,
            "segments": list(segments) if isinstance(segments, Sequence) else segments,
            "residual": residual
            if residual is None
            else (residual.dtype, tuple(residual.shape), residual.device.type),
        }
        check_agreement(communicator, facts, tensor.device)
    check_algorithm(algorithm, codec)
    if isinstance(codec, Lattice) and rotations not in (None, codec.rotations):
        raise ValueError(
            f"rhtcomm.all_reduce: rotations={rotations}, but this Lattice was made with "
            f"rotations={codec.rotations}; leave them out here"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"rhtcomm.all_reduce: the tensor is {tensor.dtype}, but only float32, bfloat16 and "
            "float16 can be reduced; convert it, or reduce it with torch.distributed"
        )
    for name, x in (("tensor", tensor), ("residual", residual)):
        if x is not None and any(
            step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)
        ):
            raise ValueError(
                f"rhtcomm.all_reduce: the {name} was expanded to its shape {tuple(x.shape)}, so "
                f"its elements share memory; give what it was before, or {name}.clone()"
            )
    if residual is not None:
        check_error_feedback(codec)
        _check_residual(residual, tensor)
    elif communicator.world_size == 1:
        return rotations
    if tensor.numel() == 0:
        return rotations
    flat = tensor.detach().resolve_neg().contiguous().view(-1)
    parts = Segments(segments, flat.numel())
    exact = flat.numel() < min_numel or communicator.world_size == 1
    # A tensor that is one segment, of zeros, makes blocks of zeros, unless a residual is added.
    told = residual is not None or (not exact and len(parts) > 1)
    used = flat.new_empty(0, dtype=torch.uint8)
    if told:
        with stopwatch("encode"):
            used = parts.used(flat)
    left = None
    if residual is not None:
        flat = flat.float() + residual.reshape(-1)
        left = torch.zeros_like(flat)
    try:
        if exact:
            _uncompressed(flat, used, communicator, stopwatch)
        elif isinstance(communicator, HierarchicalCommunicator):
            rotations = _hierarchical(
                flat, used, codec, key, communicator, algorithm, rotations, stopwatch, left
            )
        else:
            rotations = _compressed(
                flat, used, codec, key, communicator, algorithm, rotations, stopwatch, left=left
            )
    except PayloadError as error:  # which comes after all exchanges
        communicator.settle(wait=settle)
        error.args = (f"{error}{_ranks_in_world(communicator)}",)
        raise
    if told or not exact:
        with stopwatch("decode"):
            # Where nobody was told, the mean itself shows it; blocks of zeros may decode to -0.0.
            parts.restore_(flat, used if told else parts.used(flat))
    with stopwatch("exchange"):
        communicator.settle(wait=settle)
    if flat.data_ptr() != tensor.data_ptr():
        assign_(tensor.detach(), flat.view(tensor.shape))
    if residual is not None and left is not None:
        # A gradient scaler skips a step that is not finite, so nothing of it may stay.
        left += flat - tensor.detach().float().reshape(-1)  # the rounding to the tensor's dtype
        parts.restore_(left, used, residual.reshape(-1))
        usable = tensor.detach().isfinite().all()
        residual.copy_(torch.where(usable, left.view(tensor.shape), residual))
    return rotations


def check_error_feedback(codec: Codec | Lattice) -> None:
    """Raise ValueError unless residuals of the codec stay bounded."""
    if isinstance(codec, Lattice):
        raise ValueError(
            "rhtcomm: error feedback needs to know what a rank's own codes say, and those of a "
            "Lattice are clear only in the sum; take another quantizer, such as Eden"
        )
    # Two hops of vNMSE e leave e + e (1 + e), which at one bit exceeds 1 but for the biased scale.
    if codec.quantizer.bits == 1 and not getattr(codec.quantizer, "biased", False):
        raise ValueError(
            f"rhtcomm: error feedback with {codec.quantizer} can diverge, as one bit with an "
            "unbiased scale may leave more unsent than there was; take 2 bits, or "
            "Eden(1, biased=True) (hook: quantizer='eden')"
        )


def _check_residual(residual: torch.Tensor, tensor: torch.Tensor) -> None:
    fits = residual.shape == tensor.shape and residual.device == tensor.device
    if not fits or residual.dtype != torch.float32:
        raise ValueError(
            f"rhtcomm.all_reduce: the residual is {residual.dtype} of shape "
            f"{tuple(residual.shape)} on {residual.device}, for a tensor of shape "
            f"{tuple(tensor.shape)} on {tensor.device}; make it by "
            "torch.zeros_like(tensor, dtype=torch.float32)"
        )


def check_algorithm(algorithm: str, codec: Codec | Lattice) -> None:
    """Raise ValueError unless the algorithm is one of `Algorithm` and does for the codec."""
    if algorithm not in get_args(Algorithm):
        raise ValueError(
            f"rhtcomm: algorithm={algorithm!r} must be one of {', '.join(get_args(Algorithm))}"
        )
    if isinstance(codec, Lattice) and algorithm != "auto":
        raise ValueError(
            f"rhtcomm: algorithm={algorithm!r} is for payloads, and a Lattice has none: its "
            'codes are added on the way; leave the algorithm at "auto"'
        )


def choose_algorithm(
    algorithm: Algorithm, world_size: int, payload_bytes: int
) -> Literal["all_gather", "two_shot", "gather"]:
    """What "auto" stands for: fewest bytes, unless round trips cost more than they save."""
    if algorithm != "auto":
        return algorithm
    # (n - 1) P against 2 (n - 1) / n P
    extra_bytes = (world_size - 1) * (world_size - 2) * payload_bytes // world_size
    return "all_gather" if extra_bytes <= _EXTRA_BYTES else "two_shot"


def check_agreement(
    communicator: Communicator | HierarchicalCommunicator,
    facts: dict[str, object],
    device: torch.device,
) -> None:
    """Raise on every rank if `facts` are not the same on all of them.

    One exchange of a fixed length, so it works whatever the facts are.

    Raises:
        DisagreementError: naming the fields that differ, and their values by rank; or a rank that
            sent something else.
    """
    greeting = {name: _shown(value) for name, value in facts.items()}
    greeting[_NAME] = communicator.name_of(communicator.rank)
    text = json.dumps(greeting).encode()
    assert len(text) <= _FACTS_BYTES
    row = torch.frombuffer(bytearray(text.ljust(_FACTS_BYTES)), dtype=torch.uint8).to(device)
    by_rank = [
        _read_greeting(bytes(other), communicator.name_of(rank))
        for rank, other in enumerate(communicator.all_gather(row).tolist())
    ]
    names = [other.pop(_NAME) for other in by_rank]
    differing = []
    for name in dict.fromkeys(name for other in by_rank for name in other):
        ranks_of: dict[str, list[int]] = {}
        for rank, other in enumerate(by_rank):
            ranks_of.setdefault(other.get(name, "absent"), []).append(rank)
        if len(ranks_of) > 1:
            values = "; ".join(
                f"{value} on {_abridged([names[rank] for rank in ranks])}"
                for value, ranks in ranks_of.items()
            )
            differing.append(f"{name} ({values})")
    if differing:
        raise DisagreementError(
            f"rhtcomm: the ranks are configured differently in {', '.join(differing)}; "
            "give all ranks the same arguments"
        )


def _shown(value: object) -> str:
    """At most 80 characters, the last ones a digest where there were more."""
    text = str(value)
    if len(text) <= 80:
        return text
    return f"{text[:67]}... {hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _read_greeting(row: bytes, name: str) -> dict[str, str]:
    try:
        greeting = json.loads(row)
        if not isinstance(greeting, dict) or not isinstance(greeting.get(_NAME), str):
            raise ValueError("it lacks a name")
    except ValueError as error:
        raise DisagreementError(
            f"rhtcomm: {name} did not send its configuration ({error}): it runs another version of "
            "rhtcomm, or something else sends by this process group; start all ranks with one "
            "program and version"
        ) from error
    return greeting


def _abridged(names: list[str]) -> str:
    """Names such as "rank 1", or "rank 1 (rank 3 of the world)"."""
    shown = names[:8]
    if len(names) > 1 and all(name.removeprefix("rank ").isdigit() for name in shown):
        text = "ranks " + ", ".join(name.removeprefix("rank ") for name in shown)
    else:
        text = ", ".join(shown)
    return text if len(names) <= 8 else f"{text} and {len(names) - 8} more"


def _ranks_in_world(communicator: Communicator | HierarchicalCommunicator) -> str:
    """What errors that name the ranks of a group's payloads say of its ranks in the world."""
    if isinstance(communicator, HierarchicalCommunicator):
        communicator = communicator.between
    names = [communicator.name_of(rank) for rank in range(min(64, communicator.world_size))]
    differing = [name for name in names if "(" in name]
    return f"; in this group {', '.join(differing)}" if differing else ""


def _uncompressed(
    flat: torch.Tensor,
    used: torch.Tensor,
    communicator: Communicator | HierarchicalCommunicator,
    stopwatch: Stopwatch,
) -> None:
    with stopwatch("exchange"), default_mode(pool=flat.numel() > GRAIN):
        total = flat.float() if flat.dtype != torch.float32 else flat
        if used.numel():
            total = torch.cat([total, unpack(used).float()])
        communicator.all_reduce_(total)
        assign_(flat, total[: flat.numel()] / communicator.world_size)
        if used.numel():
            used.copy_(pack(total[flat.numel() :] != 0))


def _hierarchical(
    flat: torch.Tensor,
    used: torch.Tensor,
    codec: Codec | Lattice,
    key: Key,
    communicator: HierarchicalCommunicator,
    algorithm: Algorithm,
    rotations: int | None,
    stopwatch: Stopwatch,
    left: torch.Tensor | None,
) -> int | None:
    communicator.check_nodes(flat.device)
    within, between = communicator.within, communicator.between
    shards = split_into_shards(flat.numel(), codec.block, within.world_size)
    sizes = [shard.stop - shard.start for shard in shards]
    # What is used of all segments goes along with each shard, in front of it.
    beside, nbytes = used.numel(), max(sizes) * flat.element_size()
    with stopwatch("exchange"):
        outgoing = flat.new_zeros(within.world_size, beside + nbytes, dtype=torch.uint8)
        outgoing[:, :beside] = used
        values = outgoing[:, beside:].view(flat.dtype)
        for row, shard, size in zip(values, shards, sizes, strict=True):
            row[:size] = flat[shard]
        incoming = within.start_all_to_all(outgoing)()
    merge_(used, incoming[:, :beside])
    mine = torch.zeros(max(sizes), dtype=torch.float32, device=flat.device)
    for row in incoming[:, beside:].view(flat.dtype):  # in the order of ranks
        mine += row
    mine /= within.world_size
    shard, size = shards[within.rank], sizes[within.rank]
    header, failure = _SHARE, None
    if between.world_size > 1 and size:
        unsent = None if left is None else left[shard]
        try:
            wanted = _compressed(
                *(mine[:size], used, codec, key, between, algorithm, rotations, stopwatch),
                *(shard.start, unsent),
            )
            header += wanted or 0
        except PayloadError as error:  # the node's other ranks still wait for this shard
            failure, header = error, _SHARE + _FAILED
            # Where they look at headers later, no number of it may pass for a mean until then.
            mine.fill_(math.nan)
            used.fill_(255)
        if unsent is not None:
            unsent *= within.world_size  # of the node's mean, in which this rank is one of many
    start = _SHARE_BYTES + beside
    row = flat.new_empty(start + nbytes, dtype=torch.uint8)
    row[:_SHARE_BYTES].view(torch.int32).fill_(header)
    row[_SHARE_BYTES:start] = used
    assign_(row[start:].view(flat.dtype), mine)
    try:
        with stopwatch("exchange"):
            gathered = within.start_all_gather(row)()
    except RuntimeError as lost:  # who heard of the failure may have left by now
        raise failure or lost from None
    # Ranks without a shard have not heard of other nodes.
    merge_(used, gathered[:, _SHARE_BYTES:start])
    for row, shard, size in zip(gathered[:, start:].view(flat.dtype), shards, sizes, strict=True):
        flat[shard] = row[:size]
    if failure is not None:
        raise failure
    headers = gathered[:, :_SHARE_BYTES].flatten()
    later = _deferred.get()
    if later and flat.device.type in later.devices and codec.rotations != AUTO:
        later.add(headers, partial(_check_shares, key=key))
        return None
    # Each place saw its own shard alone.
    return _check_shares(headers, key) or None


def _check_shares(headers: torch.Tensor, key: Key) -> int:
    """The most rotations that any rank of a node wants, headers (n _SHARE_BYTES,) uint8.

    Raises:
        PayloadError: naming a rank of the node that has no share to give.
    """
    most = 0
    for rank, header in enumerate(headers.view(torch.int32).tolist()):
        if header & ~0xFFFF != _SHARE:
            raise PayloadError(
                f"rhtcomm.all_reduce: what came from rank {rank} of this node for {key} does not "
                "begin with the mark of a share: the ranks are out of step, or others use the group"
            )
        if header & _FAILED:
            raise PayloadError(
                "rhtcomm.all_reduce: another rank of this node could not decode its share for "
                f"{key}: rank {rank} of the node; its own error says more"
            )
        most = max(most, header & 0xFF)
    return most


def _compressed(
    flat: torch.Tensor,
    used: torch.Tensor,
    codec: Codec | Lattice,
    key: Key,
    communicator: Communicator,
    algorithm: Algorithm,
    rotations: int | None,
    stopwatch: Stopwatch,
    first: int = 0,
    left: torch.Tensor | None = None,
) -> int | None:
    """The mean of a flat tensor that begins at coordinate `first` of its bucket, in place.

    `left`, of the same length, becomes what error feedback has to send later; both are float32.
    `used`, what this rank uses of the segments, becomes what any rank does. It may be empty.
    """
    if isinstance(codec, Lattice):
        _lattice(flat, used, codec, key, communicator, stopwatch, first)
        return None
    chosen = choose_algorithm(algorithm, communicator.world_size, codec.nbytes(flat.numel()))
    course = {"all_gather": _all_gather, "two_shot": _two_shot, "gather": _gather}[chosen]
    whole = _Part(flat, codec, key, communicator, rotations, stopwatch, first, left)
    shards = communicator.world_size if chosen == "two_shot" else 1
    chunks = split_into_chunks(flat.numel(), codec.block, shards)
    nothing = used[:0]
    courses = [course(whole[chunk], nothing if i else used) for i, chunk in enumerate(chunks)]
    return _pipeline(courses, stopwatch)


def _pipeline(courses: list[_Course], stopwatch: Stopwatch) -> int | None:
    """Take chunks through their courses, each in turn up to its next exchange.

    So a chunk travels while others are encoded or decoded. The turns depend on nothing but the
    number of chunks: every rank makes the same exchanges in the same order.
    """

    def advance(course: _Course, arrived: torch.Tensor | None) -> _Finish:
        start, x = course.send(arrived)
        with stopwatch("exchange"):
            return start(x)

    under_way = deque((course, advance(course, None)) for course in courses)
    wanted: list[int | None] = []
    failure = None
    while under_way:
        course, finish = under_way.popleft()
        with stopwatch("exchange"):
            arrived = finish()
        try:
            under_way.append((course, advance(course, arrived)))
        except StopIteration as end:
            wanted.append(end.value)
        except PayloadError as error:  # the other ranks still wait for the other chunks
            failure = failure or error
    if failure is not None:
        raise failure
    return _most(wanted)


def _most(wanted: list[int | None]) -> int | None:
    """The largest number of rotations that anyone wants; None where it is fixed."""
    return max((count for count in wanted if count is not None), default=None)


@dataclass(slots=True)
class _Part:
    """Some coordinates of a bucket, and how they travel."""

    flat: torch.Tensor
    codec: Codec
    key: Key
    communicator: Communicator
    rotations: int | None
    stopwatch: Stopwatch
    first: int
    left: torch.Tensor | None

    def __getitem__(self, run: slice) -> "_Part":
        return _Part(  # in every bucket, and `replace` is slow
            self.flat[run],
            self.codec,
            self.key,
            self.communicator,
            self.rotations,
            self.stopwatch,
            self.first + run.start,
            None if self.left is None else self.left[run],
        )

    @property
    def nbytes(self) -> int:
        return self.codec.nbytes(self.flat.numel())

    def encode(self, out: torch.Tensor, shards: int | None = None) -> None:
        """This rank's payload or payloads go to `out`; `left` becomes flat - what they say."""
        rank, world_size = self.communicator.rank, self.communicator.world_size
        with self.stopwatch("encode"):
            self.codec.encode(
                self.flat,
                self.key,
                rank,
                world_size,
                first=self.first,
                rotations=self.rotations,
                shards=shards,
                out=out,
            )
            if self.left is not None:
                self.codec.decode_shards(
                    out.view(shards or 1, -1),
                    self.key,
                    self.flat.numel(),
                    first=self.first,
                    out=self.left,
                    rank=rank,
                    world_size=world_size,
                )
                torch.sub(self.flat, self.left, out=self.left)

    def message(self, used: torch.Tensor) -> torch.Tensor:
        """This rank's payload, and `used` behind it."""
        message = self.flat.new_empty(self.nbytes + used.numel(), dtype=torch.uint8)
        self.encode(message[: self.nbytes])
        message[self.nbytes :] = used
        return message

    def decode(self, payloads: torch.Tensor) -> int | None:
        """The mean of all ranks' payloads goes to `flat`."""
        with self.stopwatch("decode"):
            self.codec.decode_mean(
                payloads, self.key, self.flat.numel(), first=self.first, out=self.flat
            )
        return self.codec.wanted_rotations(payloads)

    def encode_mean(self, payloads: torch.Tensor, out: torch.Tensor) -> torch.Tensor | PayloadError:
        """The mean of all ranks' payloads, returned, and a payload of it, written to `out`.

        Or what is wrong with them; `out` is zeros then, as the other ranks wait for something.
        """
        try:
            with self.stopwatch("decode"):
                mean = self.codec.decode_mean(
                    payloads, self.key, self.flat.numel(), first=self.first
                )
        except PayloadError as error:
            out.zero_()
            return error
        with self.stopwatch("encode"):
            self.codec.encode(
                mean,
                self.key.next_hop(),
                first=self.first,
                rotations=self.rotations,
                wanted=self.codec.wanted_rotations(payloads),
                out=out,
            )
        return mean

    def decode_again(self, payloads: torch.Tensor, owner: int) -> int | None:
        """What `owner` and those after it encoded by `encode_mean` goes to `flat`."""
        try:
            with self.stopwatch("decode"):
                self.codec.decode_shards(
                    *(payloads, self.key.next_hop(), self.flat.numel()),
                    first=self.first,
                    out=self.flat,
                )
        except PayloadError:
            for rank, payload in enumerate(payloads, owner):
                if not payload.any():
                    raise PayloadError(
                        f"rhtcomm.all_reduce: rank {rank} could not decode what the ranks sent it "
                        f"for {self.key}: they are out of step or configured differently; its own "
                        "error says more"
                    ) from None
            raise
        return self.codec.wanted_rotations(payloads)

    def keep(self, mean: torch.Tensor) -> None:
        """What encoding the mean of n ranks again has lost, n times, goes to `left` too."""
        if self.left is not None:
            self.left.add_(mean - self.flat, alpha=self.communicator.world_size)


# What the ranks use of the bucket's segments goes behind payloads of the first chunk, in messages
# that come to all ranks.


def _all_gather(part: _Part, used: torch.Tensor) -> _Course:
    nbytes, message = part.nbytes, part.message(used)
    messages = yield part.communicator.start_all_gather, message
    merge_(used, messages[:, nbytes:])
    return part.decode(messages[:, :nbytes])


def _gather(part: _Part, used: torch.Tensor) -> _Course:
    nbytes, message = part.nbytes, part.message(used)
    messages = yield part.communicator.start_gather, message
    mean = None
    if messages is not None:
        mean = part.encode_mean(messages[:, :nbytes], out=message[:nbytes])
        merge_(message[nbytes:], messages[:, nbytes:])
    yield part.communicator.start_broadcast, message
    if isinstance(mean, PayloadError):
        raise mean
    used.copy_(message[nbytes:])
    wanted = part.decode_again(message[None, :nbytes], owner=0)
    if mean is not None:
        part.keep(mean)
    return wanted


def _two_shot(part: _Part, used: torch.Tensor) -> _Course:
    rank, world_size = part.communicator.rank, part.communicator.world_size
    runs = split_into_shards(part.flat.numel(), part.codec.block, world_size)
    mine, width = part[runs[rank]], part[runs[0]].nbytes
    # The codec takes all shards that are as long as the first one in one call. Their owners, their
    # coordinates, and the bytes of each of them:
    alike = sum(run.stop - run.start == runs[0].stop for run in runs)
    calls = [(slice(0, alike), part[0 : runs[alike - 1].stop], width)]
    for owner in range(alike, world_size):
        shard = part[runs[owner]]
        calls.append((slice(owner, owner + 1), shard, shard.nbytes))

    outgoing = part.flat.new_empty(world_size, width, dtype=torch.uint8)
    for owners, shards, nbytes in calls:
        shards.encode(outgoing[owners, :nbytes], owners.stop - owners.start)
    incoming = yield part.communicator.start_all_to_all, outgoing
    again = part.flat.new_empty(width + used.numel(), dtype=torch.uint8)
    mean = mine.encode_mean(incoming[:, : mine.nbytes], out=again[: mine.nbytes])
    again[width:] = used
    gathered = yield part.communicator.start_all_gather, again
    if isinstance(mean, PayloadError):
        raise mean
    merge_(used, gathered[:, width:])
    wanted = [
        shards.decode_again(gathered[owners, :nbytes], owners.start)
        for owners, shards, nbytes in calls
    ]
    mine.keep(mean)
    return _most(wanted)


def _lattice(
    flat: torch.Tensor,
    used: torch.Tensor,
    lattice: Lattice,
    key: Key,
    communicator: Communicator,
    stopwatch: Stopwatch,
    first: int,
) -> None:
    rank, world_size = communicator.rank, communicator.world_size
    parts = lattice.blocks(flat.numel())
    places = [part.shifted(first) for part in parts]
    with stopwatch("encode"):
        rotated = [
            lattice.rotate(flat[part.start : part.stop], key, place)
            for part, place in zip(parts, places, strict=True)
        ]
        # Words of codes have no header: what the ranks must have in common goes along as +h and -h.
        common = repr((lattice, key, first, flat.numel())).encode()
        digest = hashlib.blake2b(common, digest_size=6).digest()
        mark = int.from_bytes(digest, "little")  # below 2^53, so that float64 holds it
        ends = torch.tensor([mark, -mark], dtype=torch.float64, device=flat.device)
        bound = torch.cat([*(y.abs().amax(dim=1) for y in rotated), ends, unpack(used).double()])
    with stopwatch("exchange"):
        communicator.all_reduce_(bound, "max")
    *bounds, ends, flags = bound.split([*(part.count for part in parts), 2, 8 * used.numel()])
    if ends[0] != -ends[1]:
        raise PayloadError(
            f"rhtcomm.all_reduce: another rank has codes that cannot be added to those for {key}: "
            "the ranks are out of step or configured differently"
        )
    used.copy_(pack(flags != 0))
    with stopwatch("encode"):
        codes = [
            lattice.codes(y, of_blocks, key, place.start, rank, world_size).flatten()
            for y, of_blocks, place in zip(rotated, bounds, places, strict=True)
        ]
        words = lattice.pack(torch.cat(codes), world_size)
    with stopwatch("exchange"):
        communicator.all_reduce_(words)
    with stopwatch("decode"):
        sizes = [part.count * part.size for part in parts]
        totals = lattice.unpack(words, sum(sizes), world_size).split(sizes)
        for total, of_blocks, part, place in zip(totals, bounds, parts, places, strict=True):
            rows = total.view(part.count, part.size)
            mean = lattice.mean(rows, of_blocks, key, place, world_size).flatten()
            target = flat[part.start : part.stop]
            assign_(target, mean[: target.numel()])


def split_into_chunks(numel: int, block: int, shards: int) -> list[slice]:
    """Runs that travel one behind the other, as even as whole blocks for each shard allow."""
    count = max(min(numel // (shards * _FEWEST), 3), -(-numel // (shards * _MOST)), 1)
    step = max(1, -(-numel // (count * shards * block))) * shards * block
    return [slice(start, min(numel, start + step)) for start in range(0, numel, step)]


def split_into_shards(numel: int, block: int, world_size: int) -> list[slice]:
    """One run of whole blocks for each rank, all equal but for the last ones: they get the rest."""
    run = -(-numel // (block * world_size)) * block
    full = [slice(start, min(numel, start + run)) for start in range(0, numel, run or 1)]
    return full + [slice(0, 0)] * (world_size - len(full))
