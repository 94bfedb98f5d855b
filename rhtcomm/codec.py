"""Tensors <-> payloads: the public calls, which check all arguments. The hot path is in `coder`."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch

from rhtcomm.arguments import check_type, integer
from rhtcomm.coder import Coder
from rhtcomm.kernels import DTYPES, Kernel, Task, kernel_for
from rhtcomm.memory import memory_of, overlap, plain, refuse_fake_mode
from rhtcomm.quantizers import Quantizer
from rhtcomm.randomness import MAX_COORDINATES, MAX_RANKS, Key
from rhtcomm.rotation import RandomizedHadamard
from rhtcomm.versions import VERSIONS
from rhtcomm.wire import Headers, PayloadError, Section, facts_of, fingerprint_of, layout, length_of

__all__ = ["AUTO", "DTYPES", "Codec", "Coder"]

AUTO: Literal["auto"] = "auto"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Codec:
    """Compresses flat tensors: x (numel,) -> payload (nbytes,) uint8 -> E[decoded] = x.

    It is immutable and stateless, so one may serve many threads.

    Args:
        quantizer: `QuicFL`, `ECDQ`, `Eden` or `VectorQuantizer`.
        rotations: number of randomized Hadamard transforms, 1 to 3, or "auto"; by default the
            quantizer's number, which suffices for every input. With "auto" `encode` uses that
            number unless told otherwise, and each payload carries the number that its own tensor
            needs (see `choose_rotations`); `wanted_rotations` reads it.
        block: coordinates per block, a power of two from 32 to 2^24.

    Raises:
        TypeError: quantizer is not a quantizer.
        ValueError: an argument is out of its range.
    """

    quantizer: Quantizer
    rotations: int | Literal["auto"] | None = None
    block: int = 4096

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, type) or not hasattr(self.quantizer, "group"):
            raise TypeError(
                f"Codec: quantizer={self.quantizer!r} must be a quantizer such as QuicFL(bits=4)"
            )
        if self.rotations is None:
            object.__setattr__(self, "rotations", self.quantizer.rotations)
        if isinstance(self.rotations, str) and self.rotations != AUTO:
            raise ValueError(f'Codec: rotations={self.rotations!r} must be 1, 2, 3 or "auto"')
        RandomizedHadamard(self.default_rotations, self.block)  # checks the arguments

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.quantizer, self.rotations, self.block)  # without cached values

    @property
    def configuration(self) -> dict[str, object]:
        """What two ranks must have in common to decode each other's payloads, by name."""
        return {**VERSIONS, **facts_of(self.quantizer, self.rotations, self.block)}

    @cached_property
    def fingerprint(self) -> bytes:
        """8 bytes that differ between configurations, and between tables of levels."""
        return fingerprint_of(self.quantizer, self.rotations, self.block)

    def layout(self, numel: int) -> tuple[Section, ...]:
        """The sections of the payload of `numel` coordinates, see `rhtcomm.wire.Section`.

        Raises:
            TypeError: numel is not an integer.
            ValueError: numel is negative.
        """
        numel = operator.index(numel)
        if numel < 0:
            raise ValueError(f"Codec: numel={numel} must not be negative")
        return layout(self.quantizer, self.block, numel)

    def nbytes(self, numel: int) -> int:
        """Length of the payload of `numel` coordinates, in bytes.

        Raises:
            TypeError: numel is not an integer.
            ValueError: numel is negative.
        """
        return length_of(self.layout(numel))

    def task(self, numel: int, shards: int = 1, rotations: int | None = None) -> Task:
        """The kernels' description of tensors of `numel` coordinates, in equal shards."""
        rotation = RandomizedHadamard(rotations or self.default_rotations, self.block)
        each = numel // shards
        return Task(rotation, self.quantizer, self.layout(each), each, shards)

    def coder(self, numel: int, shards: int = 1, device: torch.device = CPU) -> Coder:
        """The cached coder for tensors of `numel` coordinates, in equal shards, on a device.

        Raises:
            TypeError: numel or shards is not an integer.
            ValueError: numel is negative, or cannot be split into `shards` shards of whole blocks.
        """
        return self._coders(numel, shards, kernel_for(device, self.quantizer))

    @cached_property
    def _coders(self) -> Callable[..., Coder]:
        return lru_cache(maxsize=256)(self._make_coder)

    def _make_coder(self, numel: int, shards: int, kernel: Kernel) -> Coder:
        numel, shards = operator.index(numel), operator.index(shards)
        self._check_shards(numel, shards, "Codec.coder")
        counts = (1, 2, 3) if self._auto else (self.default_rotations,)
        tasks = {count: self.task(numel, shards, count) for count in counts}
        return Coder(tasks, kernel, self._headers)

    @cached_property
    def _headers(self) -> Headers:
        return Headers(self.fingerprint, self.configuration, self.default_rotations, self._auto)

    @property
    def _auto(self) -> bool:
        return self.rotations == AUTO

    @property
    def default_rotations(self) -> int:
        """The number of rotations that `encode` uses unless told otherwise."""
        if self.rotations is None or self.rotations == AUTO:
            return self.quantizer.rotations
        return self.rotations

    def wanted_rotations(self, payloads: torch.Tensor) -> int | None:
        """The number of rotations that the senders want next, payloads (K, nbytes); None if it is
        fixed."""
        return int((payloads[:, 3] >> 4).max()) if self._auto else None

    def encode(
        self,
        x: torch.Tensor,
        key: Key,
        rank: int = 0,
        world_size: int = 1,
        *,
        offset: int = 0,
        rotations: int | None = None,
        wanted: int | None = None,
        shards: int | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compress one rank's tensor.

        Args:
            x: (numel,) float32, bfloat16 or float16, contiguous or not.
            key: the same on all ranks.
            rank: the number of x among the tensors to average, in [0, world_size).
            world_size: the number of these tensors.
            offset: of x in its bucket, in coordinates, a multiple of `block`. A shard that is
                encoded alone with its own offset uses the same random numbers as within the bucket.
            rotations: only with "auto": the number of rotations, the same on all ranks.
            wanted: only with "auto": the least number, 1 to 3, to request next.
            shards: number of equal shards of whole blocks, each with its own payload. The payloads
                are those of the shards encoded one by one with their own offsets, in less time;
                with "auto" all of them carry the number that x needs.
            out: the output, contiguous uint8 at an address that is a multiple of 4.

        Returns:
            (nbytes(numel),) uint8, or (shards, nbytes(numel / shards)), on the device of x; it is
            `out` or new.

        Raises:
            TypeError: x has another dtype, x or out has no memory of its own, or key is not a Key.
            ValueError: x is not flat or cannot be split, out is not as above or overlaps x, or an
                argument is out of range.
        """
        rotations = self._check_choice("rotations", rotations)
        wanted = self._check_choice("wanted", wanted)
        check_type(key, Key, "Codec.encode", "key", "Key(seed=0, step=1)")
        memory = memory_of(x, "Codec.encode", "x")
        refuse_fake_mode("Codec.encode")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"Codec.encode: x is {x.dtype}, but only float32, bfloat16 and float16 can be "
                "compressed; convert it first"
            )
        if x.dim() != 1:
            raise ValueError(f"Codec.encode: x has shape {tuple(x.shape)}; flatten it first")
        rank, world_size, offset = self._check_origin(rank, world_size, offset, x.numel())
        x = plain(x)
        count = 1 if shards is None else operator.index(shards)
        self._check_shards(x.numel(), count, "Codec.encode")
        coder = self.coder(x.numel(), count, x.device)
        shape = (coder.nbytes,) if shards is None else (count, coder.nbytes)
        out = self._check_out(out, x, shape, memory)
        rows = out.view(count, coder.nbytes)
        coder.encode(x, key, offset, rank, world_size, rows, rotations, wanted)
        return out

    def decode_mean(
        self,
        payloads: torch.Tensor,
        key: Key,
        numel: int,
        *,
        offset: int = 0,
        out: torch.Tensor | None = None,
        first_rank: int = 0,
        world_size: int | None = None,
    ) -> torch.Tensor:
        """Mean of the tensors that K ranks encoded.

        Args:
            payloads: (K, nbytes(numel)) uint8, row i encoded as rank `first_rank` + i of
                `world_size`.
            key, offset: as passed to `encode`.
            first_rank, world_size: by default 0 and K, which means all ranks.
            numel: of the tensor.
            out: the output, (numel,) float32, bfloat16 or float16, contiguous.

        Returns:
            (numel,), `out` or a new float32 tensor. A block where any rank had inf or NaN is NaN.

        Raises:
            PayloadError: a payload has another length, version, configuration, key, rank or offset
                (within `DeferredChecks.deferring` on CUDA only the length is checked at once).
            TypeError: payloads or out is not a tensor or has no memory of its own, or key is not a
                Key.
            ValueError: out has another shape, dtype or layout, or overlaps the payloads.
        """
        numel = operator.index(numel)
        self._check_memory(payloads, out, "Codec.decode_mean")
        self._check_payloads(payloads, numel, "Codec.decode_mean")
        origin = (key, offset, first_rank, payloads.shape[0] if world_size is None else world_size)
        return self._decode(payloads.unsqueeze(1), numel, *origin, out, "Codec.decode_mean")

    def decode_shards(
        self,
        payloads: torch.Tensor,
        key: Key,
        numel: int,
        *,
        offset: int = 0,
        out: torch.Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> torch.Tensor:
        """The tensor that one rank encoded in shards.

        Args:
            payloads: (shards, nbytes(numel / shards)) uint8.
            key, offset, rank, world_size: as passed to `encode`.
            numel, out: of all shards; as for `decode_mean`.

        Returns:
            (numel,), `out` or a new float32 tensor.

        Raises:
            PayloadError, TypeError, ValueError: as `decode_mean` does.
        """
        numel = operator.index(numel)
        self._check_memory(payloads, out, "Codec.decode_shards")
        count = payloads.shape[0] if payloads.dim() else 0
        self._check_payloads(payloads, numel // max(1, count), "Codec.decode_shards")
        self._check_shards(numel, count, "Codec.decode_shards")
        origin = (key, offset, rank, world_size)
        return self._decode(payloads.unsqueeze(0), numel, *origin, out, "Codec.decode_shards")

    def _decode(
        self,
        payloads: torch.Tensor,
        numel: int,
        key: Key,
        offset: int,
        rank: int,
        world_size: int,
        out: torch.Tensor | None,
        owner: str,
    ) -> torch.Tensor:
        """Mean of the payloads (K, shards, nbytes) of K ranks, each in equal shards."""
        ranks, shards, _ = payloads.shape
        check_type(key, Key, owner, "key", "Key(seed=0, step=1)")
        rank, world_size, offset = self._check_origin(rank, world_size, offset, numel, ranks)
        payloads = plain(payloads, copy=False)
        if out is not None:
            self._check_mean(out, payloads, numel, owner)
        *steps, step = payloads.stride()
        if step != 1 or (math.gcd(*steps, payloads.data_ptr(), payloads.storage_offset()) % 4):
            payloads = payloads.clone(memory_format=torch.contiguous_format)
        if out is None:
            out = torch.empty(numel, dtype=torch.float32, device=payloads.device)
        target = out.detach() if out.requires_grad else out
        coder = self.coder(numel, shards, payloads.device)
        coder.decode(payloads, key, offset, rank, world_size, target)
        return out

    @staticmethod
    def _check_memory(payloads: torch.Tensor, out: torch.Tensor | None, owner: str) -> None:
        memory = memory_of(payloads, owner, "payloads")
        if out is not None and overlap(memory, memory_of(out, owner, "out")):
            raise ValueError(f"{owner}: out overlaps the payloads; give it memory of its own")
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

    def _check_payloads(self, payloads: torch.Tensor, numel: int, owner: str) -> None:
        length = self.nbytes(numel)
        fits = payloads.dim() == 2 and payloads.shape[0] > 0 and payloads.shape[1] == length
        if payloads.dtype != torch.uint8 or not fits:
            raise PayloadError(
                f"{owner}: payloads is {payloads.dtype} of shape {tuple(payloads.shape)}, but "
                f"{numel} coordinates take (K, {length}) torch.uint8: a payload was cut short, or "
                "made with another configuration or length"
            )

    def _check_shards(self, numel: int, shards: int, owner: str) -> None:
        """Raise ValueError unless `shards` is 1, or they are equal and of whole blocks."""
        if shards < 1 or (shards > 1 and numel % (shards * self.block)):
            raise ValueError(
                f"{owner}: {numel} coordinates cannot be split into {shards} equal shards of whole "
                f"blocks of {self.block}"
            )

    @staticmethod
    def _check_out(
        out: torch.Tensor | None,
        x: torch.Tensor,
        shape: tuple[int, ...],
        memory: tuple[int, int],
    ) -> torch.Tensor:
        """`out`, checked, or a new tensor; `x` occupies this memory."""
        if out is None:
            return torch.empty(shape, dtype=torch.uint8, device=x.device)
        if overlap(memory, memory_of(out, "Codec.encode", "out")):
            raise ValueError("Codec.encode: out overlaps x; give it memory of its own")
        if out.shape != shape or out.dtype != torch.uint8 or out.device != x.device:
            raise ValueError(
                f"Codec.encode: out is {out.dtype} of shape {tuple(out.shape)} on {out.device}, "
                f"but {x.numel()} coordinates take {shape} torch.uint8 on {x.device}"
            )
        unaligned = out.data_ptr() % 4 or out.storage_offset() % 4
        if not out.is_contiguous() or unaligned or out.is_neg():
            raise ValueError(
                "Codec.encode: out must be contiguous, at an address that is a multiple of 4; "
                "leave it out, and copy the result"
            )
        return out

    def _check_choice(self, name: str, count: int | None) -> int | None:
        """A number of rotations passed to `encode`, as a plain int."""
        if count is None:
            return None
        count = integer(count, "Codec.encode", name)
        if not self._auto and (name != "rotations" or count != self.rotations):
            raise ValueError(
                f"Codec.encode: {name}={count}, but this codec was made with "
                f'rotations={self.rotations}; the number can be chosen only with rotations="auto"'
            )
        if count not in (1, 2, 3):
            raise ValueError(f"Codec.encode: {name}={count} must be 1, 2 or 3")
        return count

    def _check_origin(
        self, rank: int, world_size: int, offset: int, numel: int, ranks: int = 1
    ) -> tuple[int, int, int]:
        """The arguments, checked, as plain ints: headers hash their text."""
        rank, world_size = (
            integer(rank, "Codec", "rank"),
            integer(world_size, "Codec", "world_size"),
        )
        offset = integer(offset, "Codec", "offset")
        if not 0 <= rank <= world_size - ranks:
            wrong = rank if rank < 0 else rank + ranks - 1
            raise ValueError(f"Codec: rank={wrong} must lie in [0, world_size={world_size})")
        if world_size > MAX_RANKS:
            raise ValueError(
                f"Codec: world_size={world_size} exceeds the {MAX_RANKS} streams of a key"
            )
        if offset % self.block or not 0 <= offset <= MAX_COORDINATES - numel:
            raise ValueError(
                f"Codec: offset={offset} must be a multiple of block={self.block}, and {numel} "
                "coordinates from there must end below 2^36"
            )
        return rank, world_size, offset
