"""The hook between two ranks in one process, bucket by bucket: (c) waits and (e) memory."""

import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from device.devices import Device
from device.results import Results
from device.tensors import numbers, same
from lib.twin import Bucket, Twin, mean_of_twins
from rhtcomm import Codec, Key
from rhtcomm.hooks import RHTState
from rhtcomm.hooks.configuration import codec_for

__all__ = ["ENGINES", "Twins", "codec_of", "memory", "twins", "waits"]

ENGINES = {"StreamEngine": True, "ThreadEngine": False}  # whether the transport enqueues
DTYPES = (torch.float32, torch.bfloat16)
PARAMETERS = 12  # in a bucket


def codec_of(bits: int = 4, quantizer: Any = "quic_fl") -> Codec:
    """That of an RHTState."""
    codec = codec_for(bits, quantizer, None, 4096, 0.0, False)
    assert isinstance(codec, Codec)
    return codec


class Twins:
    """A state of two ranks, and the steps that it took."""

    def __init__(self, engine: str, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        self.codec, self.steps = codec_of(**options), 0
        self._twin = Twin(self.codec, ENGINES[engine], group)
        self.state = RHTState(communicator=self._twin, min_numel=0, warmup_steps=0, **options)

    def submit(self, x: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """One bucket, which is a step."""
        self._twin.expect(self.key(self.steps), x.numel(), PARAMETERS)
        self.steps += 1
        return self.state.submit(Bucket.of(x, parameters=PARAMETERS))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return self.submit(x).wait()

    def key(self, step: int) -> Key:
        return Key(0, step)


@contextmanager
def twins(engine: str, group: dist.ProcessGroup | None = None, **options: Any) -> Iterator[Twins]:
    made = Twins(engine, group, **options)
    try:
        yield made
    finally:
        made.state.close()


def waits(device: Device, results: Results) -> None:
    """(c) Whether the host waits for the device in the steady state, and what a bucket costs it."""
    total = 0
    for quantizer in ("quic_fl", "eden"):
        for engine in ENGINES:
            numel = (device.chunk if quantizer == "eden" else device.bucket) // 4
            total += _steps_without_waits(engine, quantizer, numel, None, device, results)
    with _group_of_one(device) as group:
        numel = device.bucket // 4
        total += _steps_without_waits("StreamEngine", "quic_fl", numel, group, device, results)
    results.target("Runs of the hook in which the host waited for the device", total, 0, "")


@contextmanager
def _group_of_one(device: Device) -> Iterator[dist.ProcessGroup]:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo" if device.dry else "nccl",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
            device_id=None if device.dry else device.torch,
        )
        try:
            assert dist.group.WORLD is not None
            yield dist.group.WORLD
        finally:
            gc.collect()  # what refers to the group goes before it
            dist.destroy_process_group()


def _steps_without_waits(
    engine: str,
    quantizer: Any,
    numel: int,
    group: dist.ProcessGroup | None,
    device: Device,
    results: Results,
) -> int:
    steps, rounds = (30, 3) if not device.dry else (3, 1)
    x = numbers(numel, torch.float32)
    device_us = None
    with twins(engine, group, quantizer=quantizer) as two:
        buckets = [x.to(device.torch, copy=True) for _ in range(steps)]
        for _ in range(rounds):  # compiles, makes streams, pins memory
            two.submit(x.to(device.torch, copy=True)).wait()
        device.synchronize()
        seconds, first, error = [], two.steps, None
        try:
            with device.no_waits():
                futures = []
                for bucket in buckets:
                    start = time.perf_counter()
                    futures.append(two.submit(bucket))
                    seconds.append(time.perf_counter() - start)
                means = [future.wait() for future in futures]
        except RuntimeError as wait:
            error = " ".join(str(wait).split())
            results.failure(f"{engine}, {quantizer}: {error[:250]}")
        else:
            device.synchronize()
            for step in (0, steps - 1):
                expected = mean_of_twins(two.codec, x, two.key(first + step))
                if not same(means[step].cpu(), expected):
                    results.failure(f"{engine}, {quantizer}, step {step}: differs from the CPU's")
            own = x.to(device.torch, copy=True)
            device_us = 1e6 * device.queued_seconds(functools.partial(two.step, own), 5)

        results.row(
            "Buckets of the hook between two ranks in one process",
            engine=engine,
            exchange="NCCL, 1 rank" if group else "none",
            quantizer=quantizer,
            MiB=numel * 4 / 2**20,
            steps=len(seconds),
            **{"host waited": error is not None, "host, us a bucket": _median_us(seconds)},
            **{"device, us a bucket": device_us},
        )
    return int(error is not None)


def _median_us(seconds: list[float]) -> float:
    return 1e6 * statistics.median(seconds) if seconds else 0.0


def memory(device: Device, results: Results) -> None:
    """(e) The most device memory that a step of the hook takes, beyond gradients and tables."""
    sizes = (device.bucket, 10 * device.bucket) if not device.dry else (device.bucket,)
    for engine in ENGINES:
        for bits, dtype in ((4, torch.float32), (4, torch.bfloat16), (8, torch.float32)):
            worst = 0.0
            for nbytes in sizes:
                x = numbers(nbytes // dtype.itemsize, dtype, 0, device.torch)
                with twins(engine, bits=bits) as two:
                    two.step(x)
                    step = functools.partial(two.step, x)
                    extra = max(device.extra_bytes(step) for _ in range(3))
                limit = 0.6 * nbytes + (32 << 20)
                worst = max(worst, extra / limit)
                results.row(
                    "Device memory of a step beyond what was in use before",
                    engine=engine,
                    bits=bits,
                    dtype=str(dtype).removeprefix("torch."),
                    **{"bucket, MiB": nbytes / 2**20, "extra, MiB": extra / 2**20},
                    **{"of the bucket": f"{extra / nbytes:.0%}", "of the limit": extra / limit},
                )
            if bits == 4:
                text = f"Extra memory, {engine}, {str(dtype).removeprefix('torch.')}, b = 4, by "
                results.target(text + "0.6 of the bucket + 32 MiB", worst, 1.0, "")
