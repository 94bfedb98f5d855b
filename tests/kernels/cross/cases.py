"""Write the cases that driver.c checks: what the torch reference makes of some tensors, and the
known answers of tests/codec/golden.
"""

import argparse
import ctypes
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import count, product
from pathlib import Path

import torch

from rhtcomm import ECDQ, Codec, Eden, Key, Lattice, QuicFL, VectorQuantizer
from rhtcomm.kernels import (
    Feedback,
    LatticeTask,
    Residual,
    Task,
    cpu,
    lattice_cpu,
    reference,
    use,
)
from rhtcomm.quantizers import Quantizer

sys.path.insert(0, str(Path(__file__).parents[2] / "codec"))
sys.path.insert(0, str(Path(__file__).parents[2] / "lib"))
from golden import make, make_ecdq
from lattices import sum_of
from problems import gaussian, that_overflows

FRACTION = 1 / 512
QUANTIZERS: tuple[Quantizer, ...] = (
    *(QuicFL(bits) for bits in range(1, 9)),
    *(QuicFL(bits, exact_fraction=FRACTION) for bits in range(1, 9)),
    *(Eden(bits) for bits in range(1, 9)),
    *(Eden(bits, biased=True) for bits in (1, 4)),
    *(VectorQuantizer(bits) for bits in (1, 2, 4)),
    *(ECDQ(quarters / 4) for quarters in range(4, 25)),
)
# Ordinary; subnormal in float32 and in float16; near the largest; with a NaN.
MAGNITUDES = (1.0, 1e-38, 1e-41, 3e-8, 3e38, math.inf)
BLOCKS = (32, 256, 512, 4096)
RANKS = 2


class Case(ctypes.Structure):
    """`Case` of driver.c, but for the pointers of its plans, which stay empty."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("plans", "numel", "in_dtype", "out_dtype", "nbytes")),
        *((name, ctypes.c_int64) for name in ("encoded", "rank", "ranks", "world_size", "offset")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("step", "bucket", "hop")),
        *((name, ctypes.c_int64) for name in ("padded", "blocks", "words", "residual")),
        ("tables", ctypes.c_int64 * 6),
        ("plan", cpu.Plan * 2),
    )


def cases() -> Iterator[tuple[Quantizer, int, int, float, torch.dtype, torch.dtype]]:
    """Each quantizer with each magnitude, and the rest in turn."""
    for i, (quantizer, magnitude) in zip(count(), product(QUANTIZERS, MAGNITUDES), strict=False):
        in_dtype, out_dtype = cpu.DTYPES[i // 3 % 3], cpu.DTYPES[i % 3]
        yield quantizer, 1 + i // 5 % 3, BLOCKS[i // 2 % 4], magnitude, in_dtype, out_dtype


def case(
    number: int,
    quantizer: Quantizer,
    rotations: int,
    block: int,
    magnitude: float,
    in_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Iterator[bytes]:
    codec, key = Codec(quantizer, rotations, block), Key(number, step=7, bucket=11)
    rank, numel = number % RANKS, block - 5 if number % 4 == 1 else 2 * block
    generator = torch.Generator().manual_seed(number)
    xs = torch.randn(RANKS, numel, generator=generator)
    xs[:, : block // 2] *= 2.0**-12  # some far smaller than their block's largest
    if math.isinf(magnitude):
        xs[1, 3] = math.nan
    else:
        xs = (xs.double() * magnitude).clamp(-3e38, 3e38)
    xs = xs.to(in_dtype)
    if number % 5 == 0:
        xs[0, numel // 2 :] = 0
    payloads = torch.stack([codec.encode(x, key, r, RANKS) for r, x in enumerate(xs)])
    (section,) = codec.layout(numel)
    if number % 7 == 0:  # codes of any bytes, exact coordinates among them
        shape = payloads[:, section.codes :].shape
        octets = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        payloads[1 - rank, section.codes :] = octets[rank]
        if capacity := quantizer.exact_capacity(block) if isinstance(quantizer, QuicFL) else 0:
            # The first one of each block an infinity, of which sums make NaNs.
            _, rows = section.views(payloads)
            exact = rows[1 - rank, :, block * quantizer.bits // 8 :]
            exact[:, :2] = torch.tensor([3, 0], dtype=torch.uint8)
            exact[:, 2 * capacity :][:, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
        if isinstance(quantizer, ECDQ):
            payloads[1 - rank, section.codes :][:128].view(torch.int32)[:] = _least_state(quantizer)
    out = codec.decode_mean(payloads, key, numel, out=torch.empty(numel, dtype=out_dtype))
    task = codec.task(numel)
    yield from payload_case(
        task, key, 0, 0, RANKS, rank, xs[rank], payloads, bytes_of(out), out.dtype
    )


def _least_state(quantizer: ECDQ) -> int:
    """A state that becomes 2^16, the least that no word follows, by a symbol of the first class."""
    table = quantizer.table
    symbols = table.entries[: 2 * table.largest + 1, 0].tolist()
    frequencies = [symbol & 0x1FFF for symbol in symbols]
    at = next(i for i, frequency in enumerate(frequencies) if 65536 % frequency == 0)
    return (65536 // frequencies[at] << table.precision) + (symbols[at] >> 13 & 0x1FFF)


def golden() -> Iterator[bytes]:
    """Those of the known answers whose payloads were encoded."""
    for cases, path in ((make.CASES, make.PATH), (make_ecdq.CASES, make_ecdq.PATH)):
        vectors = make.read(path)
        for known in cases:
            if known.digested or known.recipe == "any bytes" or not known.numel:
                continue
            payloads = torch.from_numpy(vectors[f"{known.name}/payloads"])
            x, mean = known.input(known.first_rank), vectors[f"{known.name}/mean"]
            yield from payload_case(
                known.codec.task(known.numel, rotations=known.rotations),
                known.key,
                known.offset,
                known.first_rank,
                known.world_size,
                known.first_rank,
                x,
                payloads,
                mean.tobytes(),
                make.DTYPES[known.out],
            )


def units() -> Iterator[bytes]:
    """ECDQ's units of 16 blocks: one that does not fit, one that does, and a part of one."""
    key, unit = Key(3), 1 << 16
    for bits in (1, 2.5, 4, 5.5):  # of 8, 4, 2 and 1 classes of dither; the last two always fit
        codec = Codec(ECDQ(bits))
        x = torch.cat([that_overflows(bits, unit, key), gaussian(unit + 5000)])
        payloads = codec.encode(x, key)[None]
        mean = codec.decode_mean(payloads, key, len(x))
        yield from payload_case(
            codec.task(len(x)), key, 0, 0, 1, 0, x, payloads, bytes_of(mean), mean.dtype
        )


def feedback() -> Iterator[bytes]:
    """Payloads of a tensor and a residual, and what the mean leaves of it."""
    quantizers = (QuicFL(4), QuicFL(2, FRACTION), Eden(2, biased=True), ECDQ(2), ECDQ(4))
    for number, (quantizer, block) in enumerate(product(quantizers, (32, 512, 4096))):
        ranks, key = 1 + number % 6, Key(number, step=7, bucket=11)
        own, numel = number % ranks, (3 * block, 3 * block - 13)[number % 2]
        codec = Codec(quantizer, 1 + number // 2 % 3, block)
        generator = torch.Generator().manual_seed(number)
        xs = torch.randn(ranks, numel, generator=generator).to(cpu.DTYPES[number % 3])
        before = torch.randn(numel, generator=generator) / 3
        if number % 4 == 3:  # too small beside the others to be taken together with them
            xs[own] *= 2.0**-20
            before *= 2.0**-80
        coder, after = codec.coder(numel), before.clone()
        payloads = torch.zeros(ranks, 1, coder.nbytes, dtype=torch.uint8)
        for rank, x in enumerate(xs):
            residual = Residual.of([after]) if rank == own else None
            coder.encode(x, key, 0, rank, ranks, payloads[rank], residual=residual)
        out, fed = xs[own].clone(), Feedback(Residual.of([after]), key, own, ranks, payloads[own])
        coder.decode(payloads, key, 0, 0, ranks, out, fed)
        yield from payload_case(
            *(codec.task(numel), key, 0, 0, ranks, own, xs[own], payloads[:, 0]),
            *(bytes_of(out), out.dtype, bytes_of(before), bytes_of(after)),
        )


def lattices() -> Iterator[bytes]:
    """From one block and less to three."""
    for number, (bits, block) in enumerate(product(range(1, 9), (32, 256, 4096))):
        ranks, numel = 1 + number % 5, (block - 3, 2 * block, 3 * block - 70)[number % 3]
        lattice = Lattice(bits, 1 + number // 2 % 3, block)
        generator = torch.Generator().manual_seed(number)
        xs = torch.randn(ranks, numel, generator=generator).double() * MAGNITUDES[number % 5]
        xs = xs.clamp(-3e38, 3e38).to(cpu.DTYPES[number % 3])
        if number % 4 == 1:
            xs[:, : block // 2] = 0
        if number % 6 == 5:
            xs[-1, -1] = math.inf
        key = Key(number, step=7, bucket=11)
        yield from lattice_case(lattice, key, 4096 * number, number % ranks, xs)


def lattice_case(
    lattice: Lattice, key: Key, offset: int, rank: int, xs: torch.Tensor
) -> Iterator[bytes]:
    """The three steps of one rank, given what all of them have, one row of xs each."""
    made, task = sum_of(lattice, [*xs], key, offset), LatticeTask(lattice, xs.shape[1], len(xs))
    yield bytes(
        Case(
            plans=len(task.sections),
            numel=task.numel,
            in_dtype=cpu.DTYPES.index(xs.dtype),
            out_dtype=cpu.DTYPES.index(xs.dtype),
            encoded=rank,
            world_size=len(xs),
            offset=offset,
            seed=key.seed,
            step=key.step,
            bucket=key.bucket,
            hop=key.hop,
            padded=task.padded,
            blocks=task.blocks,
            words=task.words,
            plan=(cpu.Plan * 2)(*lattice_cpu.plans_of(task)),
        )
    )
    of_rank = (xs[rank], made.ys[rank], made.exponents[rank], made.bounds, made.words[rank])
    yield from map(bytes_of, (*of_rank, made.total, made.mean))


def payload_case(
    task: Task,
    key: Key,
    offset: int,
    rank: int,
    world_size: int,
    encoded: int,
    x: torch.Tensor,
    payloads: torch.Tensor,
    mean: bytes,
    out_dtype: torch.dtype,
    before: bytes = b"",
    after: bytes = b"",
) -> Iterator[bytes]:
    """What the rank `encoded` sends of x, in payloads (K, nbytes) of ranks from `rank` on, the mean
    of these, and the residual before and after, if there is one."""
    plans = (cpu.Plan * 2)(*cpu.plans_of(task).array)
    for plan in plans:
        plan.levels = plan.positions = plan.boundaries = plan.half_norms = None
        plan.symbols = plan.slots = plan.registers = None  # the last is not of the baseline
    tables = _tables(task.quantizer)
    yield bytes(
        Case(
            plans=len(task.sections),
            numel=len(x),
            in_dtype=cpu.DTYPES.index(x.dtype),
            out_dtype=cpu.DTYPES.index(out_dtype),
            nbytes=payloads.shape[1],
            encoded=encoded,
            rank=rank,
            ranks=len(payloads),
            world_size=world_size,
            offset=offset,
            seed=key.seed,
            step=key.step,
            bucket=key.bucket,
            hop=key.hop,
            residual=len(before) // 4,
            tables=(ctypes.c_int64 * 6)(*map(len, tables)),
            plan=plans,
        )
    )
    yield from tables
    yield from (bytes_of(x), bytes_of(payloads), mean, before, after)


def bytes_of(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _tables(quantizer: Quantizer) -> list[bytes]:
    """In the order of `Plan`: levels, positions, boundaries, half_norms, symbols, slots."""
    table = quantizer.table  # type: ignore[attr-defined]
    levels, *others = ("levels", "centroids", "codewords"), "positions", "boundaries", "half_norms"
    names = (levels, *((name,) for name in (*others, "entries", "slots")))
    return [
        next((getattr(table, name).tobytes() for name in of if hasattr(table, name)), b"")
        for of in names
    ]


def all_cases() -> Iterator[bytes]:
    for number, facts in enumerate(cases()):
        yield from case(number, *facts)
    yield from golden()
    yield from units()
    yield from feedback()
    yield from lattices()


def write(path: Path, parts: Iterable[bytes]) -> None:
    """A file for driver.c."""
    torch.set_num_threads(1)
    with use(reference), path.open("wb") as file:
        file.write(bytes((ctypes.c_int64 * 2)(cpu.ABI, ctypes.sizeof(Case))))
        file.writelines(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    write(parser.parse_args().path, all_cases())
