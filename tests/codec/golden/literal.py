"""An encoder and a decoder by docs/format.md alone: NumPy and no code of rhtcomm's.

It reads rhtcomm's tables, rhtcomm/codebooks/*.npz, which are a part of the format.
"""

import math
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
CODEBOOKS = Path(__file__).parents[3] / "rhtcomm" / "codebooks"
M32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Format:
    quantizer: str  # "QuicFL", "Eden" or "VectorQuantizer"
    bits: int
    rotations: int | str
    block: int
    exact: bool = False
    biased: bool = False


@dataclass(frozen=True)
class Origin:
    seed: int
    step: int
    bucket: int
    hop: int
    world_size: int
    offset: int  # of the tensor in its bucket
    numel: int
    owner: int = 0


class Refused(ValueError):
    pass


# Layout ------------------------------------------------------------------------------------------


def blocks(numel: int, block: int) -> list[tuple[int, int, int]]:
    """(start, count, d) of the full blocks and of the tail."""
    full, rest = divmod(numel, block)
    found = [(0, full, block)] if full else []
    if rest:
        size = 256
        while size < rest:
            size *= 2
        found.append((full * block, 1, min(size, block)))
    return found


def capacity(form: Format, size: int) -> int:
    return max(1, size // 512 + 2 * math.isqrt(size // 4096)) if form.exact else 0


def row_bytes(form: Format, size: int) -> int:
    return size * form.bits // 8 + capacity(form, size) * (4 if size <= 1 << 15 else 6)


def nbytes(form: Format, numel: int) -> int:
    return 16 + sum(n * (4 + row_bytes(form, size)) for _, n, size in blocks(numel, form.block))


# Header ------------------------------------------------------------------------------------------


def table(form: Format) -> Array:
    """What codes stand for, float32, in the order that the fingerprint hashes."""
    name = {"QuicFL": "quic_fl", "Eden": "lloyd_max", "VectorQuantizer": "vector"}[form.quantizer]
    with np.load(CODEBOOKS / f"{name}{'_exact' * form.exact}.npz") as arrays:
        entries = arrays[f"b{form.bits}"].astype(np.float64)
    if form.quantizer == "VectorQuantizer":
        entries = np.concatenate([entries, -entries])
    if form.quantizer == "QuicFL":
        entries = entries.reshape(1 << form.bits, -1)[:, ::-1]
    return np.ascontiguousarray(entries.astype("<f4"))


def fingerprint(form: Format) -> bytes:
    facts: dict[str, object] = {
        "format": 1,
        "byteorder": "little",
        "quantizer": form.quantizer,
        "bits": form.bits,
        "rotations": form.rotations,
        "block": form.block,
    }
    if form.exact:
        facts["exact_fraction"] = 1 / 512
    if form.biased:
        facts["biased"] = True
    levels = blake2b(table(form).tobytes(), digest_size=8).hexdigest()
    return blake2b(repr((facts, levels)).encode(), digest_size=8).digest()


def check(p: Origin, rank: int) -> bytes:
    of_what = (p.seed, p.step, p.bucket, p.hop, rank, p.world_size, p.offset, p.numel)
    of_what += (p.owner,) if p.owner else ()
    return blake2b(repr(of_what).encode(), digest_size=4).digest()


def check_header(form: Format, origin: Origin, rank: int, payload: bytes) -> int:
    """The number of rotations."""
    if len(payload) != nbytes(form, origin.numel):
        raise Refused("length")
    if payload[:2] != b"RH" or payload[2] != 1 or payload[8:16] != fingerprint(form):
        raise Refused("mark, version or fingerprint")
    rotations, wish = payload[3] % 16, payload[3] // 16
    if form.rotations == "auto":
        if rotations not in (1, 2, 3) or wish not in (1, 2, 3):
            raise Refused("rotations")
    elif (rotations, wish) != (form.rotations, 0):
        raise Refused("rotations")
    if payload[4:8] != check(origin, rank):
        raise Refused("check")
    return rotations


# Randomness --------------------------------------------------------------------------------------


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> Array:
    """Philox4x32-10, counters uint64 (n,) -> (n, 4) uint32."""
    c = list(np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter)))
    k0, k1 = key
    low, shift = np.uint64(M32), np.uint64(32)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> shift) ^ c[1] ^ np.uint64(k0),
            b & low,
            (a >> shift) ^ c[3] ^ np.uint64(k1),
            a & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return np.stack(c, axis=-1).astype("<u4")


def stream_bytes(origin: Origin, stream: int, rank: int, offset: int, count: int) -> Array:
    """Bytes offset .. offset + count - 1 of a stream."""
    call, stop = offset // 16, -(-(offset + count) // 16)
    words = philox(
        (
            np.arange(call, stop, dtype=np.uint64),
            origin.bucket,
            origin.step,
            stream + 16 * origin.hop + 256 * rank,
        ),
        (origin.seed & M32, origin.seed >> 32),
    )
    return words.reshape(-1).view(np.uint8)[offset - 16 * call :][:count]


def signs(origin: Origin, stream: int, rank: int, offset: int, size: int) -> Array:
    octets = stream_bytes(origin, stream, rank, offset // 8, size // 8)
    return 1 - 2 * np.unpackbits(octets, bitorder="little").astype(np.float32)


# Arithmetic --------------------------------------------------------------------------------------


def hadamard(y: Array) -> Array:
    stride = 1
    while stride < y.size:
        pairs = y.reshape(-1, 2, stride)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        stride *= 2
    return y


def unrotate(y: Array, rotations: int, origin: Origin, rank: int, offset: int) -> Array:
    for stream in reversed(range(rotations)):
        y = hadamard(y) * signs(origin, stream, rank, offset, y.size)
    return y


def unpack(row: Array, bits: int, count: int) -> Array:
    codes, at, shift = np.zeros(count, np.int64), 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            run = count * width // 8
            for lane in range(8 // width):
                field = row[at : at + run].astype(np.int64) >> (lane * width) & ((1 << width) - 1)
                codes[lane * run : (lane + 1) * run] |= field << shift
            at, shift = at + run, shift + width
    return codes


def values(form: Format, origin: Origin, rank: int, row: Array, offset: int, size: int) -> Array:
    """What one rank's codes of one block stand for, in units of its scale."""
    levels = table(form)
    if form.quantizer == "VectorQuantizer":
        return levels[row[: size * form.bits // 8]].reshape(-1)
    codes = unpack(row, form.bits, size)
    if form.quantizer == "Eden":
        return levels[codes]
    shift = 256 * rank // origin.world_size
    dither = (stream_bytes(origin, 3, 0, offset, size).astype(np.int64) + shift) & 255
    found = levels[codes, dither * levels.shape[1] // 256]
    entries, width = capacity(form, size), 2 if size <= 1 << 15 else 4
    section = row[size * form.bits // 8 :]
    indices = section[: entries * width].view(f"<i{width}")
    exact = section[entries * width :].view("<f2").astype(np.float32)
    last = -1
    for index, value in zip(indices.tolist(), exact, strict=True):
        if last < index < size:
            found[index] = value
        last = max(last, index)
    return found


def powers_of_two(magnitude: int) -> tuple[np.float32, np.float32]:
    exponent = min(max(magnitude >> 23, 1), 253)
    down, up = np.array([254 - exponent, exponent], np.uint32) << 23
    return down.view(np.float32), up.view(np.float32)


def decode(
    form: Format, origin: Origin, payloads: list[bytes], first_rank: int, dtype: str
) -> Array:
    """The bits of the mean, uint32 for "float32", uint16 for "bfloat16" and "float16"."""
    ranks = range(first_rank, first_rank + len(payloads))
    counts = {check_header(form, origin, *pair) for pair in zip(ranks, payloads, strict=True)}
    if len(counts) > 1:
        raise Refused("rotations differ")
    (rotations,) = counts
    result, at = np.zeros(0, np.float32), 16
    for start, count, size in blocks(origin.numel, form.block):
        width = row_bytes(form, size)
        for i in range(count):
            scale_at, row_at = at + 4 * i, at + 4 * count + width * i
            scales = [np.frombuffer(p, "<f4", 1, scale_at) for p in payloads]
            rows = [np.frombuffer(p, np.uint8, width, row_at) for p in payloads]
            where = origin.offset + start + i * size
            result = np.append(
                result, decode_block(form, origin, ranks, scales, rows, where, size, rotations)
            )
        at += count * (4 + width)
    return narrow(result[: origin.numel], dtype)


def decode_block(
    form: Format,
    origin: Origin,
    ranks: range,
    scales: list[Array],
    rows: list[Array],
    offset: int,
    size: int,
    rotations: int,
) -> Array:
    peak = max(int(scale.view("<u4")[0]) & 0x7FFFFFFF for scale in scales)
    if peak >= 0x7F800000:
        return np.full(size, np.nan, np.float32)
    down, up = powers_of_two(peak)
    shared, total = form.quantizer == "QuicFL", None
    with np.errstate(all="ignore"):
        for rank, scale, row in zip(ranks, scales, rows, strict=True):
            y = values(form, origin, rank, row, offset, size) * (scale * down)
            if not shared:
                y = unrotate(y, rotations, origin, rank, offset)
            total = y if total is None else total + y
        assert total is not None
        if shared:
            total = unrotate(total, rotations, origin, 0, offset)
        mean: Array = total * np.float32(size ** (-rotations / 2) / len(rows)) * up
    assert mean.dtype == np.float32
    return mean


def narrow(x: Array, dtype: str) -> Array:
    """Bits in a dtype, rounded to nearest, ties to even; NaN is the canonical one."""
    nan = np.isnan(x)
    if dtype == "float32":
        return np.where(nan, 0x7FC00000, x.view(np.uint32)).astype(np.uint32)
    if dtype == "float16":
        with np.errstate(all="ignore"):
            return np.where(nan, 0x7E00, x.astype(np.float16).view(np.uint16)).astype(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    return np.where(nan, 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


# Encoding ----------------------------------------------------------------------------------------


def encode(form: Format, origin: Origin, x: Array, rank: int, fourth: int) -> bytes:
    """x (numel,) float32; `fourth` is byte 3 of the header."""
    payload = b"RH" + bytes([1, fourth]) + check(origin, rank) + fingerprint(form)
    for start, count, size in blocks(origin.numel, form.block):
        part = np.zeros(count * size, np.float32)
        known = x[start : start + part.size]
        part[: known.size] = known
        rows = [
            encode_block(form, origin, rank, row, origin.offset + start + i * size, fourth % 16)
            for i, row in enumerate(part.reshape(count, size))
        ]
        payload += b"".join(scale for scale, _ in rows) + b"".join(row for _, row in rows)
    return payload


def encode_block(
    form: Format, origin: Origin, rank: int, x: Array, offset: int, rotations: int
) -> tuple[bytes, bytes]:
    finite = bool(np.isfinite(x).all())
    down, up = powers_of_two(int((x.view(np.uint32) & 0x7FFFFFFF).max()))
    y = x * down if finite else np.zeros_like(x)
    whose = 0 if form.quantizer == "QuicFL" else rank
    for stream in range(rotations):
        y = hadamard(y * signs(origin, stream, whose, offset, y.size))
    rms = np.sqrt(tree_sum(y * y) * np.float32(1 / y.size))
    quantize = quic_fl if form.quantizer == "QuicFL" else eden
    scale, codes, exact = quantize(form, origin, rank, y, rms, offset)
    with np.errstate(over="ignore"):
        scale = np.float32(scale) * np.float32(y.size ** (-rotations / 2)) * up
    scale = min(scale, np.finfo(np.float32).max) if finite else np.float32(np.nan)
    width = 8 if form.quantizer == "VectorQuantizer" else form.bits
    return np.float32(scale).tobytes(), pack(codes, width) + exact


def tree_sum(x: Array) -> Any:
    while x.size > 1:
        x = x[: x.size // 2] + x[x.size // 2 :]
    return x[0]


def pack(codes: Array, bits: int) -> bytes:
    packed, shift = b"", 0
    for width in (8, 4, 2, 1):
        if bits & width:
            fields = (codes >> shift & ((1 << width) - 1)).reshape(8 // width, -1)
            lanes = np.arange(8 // width)[:, None] * width
            packed += (fields << lanes).sum(axis=0).astype(np.uint8).tobytes()
            shift += width
    return packed


def quic_fl(
    form: Format, origin: Origin, rank: int, y: Array, rms: Any, offset: int
) -> tuple[Any, Array, bytes]:
    levels = table(form)[:, ::-1].reshape(-1).astype(np.float64)
    share = levels.size >> form.bits
    running = np.concatenate([[0.0], np.cumsum(levels)])
    averages = (running[share:] - running[:-share]) / share
    bound, nodes = averages[-1], max(1024, 64 << form.bits)
    positions = np.interp(
        np.linspace(-bound, bound, nodes + 1), averages, np.arange(averages.size) / share
    )
    positions = np.rint(65536 * positions).astype(np.int64)
    room = capacity(form, y.size)
    needed = np.abs(y) * np.float32((1 + 2**-20) / bound)
    scale = max(rms, np.sort(needed)[-room - 1])
    words = stream_bytes(origin, 3, 0, offset, y.size).view("<u4").astype(np.int64)
    turn = np.array([8, 16, 24, 32])
    turned = ((words[:, None] >> turn | words[:, None] << (32 - turn)) & M32).reshape(-1)
    shift = 256 * (256 * rank // origin.world_size)
    u, v = (turned + shift) & 0xFFFF, ((turned >> 16) + shift) & 0xFFFF
    index = np.flatnonzero(needed > scale) if room else np.zeros(0, np.int64)
    kind = "<i2" if y.size <= 1 << 15 else "<i4"
    indices, values = np.full(room, -1, kind), np.zeros(room, "<f2")
    indices[: index.size] = index
    bits = (y[index] / scale).view(np.uint32) + (u[index] >> 3).astype(np.uint32)
    values[: index.size] = (bits & np.uint32(0xFFFFE000)).view(np.float32)
    y = y.copy()
    y[index] = 0
    per_unit = np.float32(nodes * 65536 / (2 * bound))
    unit = np.float32(1) / scale * per_unit if scale > 0 else np.float32(0)
    node = (np.trunc(y * unit).astype(np.int64) + u + (nodes << 15)) >> 16
    return scale, (positions[node] + v) >> 16, indices.tobytes() + values.tobytes()


def eden(
    form: Format, origin: Origin, rank: int, y: Array, rms: Any, offset: int
) -> tuple[Any, Array, bytes]:
    """EDEN and vectors."""
    levels = table(form)
    z = y * (np.float32(1) / rms if rms > 0 else np.float32(0))
    if form.quantizer == "Eden":
        with np.load(CODEBOOKS / "lloyd_max.npz") as arrays:
            c = arrays[f"b{form.bits}"].astype(np.float64)
        codes = np.searchsorted(((c[1:] + c[:-1]) / 2).astype(np.float32), z, side="right")
    else:
        with np.load(CODEBOOKS / "vector.npz") as arrays:
            c = arrays[f"b{form.bits}"].astype(np.float64)
        groups = z.reshape(-1, levels.shape[1])
        dots = groups[:, :1] * levels[None, :128, 0]
        for k in range(1, groups.shape[1]):
            dots = dots + groups[:, k : k + 1] * levels[None, :128, k]
        scores = np.abs(dots) - ((c * c).sum(axis=1) / 2).astype(np.float32)
        codes = scores.argmax(axis=1)
        codes += 128 * (dots[np.arange(codes.size), codes] < 0)
    if not rms > 0:
        return np.float32(0), codes, b""
    values = levels[codes].reshape(-1)
    agreement = tree_sum(z * values)
    if form.biased:
        return rms * (agreement / tree_sum(values * values)), codes, b""
    return rms * (tree_sum(z * z) / agreement), codes, b""


# The lattice -------------------------------------------------------------------------------------


def lattice_grid(bits: int) -> np.float32:
    return np.float32((2**bits - 1) * 2**15 * (1 - 2**-21))


def lattice_lanes(bits: int, n: int, size: int) -> tuple[int, int, int]:
    """Bits of a lane, lanes of a word, words of a block."""
    width = bits + (n - 1).bit_length()
    return width, 32 // width, -(-size // (32 // width))


def lattice_dither(origin: Origin, offset: int, size: int) -> Array:
    octets = stream_bytes(origin, 3, 0, offset, size)
    words = np.repeat(octets.view("<u4").astype(np.int64), 4)
    turn = np.tile(np.array([8, 16, 24, 32]), size // 4)
    return (words >> turn | words << (32 - turn)) >> 16 & 0xFFFF


def lattice_parts(origin: Origin, bits: int, block: int) -> list[tuple[int, int, int, slice, int]]:
    """Of each block: its start in the tensor and in the padded one, d, its words, its number."""
    parts, padded, begin = [], 0, 0
    for start, count, size in blocks(origin.numel, block):
        m = lattice_lanes(bits, origin.world_size, size)[2]
        for i in range(count):
            where = slice(begin, begin + m)
            parts.append((start + i * size, padded, size, where, len(parts)))
            padded, begin = padded + size, begin + m
    return parts


def lattice_rotate(x: Array, rotations: int, bits: int, block: int, origin: Origin) -> Any:
    """x (numel,) float32 -> rotated coordinates, powers of two and bounds of the blocks."""
    ys, exponents, bounds = [], [], []
    for start, _, size, _, _ in lattice_parts(origin, bits, block):
        values = np.zeros(size, np.float32)
        part = x[start : start + size]
        values[: part.size] = part
        peak = int((values.view(np.uint32) & 0x7FFFFFFF).max())
        down, up = powers_of_two(peak)
        y = values * down if peak < 0x7F800000 else np.zeros(size, np.float32)
        for stream in range(rotations):
            y = hadamard(y * signs(origin, stream, 0, origin.offset + start, size))
        largest, e = int(np.abs(y).max().view(np.uint32)), int(up.view(np.uint32)) >> 23
        bound = largest + (e - 254) * 2**23 if largest else -(2**31)
        bounds.append(bound if peak < 0x7F800000 else 2**31 - 1)
        ys.append(y)
        exponents.append(e - 127)
    return np.concatenate(ys), exponents, np.array(bounds, np.int32)


def lattice_words(
    y: Array, exponents: list[int], bounds: Array, bits: int, block: int, origin: Origin, rank: int
) -> Array:
    n, words = origin.world_size, []
    for start, padded, size, _, number in lattice_parts(origin, bits, block):
        bound = int(bounds[number])
        unit = np.float32(0)
        if bound not in (-(2**31), 2**31 - 1):
            mantissa = np.float32(1 + (bound & 0x7FFFFF) / 2**23)
            power = max(exponents[number] - (bound >> 23), -126)
            unit = np.float32(1) / mantissa * lattice_grid(bits) * np.float32(2.0**power)
        z = np.trunc(y[padded : padded + size] * unit).astype(np.int64)
        v = lattice_dither(origin, origin.offset + start, size) + 65536 * rank // n
        codes = z + (2**bits - 1) * 2**15 + v % 65536 >> 16
        width, lanes, m = lattice_lanes(bits, n, size)
        planes = np.append(codes, np.zeros(lanes * m - size, np.int64)).reshape(lanes, m)
        words.append((planes << (width * np.arange(lanes))[:, None]).sum(axis=0))
    return np.concatenate(words).astype(np.uint32).view(np.int32)


def lattice_mean(
    words: Array, bounds: Array, bits: int, rotations: int, block: int, origin: Origin
) -> Array:
    """Summed words and bounds, int32 -> bits of the mean, uint32."""
    n, result = origin.world_size, np.zeros(0, np.float32)
    grid, every = lattice_grid(bits), n * (2**bits - 1)
    for start, _, size, where, number in lattice_parts(origin, bits, block):
        width, lanes, _ = lattice_lanes(bits, n, size)
        shifts = (width * np.arange(lanes))[:, None]
        planes = words[where].view(np.uint32).astype(np.int64)[None] >> shifts & (1 << width) - 1
        sums = (planes.reshape(-1)[:size] - every // 2).astype(np.float32)
        rest = (every + 1) % 2 * 2**15 - math.gcd(n, 2**16) / 2
        drawn = n * lattice_dither(origin, origin.offset + start, size) % 65536
        value = sums * np.float32(65536) + (np.float32(rest) - drawn.astype(np.float32))
        value = value * (np.float32(1) / (np.float32(n) * grid))
        value = unrotate(value, rotations, origin, 0, origin.offset + start)
        bound = int(bounds[number])
        if bound in (-(2**31), 2**31 - 1):
            mean = np.full(size, 0 if bound < 0 else np.nan, np.float32)
        else:
            usual = min(max(bound >> 23, -126), 127)
            rest_of_power = 2.0 ** ((bound >> 23) - usual)
            mantissa = np.float32(1 + (bound & 0x7FFFFF) / 2**23)
            factor = mantissa * np.float32(float(size) ** -rotations * rest_of_power)
            mean = value * factor * np.float32(2.0**usual)
        result = np.append(result, mean)
    return narrow(result[: origin.numel], "float32")
