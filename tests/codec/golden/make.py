"""Known-answer vectors of the wire format and of the arithmetic (docs/format.md).

    python tests/codec/golden/make.py

writes vectors.npz in the same folder, by the torch reference. It holds what the code of commit
dd327d5 gives. Whoever must write it anew has changed the format: see "Versions" in docs/format.md.
(It also holds that commit's sums of the lattice, which nothing reads: see make_lattice.py.)

NaN is written as the canonical one of its dtype, also where that commit's reference differed
(bfloat16: 0xffff), or where arithmetic on payloads of any bytes leaves its sign to the processor.

Inputs are not stored: they follow from raw bits of NumPy's PCG64, which NumPy keeps stable, by
exact operations.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rhtcomm import Codec, Eden, Key, QuicFL, VectorQuantizer
from rhtcomm.quantizers import Quantizer

__all__ = [
    "CASES",
    "PATH",
    "Case",
    "canonical",
    "digest",
    "read",
    "write",
]

Array = npt.NDArray[Any]
PATH = Path(__file__).with_name("vectors.npz")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FRACTION = 1 / 512


@dataclass(frozen=True)
class Case:
    """One mean: what ranks first_rank .. first_rank + ranks - 1 of world_size encoded."""

    name: str
    codec: Codec
    numel: int
    key: Key
    ranks: int = 1
    first_rank: int = 0
    world_size: int = 1
    offset: int = 0
    dtype: str = "float32"  # of the inputs
    out: str = "float32"  # of the mean
    recipe: str = "gaussian"
    rotations: int | None = None  # with "auto"
    wanted: int | None = None  # with "auto"
    digested: bool = False  # so large that only hashes are kept

    def encode(self) -> torch.Tensor:
        """(ranks, nbytes) uint8."""
        payloads = torch.stack(
            [
                self.codec.encode(
                    self.input(rank),
                    self.key,
                    rank,
                    self.world_size,
                    offset=self.offset,
                    rotations=self.rotations,
                    wanted=self.wanted,
                )
                for rank in range(self.first_rank, self.first_rank + self.ranks)
            ]
        )
        if self.recipe == "any bytes":
            for row, payload in enumerate(payloads):
                self._fill(payload, seed=row)
        return payloads

    def _fill(self, payload: torch.Tensor, seed: int) -> None:
        """Put random bytes behind the header, some of which make sense."""
        octets = raw(4000 + seed, payload.numel() // 8 + 1).view(np.uint8)
        payload[16:] = torch.from_numpy(octets[: payload.numel() - 16].copy())
        block, quantizer = self.codec.block, self.codec.quantizer
        blocks = self.numel // block
        codes = 16 + 4 * blocks
        payload[16:codes].view(blocks, 4)[1:, 3] &= 0xBF  # scales below 2
        rows = payload[codes : codes + (payload.numel() - codes) // blocks * blocks]
        if isinstance(quantizer, QuicFL) and quantizer.exact_fraction:
            section = rows.view(blocks, -1)[:, block * quantizer.bits // 8 :]
            edge = 2 * quantizer.exact_capacity(block)
            section[:, 1:edge:2] &= 0x0F  # indices below 4096
            section[-1, edge] = 0  # an infinite value at the first of them
            section[-1, edge + 1] = 0x7C

    def decode(self, payloads: torch.Tensor) -> torch.Tensor:
        """(numel,) of dtype `out`."""
        return self.codec.decode_mean(
            payloads,
            self.key,
            self.numel,
            offset=self.offset,
            first_rank=self.first_rank,
            world_size=self.world_size,
            out=torch.empty(self.numel, dtype=DTYPES[self.out]),
        )

    def input(self, rank: int) -> torch.Tensor:
        """(numel,) of dtype `dtype`, always the same."""
        bits = RECIPES[self.recipe](self.numel, rank, self.codec.block, self.dtype)
        if self.dtype == "bfloat16":  # whose 16 bits are the upper ones of a float32
            return torch.from_numpy((bits >> 16).astype(np.uint16).view(np.int16)).view(
                torch.bfloat16
            )
        x = torch.from_numpy(bits.view(np.float32).copy())
        return x.to(DTYPES[self.dtype])  # exactly


# Inputs: float32 bits, uint32 (numel,) -----------------------------------------------------------


def raw(seed: int, count: int) -> Array:
    return np.asarray(np.random.PCG64(seed).random_raw(count), np.uint64)


def integers(numel: int, rank: int, dtype: str) -> Array:
    """Sums of eight random bytes, nearly Gaussian, of as many bits as the dtype has."""
    words = raw(1000 + rank, numel)
    sums = words[:, None].view(np.uint8).reshape(numel, 8).sum(axis=1, dtype=np.int64) - 1020
    if dtype == "bfloat16":
        return sums >> 3
    return sums if dtype == "float16" else (sums << 13) + (words & np.uint64(0x1FFF)).astype(int)


def gaussian(numel: int, rank: int, block: int, dtype: str) -> Array:
    x = integers(numel, rank, dtype).astype(np.float32)
    return np.ldexp(x, -6 - rank).view(np.uint32)


def heavy(numel: int, rank: int, block: int, dtype: str) -> Array:
    """Magnitudes spread over 2^16, or 2^6 in float16, which has few exponents."""
    spread = 7 if dtype == "float16" else 17
    exponents = raw(2000 + rank, numel) % np.uint64(spread)
    x = integers(numel, rank, dtype).astype(np.float32)
    return np.ldexp(x, exponents.astype(np.int32) - spread // 2 - 1).view(np.uint32)


def edges(numel: int, rank: int, block: int, dtype: str) -> Array:
    """A block each of what is special; ranks have them in different blocks."""
    bits = gaussian(numel, rank, block, dtype).copy()
    rows = bits[: numel // block * block].reshape(-1, block)
    x = integers(rows.size, rank, dtype).reshape(rows.shape)
    last = {"float32": -149, "bfloat16": -133, "float16": -24}[dtype]  # the least subnormal
    top = {"float32": 0x7F7FFFFF, "bfloat16": 0x7F7F0000, "float16": 0x477FE000}[dtype]
    for row, kind in enumerate(range(rank, rank + len(rows))):
        match kind % 11:
            case 0:
                rows[row] = 0
            case 1:
                rows[row] = 0x80000000
            case 2:  # subnormal
                rows[row] = (
                    np.ldexp((x[row] & 255).astype(np.float64), last)
                    .astype(np.float32)
                    .view(np.uint32)
                )
            case 3:  # the largest, of both signs
                rows[row] = top | (x[row] & 1).astype(np.uint32) << 31
            case 4:
                rows[row, 5] = 0x7F800000
            case 5:
                rows[row, 6] = 0xFF800000
            case 6:
                rows[row, 7] = 0x7FC00000
            case 7:  # one coordinate
                rows[row] = 0
                rows[row, 3] = 0xC0200000
            case 8:  # the least subnormal alone
                rows[row] = 0
                rows[row, 9] = np.float32(2.0**last).view(np.uint32)
            case 9:
                rows[row] = 0x3F800000
            case _:
                pass
    return bits


def mixed(numel: int, rank: int, block: int, dtype: str) -> Array:
    """Bit patterns of any finite float32."""
    assert dtype == "float32"
    bits = (raw(3000 + rank, numel) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return np.where((bits >> 23 & 255) == 255, bits ^ 0x40000000, bits)


RECIPES = {
    "gaussian": gaussian,
    "heavy": heavy,
    "edges": edges,
    "mixed": mixed,
    "any bytes": gaussian,
}


# Cases -------------------------------------------------------------------------------------------


def quantizers() -> list[Quantizer]:
    return [
        *(QuicFL(bits) for bits in range(1, 9)),
        *(QuicFL(bits, FRACTION) for bits in range(1, 9)),
        *(Eden(bits) for bits in range(1, 9)),
        Eden(2, biased=True),
        *(VectorQuantizer(bits) for bits in (1, 2, 4)),
        VectorQuantizer(2, biased=True),
    ]


def name_of(codec: Codec) -> str:
    quantizer = codec.quantizer
    mode = "-exact" * bool(getattr(quantizer, "exact_fraction", 0))
    mode += "-biased" * bool(getattr(quantizer, "biased", False))
    kind = type(quantizer).__name__
    return f"{kind}{quantizer.bits}{mode}-k{codec.rotations}-d{codec.block}"


def of_every_quantizer() -> list[Case]:
    """Each once, with everything else in turn."""
    names, cases = list(DTYPES), []
    for i, quantizer in enumerate(quantizers()):
        block = (256, 32, 512, 64, 1024)[i % 5]
        codec = Codec(quantizer, 1 + i % 3, block)
        ranks, first_rank = 1 + i % 4, i % 2
        cases.append(
            Case(
                name_of(codec),
                codec,
                max(2 * block, 256) + (0, 1, block // 2 + 1)[i // 2 % 3],
                Key(2**64 - 1 - 977 * i, 2**32 - 1 - i, 2**31 + i, i % 16),
                ranks,
                first_rank,
                first_rank + ranks + i % 3,
                (0, 7, 2**20 + 3)[i % 3] * block,
                names[i % 3],
                names[i // 3 % 3],
                ("gaussian", "heavy")[i // 2 % 2],
            )
        )
    return cases


def of_every_tail() -> list[Case]:
    """A tail alone, and behind a full block, in blocks of 4096."""
    some = itertools.cycle([QuicFL(4), Eden(3), QuicFL(3, FRACTION), VectorQuantizer(4)])
    cases = []
    for numel in (0, 1, 255, 256, 257, 512, 513, 1025, 2049, 4096 + 1):
        codec = Codec(next(some))
        case = Case(f"{name_of(codec)}-n{numel}", codec, numel, Key(numel), out="float16")
        cases.append(replace(case, ranks=2, world_size=2))
    return cases


def of_odd_numbers() -> list[Case]:
    """Zeros, subnormals, the largest, what is not finite; any bits; any bytes."""
    cases = []
    some = [QuicFL(4), QuicFL(3, FRACTION), QuicFL(7), Eden(3), VectorQuantizer(2)]
    for i, (quantizer, dtype) in enumerate(itertools.product(some, DTYPES)):
        codec = Codec(quantizer, block=32)
        case = Case(
            f"{name_of(codec)}-edges-{dtype}", codec, 11 * 32, Key(i, hop=1), recipe="edges"
        )
        # One rank keeps each kind alone, two ranks mix each with the next.
        alone = replace(case, dtype=dtype, out=dtype)
        cases.append(alone)
        cases.append(replace(alone, name=f"{case.name}-n2", ranks=2, world_size=2))
    for i, quantizer in enumerate(some):
        codec = Codec(quantizer, block=128)
        plain = Case(f"{name_of(codec)}-mixed", codec, 300, Key(i, 3), recipe="mixed")
        cases.append(plain)
        codec = Codec(quantizer, block=4096 if i == 1 else 256)  # where 10 coordinates are exact
        case = replace(plain, name=f"{name_of(codec)}-any-bytes", codec=codec, recipe="any bytes")
        case = replace(case, numel=3 * codec.block, ranks=3, world_size=4, first_rank=1)
        cases.append(replace(case, out="float16" if i == 1 else "float32"))
    return cases


def of_auto() -> list[Case]:
    cases = []
    for i, quantizer in enumerate((QuicFL(4), QuicFL(2, FRACTION), Eden(4), VectorQuantizer(2))):
        codec = Codec(quantizer, "auto", 256)
        for rotations, wanted in ((None, None), (1, 3), (2, 2), (3, 1)):
            case = Case(f"{name_of(codec)}-takes-{rotations}", codec, 300, Key(i), 2, 0, 2)
            cases.append(replace(case, rotations=rotations, wanted=wanted, out="float16"))
    return cases


def of_large_blocks() -> list[Case]:
    """Where sections of exact coordinates have 32-bit indices, and kernels other loops."""
    cases = []
    for quantizer, block in (
        (QuicFL(2, FRACTION), 1 << 16),
        (QuicFL(4, FRACTION), 1 << 15),
        (QuicFL(4), 1 << 14),
        (Eden(4), 1 << 13),
        (VectorQuantizer(1), 1 << 13),
        (QuicFL(4), 4096),
        (QuicFL(1, FRACTION), 4096),
    ):
        codec = Codec(quantizer, block=block)
        case = Case(f"{name_of(codec)}-large", codec, 3 * block // 2 + 77, Key(block), 2, 0, 2)
        cases.append(replace(case, recipe="heavy", digested=True))
    return cases


CASES = [
    *of_every_quantizer(),
    *of_every_tail(),
    *of_odd_numbers(),
    *of_auto(),
    *of_large_blocks(),
]


# Files -------------------------------------------------------------------------------------------


def canonical(x: torch.Tensor) -> Array:
    """Bits of x, uint32 or uint16, each NaN replaced by the canonical one of its dtype."""
    kind = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}[x.dtype]
    nan = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[x.dtype]
    same_width = torch.int32 if x.dtype == torch.float32 else torch.int16
    bits = x.view(same_width).numpy().view(kind)
    return np.where(x.isnan().numpy(), nan, bits).astype(kind)


def digest(array: Array) -> Array:
    return np.frombuffer(blake2b(array.tobytes(), digest_size=16).digest(), np.uint8)


def read(path: Path = PATH) -> dict[str, Array]:
    with np.load(path) as arrays:
        return dict(arrays)


def write(path: Path, cases: Sequence[Case]) -> None:
    """What the reference makes of them."""
    assert os.environ.setdefault("RHTCOMM_KERNELS", "reference") == "reference"
    arrays: dict[str, Any] = {"versions": np.array([1, 1])}  # wire; arithmetic of payloads
    for case in cases:
        payloads = case.encode()
        found = {"payloads": payloads.numpy(), "mean": canonical(case.decode(payloads))}
        for kind, array in found.items():
            assert f"{case.name}/{kind}" not in arrays, case.name
            arrays[f"{case.name}/{kind}"] = digest(array) if case.digested else array
    np.savez(path, **arrays)


if __name__ == "__main__":
    write(PATH, CASES)
