"""The Triton kernels on a GPU: bits first, then times against what the memory allows.

    python benchmarks/gpu.py                     all of it, in less than ten minutes
    python benchmarks/gpu.py --quick             b = 4 and k = 2 alone
    python benchmarks/gpu.py --warps 1 2 4 8     compare numbers of warps per program, b = 4, k = 2

A row is printed only after encode and decode gave, on a whole bucket, the bits of the CPU's
kernels. Times are of the device alone: many calls in a CUDA graph, over as many tensors as do not
fit in the second-level cache. The floor of a row is the time that its bytes (each input read once,
each output written once) take at the rate of a device-to-device copy of 1 GiB in the same run; its
share of the roofline is the floor over the time.
"""

import argparse
import functools
import itertools
import json
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the package is not installed

import torch

import rhtcomm
from lib.processes import ROOT, TRAINER, torchrun
from lib.report import table
from rhtcomm.deferred import DeferredChecks
from rhtcomm.wire import HEADER_BYTES

try:
    import triton
    import triton.language as tl

    from rhtcomm.kernels import gpu
    from rhtcomm.kernels.triton_kernels.hadamard import hadamard
    from rhtcomm.kernels.triton_kernels.memory import round_to, to_float32
except ImportError as missing:
    sys.exit(f"benchmarks/gpu.py needs Triton ({missing}): pip install 'rhtcomm[gpu]'")

KEY = rhtcomm.Key(seed=1)
BITS, ROTATIONS = (1, 2, 4, 8), (1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16)
SIZES = {"25 MiB": 25 << 20, "1 GiB": 1 << 30}  # bytes of the tensor
CACHE = 256 << 20  # bytes that surely do not fit in the second-level cache
TARGET = 0.6


@triton.jit
def hadamard_kernel(x, y, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    transformed = hadamard(to_float32(tl.load(x + index)), SIZE, LOG_SIZE)
    tl.store(y + index, round_to(transformed, y.dtype.element_ty))


def device_time(calls: Iterable[Callable[[], object]], rounds: int = 20) -> float:
    """Median seconds of a call, all of them in one CUDA graph."""
    calls = list(calls)
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        seconds.append(1e-3 * start.elapsed_time(stop) / len(calls))
    return statistics.median(seconds)


def copy_rate() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 1 GiB."""
    x = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / device_time([functools.partial(y.copy_, x)] * 4)


def numbers(nbytes: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """On the CPU, so that both sides have the same."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randn(1 << 22, generator=generator)
    count = nbytes // dtype.itemsize
    return some.repeat(-(-count // some.numel()))[:count].to(dtype)


@dataclass(frozen=True)
class Case:
    bits: int
    rotations: int
    dtype: torch.dtype
    block: int = 4096

    @property
    def codec(self) -> rhtcomm.Codec:
        return rhtcomm.Codec(rhtcomm.QuicFL(self.bits), self.rotations, self.block)

    def check(self, nbytes: int) -> None:
        """Raise unless a payload and the mean of two have the bits that the CPU gives them."""
        x = numbers(nbytes, self.dtype)
        x = x[: x.numel() - 777]  # a tail block too
        on_gpu = x.cuda()
        payloads = [self.codec.encode(x, KEY, rank, 2) for rank in range(2)]
        for rank, payload in enumerate(payloads):
            if not torch.equal(self.codec.encode(on_gpu, KEY, rank, 2).cpu(), payload):
                raise AssertionError(f"encode differs from the CPU's: {self}")
        stacked = torch.stack(payloads)
        mean = self.codec.decode_mean(stacked, KEY, x.numel(), out=torch.empty_like(x))
        on_gpu.fill_(float("nan"))
        self.codec.decode_mean(stacked.cuda(), KEY, x.numel(), out=on_gpu)
        if not torch.equal(on_gpu.cpu(), mean):
            raise AssertionError(f"decode differs from the CPU's: {self}")

    def times(self, nbytes: int) -> tuple[float, float, int]:
        """Seconds of encode and of decode (K = 1), and the bytes that either must move."""
        codec, x = self.codec, numbers(nbytes, self.dtype).cuda()
        payload = codec.encode(x, KEY)
        copies = max(4, -(-CACHE // nbytes)) if nbytes < CACHE else 1
        xs = [x.clone() for _ in range(copies)]
        payloads = [payload.clone() for _ in range(copies)]
        task, origin = codec.task(x.numel()), (KEY, 0, 0, 1)
        encodes, decodes = [], []
        for tensor, target in zip(xs, payloads, strict=True):
            encodes.append(functools.partial(gpu.encode, task, *origin, tensor, target[None]))
            decodes.append(functools.partial(gpu.decode, task, *origin, target[None, None], tensor))
        moved = x.nbytes + payload.numel() - HEADER_BYTES
        return device_time(encodes), device_time(decodes), moved


def compile_case(case: Case) -> None:
    """Fill Triton's cache on disk; several processes do so at once."""
    x = torch.randn(20 * case.block - 777, device="cuda").to(case.dtype)
    whole = x[: 16 * case.block]  # kernels differ where rows do not begin at multiples of 16 bytes
    payload = case.codec.encode(whole, KEY)
    case.codec.decode_mean(payload[None], KEY, whole.numel(), out=whole)
    case.codec.decode_mean(case.codec.encode(x, KEY)[None], KEY, x.numel(), out=x)


def compile_all(cases: list[Case]) -> None:
    start = time.perf_counter()
    jobs = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(jobs, mp_context=mp.get_context("spawn")) as pool:
        list(pool.map(compile_case, cases))
    print(f"{len(cases)} pairs of kernels compiled in {time.perf_counter() - start:.0f} s\n")


def kernel_tables(cases: list[Case], rate: float) -> list[list[str]]:
    """Prints a table a size; returns the rows of b = 4 and k = 2 of the largest."""
    summary = []
    header = ["dtype", "k", "b", "encode, us", "of roofline", "to copy", "decode, us"]
    header += ["of roofline", "to copy"]
    for size, nbytes in SIZES.items():
        rows = []
        for case in cases:
            encode, decode, moved = case.times(nbytes)
            copy = 2 * nbytes / rate
            rows.append([str(case.dtype).removeprefix("torch."), str(case.rotations)])
            rows[-1].append(str(case.bits))
            for what, seconds in (("encode", encode), ("decode, K = 1", decode)):
                share = moved / rate / seconds
                rows[-1] += [f"{1e6 * seconds:.1f}", f"{share:.0%}", f"{seconds / copy:.2f}"]
                if size == "1 GiB" and (case.bits, case.rotations) == (4, 2):
                    met = "met" if share >= TARGET else "missed"
                    summary.append([what, rows[-1][0], f"{share:.0%}", f"{TARGET:.0%}", met])
        print(f"QUIC-FL, a tensor of {size}:\n\n{table(header, rows)}", flush=True)
    return summary


def hadamard_table(rate: float) -> None:
    rows = []
    for dtype, size in itertools.product(DTYPES, (256, 1024, 4096, 16384)):
        nbytes = SIZES["1 GiB"]
        x = numbers(nbytes, dtype).cuda()
        y = torch.empty_like(x)
        warps = gpu.warps_for(rhtcomm.QuicFL(4), size)
        launch = hadamard_kernel[(x.numel() // size,)]
        log_size = size.bit_length() - 1
        call = functools.partial(
            launch, x, y, size, log_size, num_warps=warps, enable_fp_fusion=False
        )
        call()
        expected = rhtcomm.rotation.hadamard(x[: 64 * size].cpu().float().view(-1, size))
        if not torch.equal(y[: 64 * size].cpu(), expected.flatten().to(dtype)):
            raise AssertionError(f"the transform of {size} differs from the CPU's")
        seconds, floor = device_time([call] * 4), 2 * nbytes / rate
        rows.append([str(dtype).removeprefix("torch."), str(size)])
        rows[-1] += [f"{1e6 * seconds:.0f}", f"{floor / seconds:.0%}"]
    print("The transform alone, without signs, 1 GiB read and written:\n")
    print(table(["dtype", "block", "time, us", "of the copy's rate"], rows), flush=True)


def call_table() -> None:
    """What a call costs the host, which must stay ahead of the device."""
    codec, x = rhtcomm.Codec(rhtcomm.QuicFL(4)), torch.randn(25 << 18, device="cuda")
    payload = codec.encode(x, KEY)[None]
    checks = DeferredChecks()
    rows = []
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(x, KEY),
        "decode_mean, K = 1": lambda: codec.decode_mean(payload, KEY, x.numel(), out=x),
    }
    for name, call in calls.items():
        seconds = []
        for _ in range(50):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with checks.deferring():
                call()
            seconds.append(time.perf_counter() - start)
            checks.raise_failed(wait=True)
        rows.append([name, f"{1e6 * statistics.median(seconds):.0f}"])
    print("Time that the host needs to launch a call for 25 MiB of float32:\n")
    print(table(["", "us"], rows), flush=True)


def warps_table(warps: list[int], rate: float) -> None:
    rows, chosen = [], gpu.warps_for
    for dtype, count in itertools.product(DTYPES, warps):
        gpu.warps_for = lambda quantizer, size, count=count: count
        encode, decode, moved = Case(4, 2, dtype).times(SIZES["1 GiB"])
        rows.append([str(dtype).removeprefix("torch."), str(count)])
        rows[-1] += [f"{moved / rate / seconds:.0%}" for seconds in (encode, decode)]
    gpu.warps_for = chosen
    print("Share of the roofline, b = 4, k = 2, 1 GiB, blocks of 4096:\n")
    print(table(["dtype", "warps", "encode", "decode, K = 1"], rows))


def blocks_table(rate: float) -> None:
    """Other blocks than 4096, for which the first call looks for the best number of warps."""
    rows = []
    for block in (1024, 2048, 8192, 16384):
        case = Case(4, 2, torch.float32, block)
        case.check(SIZES["25 MiB"])
        gpu.tuner.fastest.clear()  # what was found for another size
        encode, decode, moved = case.times(SIZES["1 GiB"])
        rows.append([str(block)])
        rows[-1] += [f"{moved / rate / seconds:.0%}" for seconds in (encode, decode)]
        rows[-1].append(", ".join(map(str, gpu.tuner.fastest.values())))
    print("Share of the roofline, b = 4, k = 2, 1 GiB of float32, warps by measurement:\n")
    print(table(["block", "encode", "decode, K = 1", "warps of each"], rows), flush=True)


def training_table(steps: int) -> None:
    """Two ranks on this GPU over Gloo; a functional test, no measurement."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in {
            "float32": ["--hook=none"],
            "rhtcomm, 4 bits": ["--hook=rht", "--bits=4"],
            "rhtcomm, 2 bits": ["--hook=rht", "--bits=2"],
        }.items():
            path = Path(folder) / "summary.json"
            model = ["--layers=4", "--width=128", "--heads=4", f"--steps={steps}", "--warmup=10"]
            command = [*torchrun(2), TRAINER, "--backend=gloo", "--device=cuda", *model]
            command += [f"--summary={path}", *options]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=180
            )
            if done.returncode:
                raise AssertionError(f"training by {name} failed:\n{done.stdout}\n{done.stderr}")
            summary: dict[str, Any] = json.loads(path.read_text())
            rows.append([name, loss_of(summary)])
    print(f"Two ranks on one GPU over Gloo, {steps} steps of the demo model:\n")
    print(table(["gradients", "validation loss, nats a byte"], rows), flush=True)


def loss_of(summary: dict[str, Any]) -> str:
    loss = float(summary["final_val_loss"])
    if not loss < 3:  # 5.5 untrained, 2.7 on CPU
        raise AssertionError(f"the model did not learn: {summary}")
    return f"{loss:.4f}"


def heading() -> str:
    properties = torch.cuda.get_device_properties(0)
    return (
        f"# benchmarks/gpu.py {' '.join(sys.argv[1:])}\n\n{properties.name}, "
        f"{properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB; CUDA {torch.version.cuda or torch.version.hip}"
        f", torch {torch.__version__}, Triton {triton.__version__}, Python "
        f"{sys.version.split()[0]}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="b = 4 and k = 2 alone")
    parser.add_argument("--warps", type=int, nargs="+", help="compare these, and nothing else")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: there is no GPU here, so nothing was measured")
    print(heading())
    rate = copy_rate()
    print(f"A device-to-device copy of 1 GiB moves {rate / 1e12:.2f} TB/s, read and written.\n")
    if arguments.warps:
        warps_table(arguments.warps, rate)
        return
    bits, rotations = ((4,), (2,)) if arguments.quick else (BITS, ROTATIONS)
    cases = [Case(b, k, dtype) for dtype in DTYPES for k in rotations for b in bits]
    compile_all(cases)
    for case in cases:
        case.check(SIZES["25 MiB"])
        if (case.bits, case.rotations) == (4, 2):
            case.check(SIZES["1 GiB"])
    print(f"{len(cases)} codecs have the bits of the CPU at 25 MiB, b = 4 and k = 2 at 1 GiB.\n")
    summary = kernel_tables(cases, rate)
    blocks_table(rate)
    hadamard_table(rate)
    call_table()
    training_table(arguments.steps)
    print("b = 4, k = 2, 1 GiB, of the roofline:\n")
    print(table(["", "dtype", "reached", "target", ""], summary))


if __name__ == "__main__":
    main()
