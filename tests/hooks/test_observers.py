"""Observers get a report of each bucket and step, on the thread that trains, and hurt nobody."""

import contextlib
import copy
import itertools
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import Alone
from harness import Ranks, limit
from models import Probe, all_equal, backward, gradients_of, in_backward, net, wrapped
from outer import averager, wander
from problems import numbers
from sharded import FINE as FINE_SHARDS
from sharded import backward as backward_of_shards
from sharded import net as net_of_units
from sharded import sharded
from states import FINE, TIMEOUT, logged, submit
from streams import AUTOGRADS, in_place_of_cuda
from torch.nn.parallel import DistributedDataParallel

from rhtcomm import Key
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
from rhtcomm.hooks.buckets import Bucket
from rhtcomm.hooks.cuda import Cuda
from rhtcomm.hooks.stats import Totals
from rhtcomm.reduce import Reducer, Report

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
    with logged() as lines, pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "monotonic", itertools.count(10).__next__)
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
    wait, mean_ = reports.wait_for, Reducer.mean_

    def wait_for(future: Any) -> None:
        waiting.set()
        wait(future)

    with pytest.MonkeyPatch.context() as patch:

        def late(*arguments: Any, **options: Any) -> Any:
            assert waiting.wait(limit(30))
            return mean_(*arguments, **options)

        patch.setattr(Reducer, "mean_", late)
        patch.setattr(reports, "wait_for", wait_for)
        yield


def wait(rank: int, world_size: int) -> Any:
    """Exposed seconds by step: of exchanges that begin late, that backward hides, that are done."""
    futures: list[Any] = []
    hidden: list[int] = []  # how many buckets were handed over before backward's last layer
    at_once = False

    def hook(state: Any, bucket: Any) -> Any:
        futures.append(rht_hook(state, bucket))
        if at_once:
            futures[-1].wait()
        return futures[-1]

    def in_the_first_layer(gradient: torch.Tensor) -> None:
        """Backward takes longer than the buckets of the second layer."""
        hidden.append(len(futures))
        for future in futures:
            future.wait()

    seen, model = Seen(), net()
    with RHTState(**FINE, observer=seen, timeout=TIMEOUT) as state:
        hook.__annotations__ = {"return": torch.futures.Future[torch.Tensor]}
        ddp = wrapped(model, state, hook, **APART)
        steps = []

        def step() -> None:
            seen.clear()
            futures.clear()
            backward(ddp, rank)
            assert len(seen) == len(futures) > 1
            steps.append([report.exposed_seconds for report in seen])

        step()
        with exchanges_begin_when_training_waits():
            step()
        handle = model[0].weight.register_hook(in_the_first_layer)  # type: ignore[index,union-attr]
        step()
        handle.remove()
        at_once = True
        step()
    return steps[1:], hidden


def test_exposed_seconds_are_what_backward_did_not_hide(ranks: Ranks) -> None:
    for (late, hidden, done), (count,) in ranks.run(wait, 2):
        assert late[0] > 0
        assert hidden[:count] == [0.0] * count != []
        assert done == [0.0] * len(done) != []


def measure_on_streams(rank: int, world_size: int, enqueues: bool) -> None:
    """A device tells later, by moments of the stream that trains: 1 apart in this stand-in."""
    seen = Seen()
    with in_place_of_cuda(enqueues) as streams:
        ddp = DistributedDataParallel(Probe(*NUMELS), **APART)
        handle = register(ddp, observer=seen, **FINE)
        for step in range(3):
            streams.behind = step == 1
            step_of(ddp, rank, step)
            assert len(seen) == len(NUMELS) * (1, 1, 3)[step]
            asked = [(what, stream) for what, stream, _ in streams.log if "moment" in what]
            assert len(asked) == 2 * len(NUMELS) * (step + 1)
            assert {stream for _, stream in asked} == {AUTOGRADS}
        streams.behind = True
        step_of(ddp, rank, 3)
        streams.host_may_wait = True
        handle.close()
    assert [report.step for report in seen] == [i for i in range(4) for _ in NUMELS]
    assert {report.exposed_seconds for report in seen} == {1.0}
    check_sums(seen, handle.stats())


@pytest.mark.parametrize("enqueues", [True, False])
def test_a_device_tells_later_how_long_its_stream_waited(enqueues: bool, ranks: Ranks) -> None:
    ranks.run(measure_on_streams, 2, enqueues)


def test_the_end_of_a_turn_is_measured() -> None:
    """Where a communicator is not the hook's own, the backward pass waits before DDP does."""
    seen = Seen()
    with RHTState(communicator=Alone(), observer=seen) as state:
        submit(state, torch.zeros(10)).wait()
        with exchanges_begin_when_training_waits():
            in_backward(lambda: submit(state, torch.zeros(10)))
    assert [report.exposed_seconds is None for report in seen] == [True, False]
    assert seen[1].exposed_seconds > 0  # type: ignore[operator]


def begin_a_static_graph(rank: int, world_size: int) -> None:
    """In the first step DDP hands over buckets in a callback of its own, and waits there."""
    seen = Seen()
    ddp = DistributedDataParallel(Probe(*NUMELS), static_graph=True)
    with register(ddp, observer=seen, **FINE):
        step_of(ddp, rank, 0)
        assert seen == []
        step_of(ddp, rank, 1)
        assert {(report.step, report.exposed_seconds is None) for report in seen} == {
            (0, True),
            (1, False),
        }


def test_the_first_step_of_a_static_graph_is_not_measured(ranks: Ranks) -> None:
    ranks.run(begin_a_static_graph, 2)


def test_what_nobody_was_seen_to_wait_for_comes_with_the_next_step() -> None:
    seen = Seen()
    with RHTState(communicator=Alone(), observer=seen) as state:
        for step in range(2):
            for index in range(2):
                submit(state, torch.zeros(10), index, last=False).wait()
            assert [report.step for report in seen] == [0, 0] * step
        in_backward(lambda: submit(state, torch.zeros(10), 0, last=True))
        assert [report.step for report in seen] == [0, 0, 1, 1, 2]
        submit(state, torch.zeros(10), 0, last=True).wait()
    assert [report.step for report in seen] == [0, 0, 1, 1, 2, 3]
    assert [report.last for report in seen] == [False, True, False, True, True, True]
    known = [report.exposed_seconds is not None for report in seen]
    assert known == [False, False, False, False, True, False]
    check_sums(seen, state.stats())


def test_buckets_of_two_steps_that_come_together() -> None:
    """After a backward pass that failed, the next one waits for what it left too."""
    seen, done = Seen(), torch.futures.Future[torch.Tensor]()
    pending = reports.Reports([seen], Totals())
    done.set_result(torch.zeros(1))
    for step, index in ((0, 0), (0, 1), (1, 0)):
        key = Key(0, step, index)
        made = BucketReport.of(Report.of_nothing(), 0, key, 1, 0.0, 0.0)
        pending.add(Bucket(torch.zeros(1), key, [], ends=False, reports=[made]), done, Cuda())
    pending.land()
    assert [report.last for report in seen] == [False, True, True]


def test_a_failed_bucket_has_no_report_and_raises_as_without_an_observer() -> None:
    class Failing(Alone):
        world_size = 2

        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("odd")

    seen = Seen()
    with RHTState(communicator=Failing(), observer=seen) as state:
        futures = []
        in_backward(lambda: futures.append(submit(state, torch.zeros(10))))
        with pytest.raises(Exception, match="odd"):
            futures[0].wait()
    assert seen == []
    assert state.stats().waits == {}


# Other states, and what becomes of them -----------------------------------------------------------


def copy_two_models(rank: int, world_size: int, folder: str) -> None:
    """Copies have no observer; a resumed run goes on in its file; models do not mix."""
    path = Path(folder, f"{rank}.csv")
    seen = Seen(), Seen()
    models = [DistributedDataParallel(Probe(*NUMELS), **APART) for _ in seen]
    csv = telemetry.csv(Path(folder, "run.csv"), all_ranks=True)
    handles = [
        register(ddp, observer=[own, *([csv] if own is seen[0] else [])], **FINE)
        for ddp, own in zip(models, seen, strict=True)
    ]
    for step in range(3):
        if step == 2:
            saved = handles[0].state_dict()
            twin = copy.deepcopy(models[0])
            loaded = pickle.loads(pickle.dumps(handles[0].state))
        for ddp in models:
            step_of(ddp, rank, step)
    assert [report.step for report in seen[0]] == [step for step in range(3) for _ in NUMELS]
    assert seen[0] != seen[1]
    for own, handle in zip(seen, handles, strict=True):
        check_sums(own, handle.stats())
        handle.close()
    for state in (twin._comm_hooks[0][1], loaded):
        assert state.reports is None
        step_of(wrapped(Probe(*NUMELS), state, **APART), rank, 2)
        state.close()
    assert len(seen[0]) == 3 * len(NUMELS)

    path = Path(folder, f"run_rank{rank}.csv")
    whole = path.read_text().splitlines()
    with path.open("a") as file:
        file.write("1")  # of a row of step 10, which a killed run was writing
    csv = telemetry.csv(Path(folder, "run.csv"), all_ranks=True)
    again = DistributedDataParallel(Probe(*NUMELS), **APART)
    with register(again, observer=csv, **FINE) as handle:
        handle.load_state_dict(saved)
        step_of(again, rank, 2)
    resumed = path.read_text().splitlines()
    assert resumed[:-3] == whole[:-3]
    assert [row.split(",")[:6] for row in resumed] == [row.split(",")[:6] for row in whole]


def test_copies_other_models_and_resumed_runs(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(copy_two_models, 2, str(tmp_path))


def resume_in_other_buckets(rank: int, world_size: int) -> None:
    """DDP's first bucket of a resumed run has the parts that the saved run had as buckets."""
    runs, states = [], []
    for steps in (range(3), range(2, 3)):
        seen = Seen()
        ddp = DistributedDataParallel(Probe(*NUMELS), bucket_cap_mb=0.0001)
        with register(ddp, observer=seen, **FINE) as handle:
            if states:
                handle.load_state_dict(states[0])
            for step in steps:
                if step == 2:
                    states.append(handle.state_dict())
                step_of(ddp, rank, step)
        runs.append([report for report in seen if report.step == 2])
    whole, resumed = runs
    assert len(whole) > 1
    facts = ("bucket", "numel", "bytes_sent", "last")
    for report, again in zip(whole, resumed, strict=True):
        assert [getattr(again, name) for name in facts] == [getattr(report, name) for name in facts]
    # Training waited for all parts at once.
    assert {report.exposed_seconds for report in resumed[:-1]} == {0.0}
    assert resumed[-1].exposed_seconds is not None


def test_parts_of_a_bucket_report_each_for_itself(ranks: Ranks) -> None:
    ranks.run(resume_in_other_buckets, 2)


def observe_shards(rank: int, world_size: int) -> None:
    seen, model = Seen(), sharded(net_of_units())
    handle = compress_fsdp(model, observer=seen, **FINE_SHARDS)
    for step in range(2):
        backward_of_shards(model, rank, step)
        assert len(seen) == 3 * (step + 1)  # units
    assert seen.threads == {threading.get_ident()}
    assert [report.last for report in seen] == [False, False, True] * 2
    for report in seen:
        # Training waits for all that a unit's reduction does.
        parts = report.encode_seconds + report.exchange_seconds + report.decode_seconds
        assert report.exposed_seconds is not None
        assert report.exposed_seconds > parts > 0
    check_sums(seen, handle.stats())
    handle.close()
    assert seen.closed == 1


def observe_outer_steps(rank: int, world_size: int) -> None:
    seen, model = Seen(), net()
    with averager(model, period=2, fragments=2, delay=1, observer=seen) as outer:
        counts = []
        for step in range(4):
            wander(model, rank, step)
            outer.step()
            counts.append(len(seen))
        assert counts == [0, 1, 2, 3]  # a step after each exchange began
        outer.synchronize()
        check_sums(seen, outer.stats())
    assert all(report.exposed_seconds is not None and report.last for report in seen)
    assert len(seen) == outer.stats().steps == 5
    assert seen.closed == 1
    with (
        averager(model, period=2, delay=1, observer=[]) as outer,
        averager(model, period=2, delay=1, observer=seen) as observed,
    ):
        for averaged in (outer, observed):
            averaged.step()
            averaged.step()
    for closed in (outer, observed):  # with an exchange that was in flight
        assert len(closed.state_dict()["in_flight"]) == 1


def test_shards_and_outer_steps_report_too(ranks: Ranks) -> None:
    ranks.run(observe_shards, 2)
    ranks.run(observe_outer_steps, 2)


@pytest.mark.parametrize("observer", [3, "run.csv", [print, None], telemetry.csv("x").__class__])
def test_what_is_no_observer_is_refused(observer: Any) -> None:
    with pytest.raises(TypeError, match="must be a function of a report, such as"):
        RHTState(observer=observer)


def calls_in_a_step(buckets: int, observer: Any) -> Counter[str]:
    """Of Python functions in hooks/, on all threads, by file and name."""
    calls: Counter[str] = Counter()
    counts = False

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if counts and event == "call" and "/hooks/" in code.co_filename:
            calls[f"{Path(code.co_filename).name} {code.co_name}"] += 1

    tensors = [torch.zeros(10) for _ in range(buckets)]
    with RHTState(communicator=Alone(), observer=observer) as state:

        def step() -> None:
            for i, x in enumerate(tensors):
                submit(state, x, i, last=i == buckets - 1).wait()

        before = sys.getprofile()
        threading.setprofile(note)  # for the worker, which begins with the first bucket
        try:
            in_backward(step)
            sys.setprofile(note)
            counts = True
            in_backward(step)
        finally:
            counts = False
            sys.setprofile(before)
            threading.setprofile(None)  # type: ignore[arg-type]
    return calls


def test_an_observer_takes_few_python_calls_and_none_takes_none(tmp_path: Path) -> None:
    """Calls are what it costs; benchmarks/telemetry.py takes the time."""
    buckets = 20
    without = calls_in_a_step(buckets, None)
    assert without["engines.py _mean_"] == buckets
    assert not any("reports.py" in call or "BucketReport" in call for call in without)
    csv = calls_in_a_step(buckets, telemetry.csv(tmp_path / "run.csv"))
    more = csv - without
    print(more)  # what pytest shows where it fails
    assert sum(more.values()) <= 12 * buckets + 5
