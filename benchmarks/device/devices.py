"""What is measured on: a GPU, or in a dry run the CPU in its place.

Both have the same methods. On the CPU the kernels run in Triton's interpreter, tensors are tiny,
and the clock is made up: every call takes a millisecond.
"""

import contextlib
import functools
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lib.processes import ROOT
from lib.waits import no_host_waits
from rhtcomm.hooks import engines
from rhtcomm.kernels import use

__all__ = ["Device", "device_for"]

MiB, GiB = 1 << 20, 1 << 30
CLOCKS = {
    "SM, MHz": "clocks.sm",
    "memory, MHz": "clocks.mem",
    "power, W": "power.draw",
    "temperature, C": "temperature.gpu",
    "state": "pstate",
}
Call = Callable[[], object]


class Gpu:
    """The first CUDA (or ROCm) device."""

    dry = False
    torch = torch.device("cuda", 0)
    # Bytes of a tensor; a chunk is what travels alone.
    chunk, bucket, large = 3 * MiB, 25 * MiB, GiB
    cache = 256 * MiB  # bytes that surely do not fit in the second-level cache
    steps = 200  # of a training in which something may go wrong
    rounds = 20  # of a measurement

    def __init__(self) -> None:
        torch.cuda.set_device(self.torch)

    def kernels(self) -> AbstractContextManager[object]:
        """Within it the codec runs the kernels of the device."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median of a call, all of them in one CUDA graph."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        taken = []
        for _ in range(self.rounds):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            taken.append(1e-3 * start.elapsed_time(stop) / len(calls))
        return statistics.median(taken)

    def queued_seconds(self, call: Call, calls: int = 20) -> float:
        """Of the device for one of several calls that were all queued before the first began."""
        call()
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(100_000_000)  # cycles, about 60 ms: the host is slower than the device
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop) / calls

    def extra_bytes(self, call: Call) -> int:
        """The most device memory that was in use within a call, beyond what was before it."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def no_waits(self) -> AbstractContextManager[object]:
        """Within it, what makes the host wait for the device raises (as far as torch knows)."""
        return no_host_waits()

    def delay(self, milliseconds: float) -> None:
        """Queue nothing but time on the current stream."""
        torch.cuda._sleep(int(1.5e6 * milliseconds))  # cycles

    def facts(self) -> dict[str, object]:
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory, GiB": round(properties.total_memory / GiB),
            "second-level cache, MiB": round(getattr(properties, "L2_cache_size", 0) / MiB),
            "driver": _nvidia_smi("driver_version")[0],
            "CUDA": torch.version.cuda or torch.version.hip,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            **_versions(),
        }

    def clocks(self, busy: Call | None = None) -> dict[str, str]:
        """As nvidia-smi reads them, while the device is busy with a call again and again."""
        if busy is not None:
            seconds = self.queued_seconds(busy, 3)
            for _ in range(min(5000, int(0.5 / max(seconds, 1e-6)))):
                busy()
        found = dict(zip(CLOCKS, _nvidia_smi(*CLOCKS.values()), strict=False))
        torch.cuda.synchronize()
        return found


class Cpu:
    """In its place in a dry run."""

    dry = True
    torch = torch.device("cpu")
    chunk, bucket, large = 16 << 10, 16 << 10, 32 << 10
    cache, steps, rounds = 0, 4, 1

    def kernels(self) -> AbstractContextManager[object]:
        from rhtcomm.kernels import gpu

        return use(gpu)

    def synchronize(self) -> None:
        pass

    def seconds(self, calls: Sequence[Call]) -> float:
        calls[0]()
        return 1e-3

    def queued_seconds(self, call: Call, calls: int = 1) -> float:
        call()
        return 1e-3

    def extra_bytes(self, call: Call) -> int:
        call()
        return 1024

    def no_waits(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def delay(self, milliseconds: float) -> None:
        pass

    def facts(self) -> dict[str, object]:
        return {"device": f"none ({platform.machine()} in its place)", **_versions()}

    def clocks(self, busy: Call | None = None) -> dict[str, str]:
        return dict.fromkeys(CLOCKS, "made up")


Device = Gpu | Cpu


@functools.cache
def device_for(dry: bool) -> Device:
    """Of this process.

    Raises:
        RuntimeError: there is no GPU.
    """
    if dry:
        sys.path.append(str(ROOT / "tests" / "lib"))
        from interpreter import mend  # which runs the kernels in the tests too

        mend()
        engines.Cuda = _NoStreams  # type: ignore[misc]
        return Cpu()
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU here, so nothing was measured; try --dry-run")
    return Gpu()


class _NoStreams(engines.Cuda):
    """What StreamEngine asks of CUDA, where everything happens at once."""

    class Stream:
        def wait_event(self, event: object) -> None:
            pass

    def new_stream(self, device: torch.device) -> Any:
        return self.Stream()

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def ready(self, device: torch.device) -> Any:
        return None

    def record_stream(self, x: torch.Tensor, stream: Any) -> None:
        pass

    def future(self, device: torch.device) -> torch.futures.Future[torch.Tensor]:
        return torch.futures.Future()


def _versions() -> dict[str, object]:
    import numpy
    import triton

    return {
        "torch": torch.__version__,
        "Triton": triton.__version__,
        "NumPy": numpy.__version__,
        "Python": sys.version.split()[0],
    }


def _nvidia_smi(*fields: str) -> list[str]:
    """What it says of the first device; nothing is set."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"unknown ({error})"] * len(fields)
    if done.returncode:
        return [f"unknown (nvidia-smi: {done.stdout.strip()[:80]})"] * len(fields)
    return [cell.strip() for cell in done.stdout.split(",")]
