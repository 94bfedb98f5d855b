"""(b) Device time of encode and decode against a copy and the roofline; the cost model with it."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

import rhtcomm
from device.bits import Case, check
from device.children import Failed, each
from device.devices import Device, device_for
from device.results import Results
from device.small import SANITIZED, sanitize_one
from device.tensors import numbers
from rhtcomm.deferred import DeferredChecks
from rhtcomm.kernels import gpu
from rhtcomm.kernels.triton_kernels.hadamard import hadamard
from rhtcomm.kernels.triton_kernels.memory import round_to, to_float32
from rhtcomm.kernels.triton_kernels.order import to_memory, to_threads
from rhtcomm.planning.plan import plan
from rhtcomm.planning.probe import CodecSpeed
from rhtcomm.rotation import hadamard as reference_hadamard
from rhtcomm.wire import HEADER_BYTES

__all__ = ["VARIANTS", "compile_ahead", "run"]

KEY = rhtcomm.Key(seed=1)
DTYPES = (torch.float32, torch.bfloat16)
SIZES = {"large": "1 GiB", "bucket": "25 MiB", "chunk": "2.8 MiB (a chunk)"}
BLOCKS = (1024, 2048, 8192, 16384)
LINKS = (25, 100, 200, 400)  # Gbit/s
# Options of a launch in place of its own, by name: of Triton, and constants of the kernels. To
# compare another way to do something, give the kernels a constant for it. None may change a bit.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    **{f"{count} registers": {"maxnreg": count} for count in (128, 168)},
    **{f"{count} warps": {"num_warps": count, "WARPS": count} for count in (1, 4)},
}


@triton.jit
def hadamard_kernel(x, y, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr, WARPS: tl.constexpr):
    NEAR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    THREADS: tl.constexpr = min(32 * WARPS, SIZE // NEAR)
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    block = to_threads(to_float32(tl.load(x + index)), SIZE, NEAR, THREADS)
    block = to_memory(hadamard(block, SIZE, LOG_SIZE, NEAR, THREADS), SIZE, NEAR, THREADS)
    tl.store(y + index, round_to(block, y.dtype.element_ty, False))


# Variants ----------------------------------------------------------------------------------------


class _Changed:
    """A kernel that is launched with other options."""

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self._kernel, self._options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., object]:
        launch = self._kernel[grid]
        return lambda *args, **options: launch(*args, **{**options, **self._options})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Within it the kernels of blocks are launched with the options of a variant."""
    names = [name for name in ("encode_block", "decode_block") if hasattr(gpu, name)]
    kernels = {kernel: getattr(gpu, kernel) for kernel in names}
    try:
        if VARIANTS[name]:
            for kernel, own in kernels.items():
                setattr(gpu, kernel, _Changed(own, VARIANTS[name]))
        yield
    finally:
        for kernel, own in kernels.items():
            setattr(gpu, kernel, own)


def check_variant(name: str, case: Case, dry: bool) -> None:
    """Raise AssertionError unless its bits are those of the CPU; compiles it on the way."""
    with variant(name):
        check(case, dry)


def check_transform(dtype: torch.dtype, size: int, dry: bool) -> None:
    device = device_for(dry)
    x = numbers(64 * size if not dry else size, dtype, 0, device.torch)
    y = torch.full_like(x, 0.125)
    transform(x, y, size)()
    expected = reference_hadamard(x.cpu().float().view(-1, size)).flatten().to(dtype)
    assert torch.equal(y.cpu(), expected), f"the transform of {size} {dtype} differs"


def compile_ahead(device: Device, results: Results) -> None:
    """Check what is timed later, which fills Triton's cache on disk."""
    tasks: list[tuple[Any, ...]] = []
    main = [Case(rhtcomm.QuicFL(4), 2, dtype) for dtype in DTYPES]
    # Where a payload's codes do not begin at a multiple of 16 bytes, there are other kernels.
    tasks += [(check, replace(case, size="chunk"), device.dry) for case in main]
    for quantizer in (rhtcomm.QuicFL(2), rhtcomm.QuicFL(8), rhtcomm.Eden(4)):
        tasks += [(check, Case(quantizer, 2, torch.float32, "chunk"), device.dry)]
    tasks += [(check_transform, dtype, 4096, device.dry) for dtype in DTYPES]
    tasks += [
        (check_variant, name, case, device.dry)
        for case, name in itertools.product(main, filter(VARIANTS.get, VARIANTS))
    ]
    tasks += [(check_transform, dt, n, device.dry) for dt in DTYPES for n in (256, 1024, 16384)]
    tasks += [
        (check, Case(rhtcomm.QuicFL(4), 2, torch.float32, block=block), device.dry)
        for block in BLOCKS
    ]
    tasks += [(sanitize_one, quantizer, device.dry) for quantizer in SANITIZED]
    if device.dry:
        tasks = [tasks[0], *(task for task in tasks if task[0] is check_variant)][:2]
    for task, outcome in each(
        _call, tasks, children=2 if device.dry else 4, threads=2, seconds=90, left=results.left
    ):
        if isinstance(outcome, Failed):
            name = " ".join(str(part) for part in task[1:-1])
            results.failure(f"{task[0].__name__} {name}: {outcome.reason}")
            print(outcome.trace, flush=True)


def _call(function: Callable[..., Any], *args: object) -> None:
    function(*args)


# Times -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds of the device, and what either moves."""

    encode: float
    decode: float  # K = 1
    decode_two: float
    read: int  # bytes of the tensor
    sent: int  # bytes of a payload without its header

    def shares(self, rate: float) -> tuple[float, float, float]:
        """Of the roofline: encode, decode of one payload and of two."""
        one = (self.read + self.sent) / rate
        two = (self.read + 2 * self.sent) / rate
        return one / self.encode, one / self.decode, two / self.decode_two


def times(case: Case, device: Device) -> Times:
    """Of the kernels alone, without headers."""
    nbytes = getattr(device, case.size)
    codec = case.codec
    x = numbers(nbytes // case.dtype.itemsize, case.dtype, 0, device.torch)
    copies = max(4, -(-device.cache // nbytes)) if nbytes < device.cache else 1
    xs = [x.clone() for _ in range(copies)]
    with device.kernels():
        payload = codec.encode(x, KEY)
    pairs = [torch.stack([payload, payload]) for _ in range(copies)]
    task, origin = codec.task(x.numel()), (KEY, 0, 0)
    encodes, decodes, twos = [], [], []
    for tensor, pair in zip(xs, pairs, strict=True):
        encodes.append(functools.partial(gpu.encode, task, *origin, 1, tensor, pair[:1]))
        decodes.append(functools.partial(gpu.decode, task, *origin, 1, pair[:1, None], tensor))
        twos.append(functools.partial(gpu.decode, task, *origin, 2, pair[:, None], tensor))
    return Times(
        device.seconds(encodes),
        device.seconds(decodes),
        device.seconds(twos),
        x.nbytes,
        payload.numel() - HEADER_BYTES,
    )


def copy_seconds(nbytes: int, device: Device) -> float:
    copies = max(4, -(-device.cache // nbytes)) if nbytes < device.cache else 1
    x = numbers(nbytes // 4, torch.float32, 0, device.torch)
    pairs = [(x.clone(), torch.empty_like(x)) for _ in range(copies)]
    calls = [functools.partial(to.copy_, x) for x, to in pairs]
    return device.seconds(calls * (4 if copies == 1 else 1))


def transform(x: torch.Tensor, y: torch.Tensor, size: int) -> Callable[[], object]:
    launch = hadamard_kernel[(x.numel() // size,)]
    warps = gpu.warps_for(size)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return functools.partial(launch, x, y, size, size.bit_length() - 1, warps, **options)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernel_row(case: Case, rate: float, device: Device, results: Results) -> Times:
    found = times(case, device)
    encode, decode, two = found.shares(rate)
    copy = 2 * found.read / rate
    results.row(
        "QUIC-FL, the kernels alone",
        size=SIZES[case.size],
        dtype=_name(case.dtype),
        k=case.rotations,
        b=case.quantizer.bits,
        **{
            "encode, us": 1e6 * found.encode,
            "encode, of roofline": f"{encode:.0%}",
            "encode, by copy": found.encode / copy,
            "decode K = 1, us": 1e6 * found.decode,
            "decode K = 1, of roofline": f"{decode:.0%}",
            "decode K = 1, by copy": found.decode / copy,
            "decode K = 2, us": 1e6 * found.decode_two,
            "decode K = 2, of roofline": f"{two:.0%}",
        },
    )
    if case.size == "large" and case.quantizer.bits == 4 and case.rotations < 3:
        goal, must = (0.7, 0.55) if case.rotations == 2 else (0.85, 0.7)
        for what, share in (("Encode", encode), ("Decode K = 1", decode)):
            text = f"{what}, 1 GiB, {_name(case.dtype)}, b = 4, k = {case.rotations}, of roofline"
            results.target(text, share, goal, "%", must=must, least=True)
    if case.size == "bucket" and (case.quantizer.bits, case.rotations) == (4, 2):
        seconds = found.encode + found.decode_two
        text = f"Encode and decode of two payloads, 25 MiB, {_name(case.dtype)}, b = 4, k = 2"
        results.target(text, 1e6 * seconds, 120, "us")
    return found


def main_table(rate: float, device: Device, results: Results) -> None:
    for size, k in (*itertools.product(("large", "bucket"), (2, 1)), ("chunk", 2)):
        for dtype in DTYPES:
            kernel_row(Case(rhtcomm.QuicFL(4), k, dtype, size), rate, device, results)


def more_rows(rate: float, device: Device, results: Results) -> None:
    cases = [Case(rhtcomm.QuicFL(4), 3, dtype, "large") for dtype in DTYPES]
    for b, size in itertools.product((2, 8, 1), ("bucket", "large")):
        cases += [Case(rhtcomm.QuicFL(b), 2, dtype, size) for dtype in DTYPES]
    for case in cases[: 1 if device.dry else None]:
        if results.left() < 10:
            results.say("no time was left for all rows of other b and k")
            return
        kernel_row(case, rate, device, results)


def transform_table(rate: float, device: Device, results: Results) -> None:
    for size, dtype in itertools.product((4096, 16384, 1024, 256), DTYPES):
        nbytes = device.large
        x = numbers(nbytes // dtype.itemsize, dtype, 0, device.torch)
        x = x[: x.numel() // size * size]
        y = torch.empty_like(x)
        ratio = device.seconds([transform(x, y, size)] * 4) / (2 * x.nbytes / rate)
        results.row(
            "The transform alone, without signs, 1 GiB read and written",
            block=size,
            dtype=_name(dtype),
            **{"by copy": ratio},
        )
        if size == 4096:
            results.target(f"The transform of 4096, {_name(dtype)}, by a copy", ratio, 1.15, "")
        if device.dry:
            return


def variants_table(rate: float, device: Device, results: Results) -> None:
    cases = [Case(rhtcomm.QuicFL(4), k, dtype, "large") for k in (2, 1) for dtype in DTYPES]
    if device.dry:
        cases = cases[:1]
    for case, name in itertools.product(cases, list(VARIANTS)[: 2 if device.dry else None]):
        if case.rotations == 1 and "warps" in name:
            continue
        if results.left() < 10:
            results.say("no time was left for all variants")
            return
        cells = {"encode": "", "decode K = 1": ""}
        try:
            with variant(name):
                encode, decode, _ = times(case, device).shares(rate)
            cells = {"encode": f"{encode:.0%}", "decode K = 1": f"{decode:.0%}"}
        except (RuntimeError, triton.TritonError) as error:
            cells["encode"] = f"{type(error).__name__}: {error}"[:80]
        results.row(
            "Variants of the launch, b = 4, 1 GiB, share of the roofline",
            dtype=_name(case.dtype),
            k=case.rotations,
            variant=name,
            **cells,
        )


def call_rows(device: Device, results: Results) -> None:
    """Whole calls with headers and checks, as the hook makes them: time of the device."""
    codecs = [rhtcomm.Codec(rhtcomm.QuicFL(4)), rhtcomm.Codec(rhtcomm.ECDQ(4))]
    cases = list(itertools.product(codecs, DTYPES))
    for codec, dtype in cases[: 1 if device.dry else None]:
        x = numbers(device.bucket // dtype.itemsize, dtype, 0, device.torch)
        with device.kernels():
            coder = codec.coder(x.numel(), 1, device.torch)
            pair = torch.empty(2, 1, coder.nbytes, dtype=torch.uint8, device=device.torch)
            for rank in range(2):
                coder.encode(x, KEY, 0, rank, 2, pair[rank])
            checks = DeferredChecks()

            def decode(coder: Any = coder, pair: Any = pair, x: Any = x, c: Any = checks) -> None:
                with c.deferring():
                    coder.decode(pair, KEY, 0, 0, 2, x)

            encode = functools.partial(coder.encode, x, KEY, 0, 0, 2, pair[0])
            results.row(
                "Whole calls for 25 MiB, b = 4, with headers, us of the device",
                quantizer=type(codec.quantizer).__name__,
                k=codec.default_rotations,
                dtype=_name(dtype),
                encode=1e6 * device.queued_seconds(encode),
                **{"decode K = 2": 1e6 * device.queued_seconds(decode)},
            )


def cost_table(device: Device, results: Results) -> None:
    """The cost model of rhtcomm/planning/cost.py with the codec's times for chunks."""
    speeds = {}
    for bits in (4, 2) if not device.dry else (4,):
        case = Case(rhtcomm.QuicFL(bits), 2, torch.float32, "chunk")
        found = times(case, device)
        x = torch.empty(found.read // 4, device=device.torch)
        half = torch.empty_like(x, dtype=torch.bfloat16)
        cast = device.seconds([lambda h=half, x=x: (h.copy_(x), x.copy_(h))])  # type: ignore[misc]
        more = max(0.0, found.decode_two - found.decode)
        each = 4 / found.read
        speeds[bits] = CodecSpeed(
            found.encode * each, found.decode * each, more * each, cast * each
        )
    for ranks, link in itertools.product((2, 8), LINKS):
        planned = plan(25 << 18, ranks, link, bits=tuple(speeds), max_nmse=1.0, speeds=speeds)
        by_name = {p.name: p for p in planned.predictions}
        plain = by_name["float32"].seconds, by_name["bf16"].seconds
        best = {b: min(p.seconds for p in planned.predictions if p.bits == b) for b in speeds}
        gains = plain[0] / best[4], plain[1] / best[4]
        results.row(
            "The cost model with these times of a chunk, 50 us a message, a bucket of 25 MiB",
            ranks=ranks,
            **{"Gbit/s": link, "float32, ms": 1e3 * plain[0], "bf16, ms": 1e3 * plain[1]},
            **{f"{bits} bits, ms": 1e3 * seconds for bits, seconds in best.items()},
            **{"4 bits gain over float32": gains[0], "over bf16": gains[1]},
        )
        if (ranks, link) == (2, 100):
            text = "100 Gbit/s, 2 ranks, 25 MiB, 4 bits, by the cost model: gain over "
            results.target(text + "float32", gains[0], 5, "", least=True)
            results.target(text + "bfloat16", gains[1], 2.5, "", least=True)


def blocks_table(rate: float, device: Device, results: Results) -> None:
    """Other blocks than 4096, for which the first call looks for the best number of warps."""
    for block in BLOCKS[: 1 if device.dry else None]:
        if results.left() < 8:
            results.say("no time was left for all blocks")
            return
        gpu.tuner.fastest.clear()  # what was found for another size
        case = Case(rhtcomm.QuicFL(4), 2, torch.float32, "large", block=block)
        encode, decode, _ = times(case, device).shares(rate)
        results.row(
            "Other blocks, b = 4, k = 2, 1 GiB of float32, warps by measurement",
            block=block,
            encode=f"{encode:.0%}",
            **{"decode K = 1": f"{decode:.0%}"},
            warps=", ".join(map(str, gpu.tuner.fastest.values())),
        )


def run(device: Device, results: Results) -> None:
    with device.kernels():
        for dtype in DTYPES:
            check(Case(rhtcomm.QuicFL(4), 2, dtype, tail=device.dry), device.dry)
        seconds = copy_seconds(device.large, device)
        rate = 2 * device.large / seconds
        small = 2 * device.bucket / copy_seconds(device.bucket, device)
        results.say(
            f"a device-to-device copy of 1 GiB moves {rate / 1e12:.2f} TB/s, read and written; one "
            f"of 25 MiB {small / 1e12:.2f} TB/s"
        )
        results.fact(**{"copy, TB/s": f"{rate / 1e12:.2f}"})
        main_table(rate, device, results)
        x = numbers(device.large // 4, torch.float32, 0, device.torch)
        codec = rhtcomm.Codec(rhtcomm.QuicFL(4))
        clocks = device.clocks(functools.partial(codec.encode, x, KEY))
        del x
        results.row("Clocks", when="while 1 GiB is encoded again and again", **clocks)
        transform_table(rate, device, results)
        cost_table(device, results)
        call_rows(device, results)
        variants_table(rate, device, results)
        more_rows(rate, device, results)
        blocks_table(rate, device, results)
        again = 2 * device.large / copy_seconds(device.large, device)
        results.say(f"the copy of 1 GiB again, at the end: {again / 1e12:.2f} TB/s")
