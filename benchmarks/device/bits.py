"""(a) Payloads and means of the device against those that the C kernels of the CPU make."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import rhtcomm
from device.children import Failed, each
from device.devices import Device, device_for
from device.results import Results
from device.tensors import numbers, same
from rhtcomm.kernels import gpu, kernel_for
from rhtcomm.quantizers import Quantizer

__all__ = ["Case", "check", "more", "run"]

KEY = rhtcomm.Key(2**63 + 1, step=2**31 + 7, bucket=3, hop=1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = 2
TAIL = 777  # coordinates that are missing from the last block
TOGETHER = 4  # processes with tensors of 1 GiB: some 5 GiB of the host's memory each


@dataclass(frozen=True)
class Case:
    quantizer: Quantizer
    rotations: int
    dtype: torch.dtype
    size: str = "bucket"  # of `Device`
    tail: bool = False
    odd: bool = False
    """Whether some blocks hold infinity, NaN, zeros, the smallest and the largest numbers."""
    block: int = 4096

    @property
    def codec(self) -> rhtcomm.Codec:
        return rhtcomm.Codec(self.quantizer, self.rotations, self.block)

    @property
    def name(self) -> str:
        kind = f"{self.quantizer!r}, k = {self.rotations}, {str(self.dtype).removeprefix('torch.')}"
        return f"{kind}, {self.size}, block {self.block}" + (", odd" if self.odd else "")


def make_odd_(x: torch.Tensor, block: int) -> None:
    """One of the first blocks each, as far as there are so many."""
    rows = x[: x.numel() // block * block].view(-1, block)
    odd = [float("inf"), float("nan"), 0.0, -0.0, 1e-42, 1e38]
    for row, what in zip(rows, odd, strict=False):
        if what in (1e-42, 1e38):
            row.copy_(row.sign() * what)
        else:
            row[5 if what != 0 else slice(None)] = what


def tensors(case: Case, device: Device) -> list[torch.Tensor]:
    """Of the ranks, all different."""
    count = getattr(device, case.size) // case.dtype.itemsize
    count = max(1, count // case.block) * case.block - (TAIL % case.block if case.tail else 0)
    xs = [numbers(count, case.dtype, rank) for rank in range(RANKS)]
    xs[1] *= 0.3
    if case.odd:
        make_odd_(xs[0], case.block)
    return xs


def check(case: Case, dry: bool) -> None:
    """Raise AssertionError unless all bits are those of the CPU."""
    device, codec = device_for(dry), case.codec
    xs = tensors(case, device)
    payloads = torch.stack([codec.encode(x, KEY, i, RANKS) for i, x in enumerate(xs)])
    numel = xs[0].numel()
    mean = codec.decode_mean(payloads, KEY, numel, out=torch.empty_like(xs[0]))
    with device.kernels():
        kernel = kernel_for(device.torch, case.quantizer)
        assert kernel is gpu, f"the device runs {kernel} and not the Triton kernels"
        there = payloads.to(device.torch)
        for i, x in enumerate(xs):
            own = x.to(device.torch)
            found = torch.full_like(there[i], 0xA5)
            codec.encode(own, KEY, i, RANKS, out=found)
            assert same(found, there[i]), (
                f"encode differs from the CPU's: {_where(found, there[i])}"
            )
        out = torch.full_like(mean, 0.125, device=device.torch)
        codec.decode_mean(there, KEY, numel, out=out)
        expected = mean.to(device.torch)
        assert same(out, expected), f"decode differs from the CPU's: {_where(out, expected)}"


def _where(found: torch.Tensor, expected: torch.Tensor) -> str:
    wrong = ((found != expected) & ~(found.isnan() & expected.isnan())).nonzero().flatten()
    some = [(int(i), found[i].item(), expected[i].item()) for i in wrong[:3]]
    return f"{len(wrong)} of {len(found)} (index, found, expected: {some})"


def quantizers() -> dict[str, list[Quantizer]]:
    return {
        "QUIC-FL": [rhtcomm.QuicFL(b) for b in (4, 2, 1, 8, 3, 5, 6, 7)],
        "QUIC-FL, exact": [rhtcomm.QuicFL(b, 1 / 512) for b in (4, 2, 1, 8, 3, 5, 6, 7)],
        "EDEN": [rhtcomm.Eden(b) for b in (4, 2, 1, 8, 3, 5, 6, 7)],
        "vectors": [rhtcomm.VectorQuantizer(b) for b in (4, 2, 1)],
    }


def main_cases() -> Iterator[Case]:
    """Those that are timed, and that together span everything."""
    for dtype in (torch.float32, torch.bfloat16):
        for b, k in ((4, 2), (4, 1), (4, 3), (2, 2), (8, 2), (1, 2)):
            yield Case(rhtcomm.QuicFL(b), k, dtype)
    for i, quantizer in enumerate(q for kind in quantizers().values() for q in kind):
        yield Case(quantizer, 1 + i % 3, DTYPES[i // 3 % 3], "chunk", tail=True, odd=True)
    yield Case(rhtcomm.Eden(2, biased=True), 2, torch.float32, "chunk", tail=True)
    for block in (32, 1024, 8192, 16384):
        yield Case(rhtcomm.QuicFL(3), 2, torch.bfloat16, "chunk", tail=True, odd=True, block=block)


def product() -> Iterator[Case]:
    """Every quantizer, k and dtype at 25 MiB; the first third has each pair of two of them."""
    for turn in range(3):
        for kind in quantizers().values():
            for i, quantizer in enumerate(kind):
                for k in (1, 2, 3):
                    yield Case(quantizer, k, DTYPES[(i + k + turn) % 3])


def first_cases() -> list[Case]:
    third = itertools.islice(product(), 3 * sum(map(len, quantizers().values())))
    return list(dict.fromkeys([*main_cases(), *third]))


def other_cases() -> list[Case]:
    seen = {*first_cases()}
    return [case for case in product() if case not in seen]


def large_cases() -> Iterator[Case]:
    """1 GiB, tails too: each quantizer with some number of bits, transforms and dtype."""
    yield Case(rhtcomm.QuicFL(4), 2, torch.float32, "large", tail=True, odd=True)
    yield Case(rhtcomm.QuicFL(4), 2, torch.bfloat16, "large")
    yield Case(rhtcomm.QuicFL(8), 1, torch.float16, "large", tail=True)
    yield Case(rhtcomm.QuicFL(4, 1 / 512), 2, torch.float32, "large", tail=True)
    yield Case(rhtcomm.Eden(4), 2, torch.float32, "large", tail=True)
    yield Case(rhtcomm.QuicFL(1), 3, torch.bfloat16, "large")
    yield Case(rhtcomm.VectorQuantizer(4), 3, torch.float32, "large")


def run(device: Device, results: Results) -> None:
    children = _cores() * 3 // 4
    if device.dry:
        _check_all("25 MiB and smaller", first_cases()[::18], children, 1.0, device, results)
        _check_all("1 GiB", [*large_cases()][:1], children, 1.0, device, results)
        return
    _check_all("25 MiB and smaller", first_cases(), children, 0.75, device, results)
    _check_all("1 GiB", [*large_cases()], TOGETHER, 1.0, device, results)


def more(device: Device, results: Results) -> None:
    """The rest of the product, next to parts that are not timed."""
    cases = other_cases()[:: 60 if device.dry else 1]
    _check_all("25 MiB, the rest of the product", cases, _cores() // 2, 1.0, device, results)


def _cores() -> int:
    return max(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


def _check_all(
    what: str, cases: list[Case], children: int, share: float, device: Device, results: Results
) -> None:
    """`share`: of the time that is left, what these may take."""
    reserve, done, wrong = (1 - share) * results.left(), 0, 0
    outcomes = each(
        check,
        [(case, device.dry) for case in cases],
        children=children,
        threads=2 if children > TOGETHER else 4,
        seconds=60,
        left=lambda: results.left() - reserve,
    )
    by_kind: dict[str, int] = {}
    for (case, _), outcome in outcomes:
        done += 1
        if isinstance(outcome, Failed):
            wrong += 1
            results.failure(f"{case.name}: {outcome.reason}")
            print(outcome.trace, flush=True)
        else:
            kind = type(case.quantizer).__name__
            by_kind[kind] = by_kind.get(kind, 0) + 1
    results.row(
        "Codecs with all bits of the CPU",
        size=what,
        cases=len(cases),
        checked=done,
        **by_kind,
        wrong=wrong,
    )
    results.target(f"Codecs that differ from the CPU, {what}, of {done} checked", wrong, 0, "")
    if done < len(cases):
        results.say(f"{what}: no time was left for {len(cases) - done} of {len(cases)} cases")
