"""ECDQ by docs/format.md alone: loops over Python's integers, and no code of rhtcomm's."""

import math
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from golden.literal import (
    CODEBOOKS,
    Array,
    Origin,
    blocks,
    check,
    hadamard,
    narrow,
    powers_of_two,
    signs,
    stream_bytes,
    tree_sum,
    unrotate,
)

__all__ = ["Form", "decode", "encode"]

FACTORS = (1, 65 / 64, 17 / 16, 5 / 4, 2, 16)


@dataclass(frozen=True)
class Form:
    bits: float
    rotations: int
    block: int

    def __post_init__(self) -> None:
        with np.load(CODEBOOKS / "ecdq.npz") as arrays:
            rows = arrays[f"b{self.bits:g}"].tolist()
            step, rate, spread = arrays[f"b{self.bits:g}/unit"].tolist()
        numbers = {"rows": rows, "step": step, "rate": rate, "spread": spread}
        for name, value in numbers.items():
            object.__setattr__(self, name, value)

    rows: Any = None
    step: int = 0
    rate: int = 0
    spread: int = 0

    @property
    def precision(self) -> int:
        return int(math.log2(sum(self.rows[0])))

    @property
    def largest(self) -> int:
        return (len(self.rows[0]) - 1) // 2

    def header(self, origin: Origin, rank: int) -> bytes:
        facts = {
            "format": 1,
            "byteorder": "little",
            "quantizer": "ECDQ",
            "bits": self.bits,
            "rotations": self.rotations,
            "block": self.block,
        }
        numbers = [self.step, self.rate, self.spread, *(f for row in self.rows for f in row)]
        levels = blake2b(np.array(numbers, "<f4").tobytes(), digest_size=8).hexdigest()
        fingerprint = blake2b(repr((facts, levels)).encode(), digest_size=8).digest()
        return b"RH" + bytes([1, self.rotations]) + check(origin, rank) + fingerprint

    def unit_bytes(self, m: int) -> int:
        bits = (self.rate * m >> 16) + (self.spread * math.isqrt(m) >> 8)
        return 128 + 4 * math.ceil(bits / 32)


def units(form: Form, count: int, size: int) -> list[tuple[int, int]]:
    """(first block, blocks) of each."""
    each = max(1, (1 << 16) // size)
    return [(first, min(each, count - first)) for first in range(0, count, each)]


def dither(origin: Origin, rank: int, offset: int, count: int) -> list[int]:
    words = stream_bytes(origin, 3, 0, offset, count).view("<u4").tolist()
    shift = 256 * (256 * rank // origin.world_size)
    found = []
    for word in words:
        for turn in (8, 16, 24, 32):
            turned = (word >> turn | word << (32 - turn)) & 0xFFFFFFFF
            found.append(((turned >> 16) + shift) & 0xFFFF)
    return found


# Decoding ----------------------------------------------------------------------------------------


def symbols_of(form: Form, unit: bytes, classes: list[int]) -> list[int]:
    """k of each coordinate."""
    states = np.frombuffer(unit, "<u4", 32).tolist()
    words = iter(np.frombuffer(unit, "<u2", offset=128).tolist())
    found, total = [], 1 << form.precision
    for step in range(len(classes) // 32):
        for lane in range(32):
            row = form.rows[classes[32 * step + lane]]
            slot, symbol, start = states[lane] % total, 0, 0
            while slot >= start + row[symbol]:
                start, symbol = start + row[symbol], symbol + 1
            states[lane] = row[symbol] * (states[lane] // total) + slot - start
            found.append(symbol - form.largest)
        for lane in range(32):
            if states[lane] < 1 << 16:
                states[lane] = (states[lane] << 16) + next(words, 0)
    return found


def values(form: Form, origin: Origin, rank: int, unit: bytes, offset: int, m: int) -> Array:
    v = dither(origin, rank, offset, m)
    found = symbols_of(form, unit, [len(form.rows) * each // 65536 for each in v])
    grid = [512 * k - 2 * (each >> 8) + 255 for k, each in zip(found, v, strict=True)]
    return np.array(grid, np.float32) / np.float32(128)


def decode(form: Form, origin: Origin, payloads: list[bytes], first_rank: int, dtype: str) -> Array:
    """The bits of the mean."""
    for rank, payload in enumerate(payloads, first_rank):
        assert payload[:16] == form.header(origin, rank)
    result, at = [np.zeros(0, np.float32)], 16
    for start, count, size in blocks(origin.numel, form.block):
        scales = [np.frombuffer(p, "<f4", count, at) for p in payloads]
        at += 4 * count
        for first, some in units(form, count, size):
            length, offset = form.unit_bytes(some * size), origin.offset + start + first * size
            ys = [
                values(form, origin, rank, p[at : at + length], offset, some * size)
                for rank, p in enumerate(payloads, first_rank)
            ]
            at += length
            for i in range(some):
                part = slice(i * size, (i + 1) * size)
                of_block = [scale[first + i : first + i + 1] for scale in scales]
                rows = [y[part] for y in ys]
                result.append(mean_of(form, origin, of_block, rows, offset + i * size))
    assert at == len(payloads[0])
    return narrow(np.concatenate(result)[: origin.numel], dtype)


def mean_of(form: Form, origin: Origin, scales: list[Array], ys: list[Array], offset: int) -> Array:
    size = ys[0].size
    peak = max(int(scale.view("<u4")[0]) & 0x7FFFFFFF for scale in scales)
    if peak >= 0x7F800000:
        return np.full(size, np.nan, np.float32)
    down, up = powers_of_two(peak)
    with np.errstate(all="ignore"):
        total = ys[0] * (scales[0] * down)
        for y, scale in zip(ys[1:], scales[1:], strict=True):
            total = total + y * (scale * down)
        total = unrotate(total, form.rotations, origin, 0, offset)
        mean: Array = total * np.float32(size ** (-form.rotations / 2) / len(ys)) * up
    return mean


# Encoding ----------------------------------------------------------------------------------------


def encode(form: Form, origin: Origin, x: Array, rank: int) -> bytes:
    payload = form.header(origin, rank)
    for start, count, size in blocks(origin.numel, form.block):
        part = np.zeros(count * size, np.float32)
        known = x[start : start + part.size]
        part[: known.size] = known
        scales, codes = b"", b""
        for first, some in units(form, count, size):
            rows = part[first * size : (first + some) * size].reshape(some, size)
            of_unit = encode_unit(form, origin, rank, rows, origin.offset + start + first * size)
            scales, codes = scales + of_unit[0], codes + of_unit[1]
        payload += scales + codes
    return payload


def encode_unit(
    form: Form, origin: Origin, rank: int, x: Array, offset: int
) -> tuple[bytes, bytes]:
    size = x.shape[1]
    length, f32 = form.unit_bytes(x.size), np.float32
    v = dither(origin, rank, offset, x.size)
    classes = [len(form.rows) * each // 65536 for each in v]
    ys, scales, ups = [], [], []
    for i, row in enumerate(x):
        down, up = powers_of_two(int((row.view(np.uint32) & 0x7FFFFFFF).max()))
        y = row * down if np.isfinite(row).all() else np.zeros_like(row)
        for stream in range(form.rotations):
            y = hadamard(y * signs(origin, stream, 0, offset + i * size, size))
        q = f32((1 + 2**-20) * 2**16 / (form.largest * form.step))
        scales.append(max(np.sqrt(tree_sum(y * y) * f32(1 / size)), np.abs(y).max() * q))
        ys.append(y)
        ups.append(up)
    for factor in (*FACTORS, None):
        taken = [s * f32(factor or 0) for s in scales]
        k = []
        for y, s in zip(ys, taken, strict=True):
            grid = f32(1) / s * f32(2**32 / form.step) if s > 0 else f32(0)
            k += np.trunc(y * grid).astype(np.int64).tolist()
        k = [(each + shared) >> 16 for each, shared in zip(k, v, strict=True)]
        unit = bytes(length) if factor is None else code(form, k, classes)
        if len(unit) <= length:
            break
    found = b""
    for row, s, up in zip(x, taken, ups, strict=True):
        with np.errstate(over="ignore"):
            scale = s * f32(form.step / 2**18) * f32(size ** (-form.rotations / 2)) * up
        scale = min(scale, np.finfo(f32).max) if np.isfinite(row).all() else f32(np.nan)
        found += f32(scale).tobytes()
    return found, unit.ljust(length, b"\0")


def code(form: Form, k: list[int], classes: list[int]) -> bytes:
    """States and words, however many they are."""
    states, words = [1 << 16] * 32, []
    for at in range(len(k) - 1, -1, -1):
        row, column = form.rows[classes[at]], k[at] + form.largest
        f, start, x = row[column], sum(row[:column]), states[at % 32]
        if x >= f << (32 - form.precision):
            words.append(x % 65536)
            x //= 65536
        states[at % 32] = (x // f << form.precision) + x % f + start
    return np.array(states, "<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()
