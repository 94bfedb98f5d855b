"""Observers get a report of each bucket and step, on the thread that trains, and hurt nobody."""

import contextlib
import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import Alone
from harness import Ranks
from models import Probe, all_equal, gradients_of, in_backward, net, wrapped
from outer import averager, wander
from problems import numbers
from sharded import FINE as FINE_SHARDS
from sharded import backward as backward_of_shards
from sharded import net as net_of_units
from sharded import sharded
from states import FINE, TIMEOUT, logged, submit
from streams import in_place_of_cuda
from torch.nn.parallel import DistributedDataParallel

from rhtcomm.hooks import (
    BucketReport,
    RHTState,
    Stats,
    compress_fsdp,
    register,
    reports,
    rht_hook,
    telemetry,
)

NUMELS, STEPS = (1 << 14, 5000, 100), 4
# Each parameter has a bucket of its own, from the first step on.
APART: dict[str, Any] = {"bucket_cap_mb": 0.0001, "find_unused_parameters": True}


def check_sums(seen: list[BucketReport], stats: Stats) -> None:
    """Against the totals, to the last bit, as both are sums in the same order."""
    for name in ("bytes_sent", "bytes_uncompressed", "squared_error", "squared_norm"):
        assert sum(getattr(report, name) for report in seen) == getattr(stats, name)
    for name in ("encode_seconds", "exchange_seconds", "decode_seconds"):
        assert sum(getattr(report, name) for report in seen) == getattr(stats, name)
    for count in (1, 2, 3):
        assert sum(report.rotations == count for report in seen) == stats.rotations[count]
    known = [report.exposed_seconds for report in seen if report.exposed_seconds is not None]
    assert sum(known) == (stats.exposed_seconds or 0)
    assert len(known) == sum(stats.waits.values())


class Seen(list[BucketReport]):
    """An observer that also notes on which threads it is called, and its end."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()
        self.closed = 0

    def __call__(self, report: BucketReport) -> None:
        self.append(report)
        self.threads.add(threading.get_ident())

    def close(self) -> None:
        self.closed += 1


def step_of(ddp: Any, rank: int, step: int) -> torch.Tensor:
    ddp.zero_grad()
    ddp(*(numbers(rank, step, i, shape=(n,)) for i, n in enumerate(NUMELS))).backward()
    return gradients_of(ddp)


def observe(rank: int, world_size: int, folder: str) -> Any:
    calls = []

    def broken(report: BucketReport) -> None:
        calls.append(report)
        raise OSError(f"disk {rank} is full")

    seen, path = Seen(), Path(folder, "run.csv")
    observer = [broken, seen, telemetry.csv(path), telemetry.csv(path, all_ranks=True)]
    ddp = DistributedDataParallel(Probe(*NUMELS), **APART)
    options: dict[str, Any] = {"min_numel": 1000, "nmse_every": 2, "warmup_steps": 2}
    handle = register(ddp, bits=4, observer=observer if rank == 0 else observer[1:], **options)
    with logged() as lines:
        for step in range(STEPS):
            step_of(ddp, rank, step)
            assert len(seen) == (step + 1) * len(NUMELS)  # when backward() returns
            text = path.with_name(f"run_rank{rank}.csv").read_text()  # though it is not closed
            assert len(text.splitlines()) == 1 + len(seen)
    assert seen.threads == {threading.get_ident()}
    assert len(calls) == (rank == 0)  # and dropped, while the others go on
    dropped = [line for line in lines if "observe.<locals>.broken raised" in line]
    assert len(dropped) == len(lines) == (rank == 0)
    check_sums(seen, handle.stats())
    assert [(r.step, r.last) for r in seen] == [
        (step, last) for step in range(STEPS) for last in (False, False, True)
    ]
    for report in seen:
        compressed = report.numel >= 1000
        assert report.bits == ((8 if report.step < 2 else 4) if compressed else 32)
        assert report.rotations == (2 if compressed else None)
        assert (report.nmse is not None) == (report.step % 2 == 0)
        assert report.rank == rank
        assert report.exposed_seconds is not None
        sent = report.bits * report.numel / 8
        assert sent <= report.bytes_sent <= 1.1 * sent + 200
        ratio = report.bytes_uncompressed / report.bytes_sent
        assert report.compression_ratio == ratio == pytest.approx(32 / report.bits, rel=0.15)
    assert sorted(r.numel for r in seen) == sorted(NUMELS * STEPS)
    assert len({(r.step, r.bucket) for r in seen}) == len(seen)
    figures = handle.figures()
    assert figures["rhtcomm/exposed_seconds"] == (handle.stats().exposed_seconds or 0) / STEPS
    handle.remove()
    assert seen.closed == 1
    mean = step_of(ddp, rank, STEPS)
    assert len(seen) == STEPS * len(NUMELS)
    return list(seen), mean


def test_observers_see_every_bucket_and_hurt_nobody(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.run(observe, 2, str(tmp_path))
    assert all_equal([mean for _, mean in outcomes])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.csv", "run_rank0.csv", "run_rank1.csv"}
    assert (tmp_path / "run.csv").read_text() == (tmp_path / "run_rank0.csv").read_text()
    for rank, (seen, _) in enumerate(outcomes):
        header, *rows = (tmp_path / f"run_rank{rank}.csv").read_text().splitlines()
        assert tuple(header.split(",")) == telemetry.COLUMNS
        assert len(rows) == len(seen)
        for row, report in zip(rows, seen, strict=True):
            for name, text in zip(telemetry.COLUMNS, row.split(","), strict=True):
                value = getattr(report, name)
                if name == "squared_norm" and report.nmse is None:
                    value = None
                expected = pytest.approx(value, rel=1e-5, abs=1e-7) if text else value
                assert (float(text) if text else None) == expected, name


# How long training waited ------------------------------------------------------------------------


@contextlib.contextmanager
def exchanges_begin_when_training_waits() -> Iterator[None]:
    """Within it, no bucket's exchange begins before somebody waits for its mean."""
    waiting = threading.Event()
    wait, mean_ = reports.wait_for, None

    def wait_for(future: Any) -> None:
        waiting.set()
        wait(future)

    with pytest.MonkeyPatch.context() as patch:
        from rhtcomm.reduce import Reducer

        mean_ = Reducer.mean_

        def late(*arguments: Any, **options: Any) -> Any:
            assert waiting.wait(60)
            return mean_(*arguments, **options)

        patch.setattr(Reducer, "mean_", late)
        patch.setattr(reports, "wait_for", wait_for)
        yield


def wait(rank: int, world_size: int) -> Any:
    """By step: none waits for its exchange, the first is hidden, all are hidden."""
    futures: list[Any] = []
    hidden = False

    def hook(state: Any, bucket: Any) -> Any:
        futures.append(rht_hook(state, bucket))
        if hidden:
            futures[-1].wait()
        return futures[-1]

    def during_backward(gradient: torch.Tensor) -> None:
        """Backward still has a layer to go, and takes longer than the first bucket."""
        if len(futures) % 2:
            futures[-1].wait()

    seen = Seen()
    with RHTState(**FINE, observer=seen, timeout=TIMEOUT) as state:
        model = net()
        ddp: Any = DistributedDataParallel(model, bucket_cap_mb=0.0001, find_unused_parameters=True)
        hook.__annotations__ = {}
        ddp.register_comm_hook(state, hook)
        x = numbers(rank, shape=(16, 32))
        ddp(x).sum().backward()
        buckets = len(futures)
        assert len(seen) == buckets == 4
        with exchanges_begin_when_training_waits():
            ddp(x).sum().backward()
        late = [report.exposed_seconds for report in seen[buckets:]]
        first: Any = model[0]  # type: ignore[index]
        handle = first.weight.register_hook(lambda _: [f.wait() for f in futures] and None)
        ddp(x).sum().backward()
        handle.remove()
        submitted_before = [report.exposed_seconds for report in seen[2 * buckets :]]
        hidden = True
        ddp(x).sum().backward()
        done = [report.exposed_seconds for report in seen[3 * buckets :]]
        assert state.stats().waits[0] >= buckets
    return late, submitted_before, done


def test_exposed_seconds_are_what_backward_did_not_hide(ranks: Ranks) -> None:
    for late, submitted_before, done in ranks.run(wait, 2):
        assert late[0] > 0
        # The hook of the first layer's weight comes after the buckets of the second layer.
        assert submitted_before[:2] == [0.0, 0.0]
        assert done == [0.0] * 4
