"""torchft's Manager and DiLoCo with compressed exchanges: replicas that train, leave and join."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from harness import limit
from outer import train
from problems import nmse, numbers
from torch import nn
from torch.distributed import ReduceOp, TCPStore  # type: ignore[attr-defined]

from rhtcomm import Key

torchft = pytest.importorskip("torchft")

from torchft.coordination import LighthouseServer  # noqa: E402
from torchft.local_sgd import DiLoCo  # noqa: E402

from rhtcomm.hooks.trainers.torchft import compress_manager  # noqa: E402
from rhtcomm.reduce import Reducer  # noqa: E402

# What torchft itself does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]

LATE = timedelta(seconds=limit(30))


@pytest.fixture
def lighthouse() -> Iterator[str]:
    """Where replicas find each other."""
    server = LighthouseServer(
        bind="0.0.0.0:0",
        min_replicas=1,
        join_timeout_ms=200,
        quorum_tick_ms=50,
        heartbeat_timeout_ms=1000,
    )
    yield "http://127.0.0.1:" + server.address().rpartition(":")[2]
    server.shutdown()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Key]]:
    """The keys of all exchanges, with the reducers that used them."""
    seen: list[tuple[int, Key]] = []
    numbers_of: weakref.WeakKeyDictionary[Reducer, int] = weakref.WeakKeyDictionary()
    original = Reducer.mean_

    def listening(self: Reducer, flat: torch.Tensor, key: Key, **options: Any) -> Any:
        seen.append((numbers_of.setdefault(self, len(seen)), key))
        return original(self, flat, key, **options)

    monkeypatch.setattr(Reducer, "mean_", listening)
    return seen


_SEEDED = threading.Lock()  # torch's generator is of all threads


class Replica:
    """A replica of one rank: its model, its manager and what compresses."""

    def __init__(self, number: int, lighthouse: str, least: int = 1, **options: Any) -> None:
        with _SEEDED:
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
        self.inner = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.outer = torch.optim.SGD(self.model.parameters(), 0.7, momentum=0.9, nesterov=True)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.number, self.sizes = number, list[int]()
        self.pg = torchft.ProcessGroupGloo(timeout=LATE)
        self.manager = torchft.Manager(
            pg=self.pg,
            load_state_dict=self.load,
            state_dict=self.save,
            min_replica_size=least,
            use_async_quorum=False,
            timeout=LATE,
            quorum_timeout=LATE,
            connect_timeout=LATE,
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=self.store.port,
            lighthouse_addr=lighthouse,
            replica_id=f"replica_{number}",
            hostname="127.0.0.1",
            init_sync=False,
        )
        settings: dict[str, Any] = {"min_numel": 0, "block": 256}
        self.compressed = compress_manager(self.manager, **settings | options)

    def save(self) -> dict[str, Any]:
        parts = {"model": self.model, "inner": self.inner, "outer": self.outer}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["inner"])
        self.outer.load_state_dict(state["outer"])

    def train(self, ends: Callable[[dict[int, Any]], bool]) -> dict[int, torch.Tensor]:
        """The parameters after each outer step, by its number, until `ends` says so of them."""
        seen: dict[int, torch.Tensor] = {}
        with DiLoCo(
            self.manager,
            [self.model],
            self.inner,
            self.outer,
            sync_every=2,
            should_quantize=True,
            use_bucketization=True,
            bucket_cap_mb=1,
        ):
            for step in range(10_000):
                now = self.manager.current_step()
                train(self.model, self.inner, self.number, step)
                if self.manager.current_step() != now:
                    flat = torch.cat([p.detach().flatten() for p in self.model.parameters()])
                    seen[self.manager.current_step()] = flat
                    self.sizes.append(self.manager.num_participants())
                    if ends(seen):
                        break
        return seen

    def end(self) -> None:
        self.compressed.remove()
        self.manager.shutdown(wait=False)
        self.pg.shutdown()  # as its connections end with a process


def test_quantized_all_reduces_are_compressed_and_others_are_not(lighthouse: str) -> None:
    def run(number: int) -> dict[str, Any]:
        replica = Replica(number, lighthouse, least=2, bits=4)
        manager = replica.manager
        manager.start_quorum()
        shape = (256, 300)
        found = {
            "quantized": numbers(number, shape=shape),
            "transposed": numbers(number, shape=shape).t(),
            "sum": numbers(number, shape=shape),
            "exact": numbers(number, shape=shape),
            "double": numbers(number, shape=shape).double(),
        }
        asked = {"exact": {}, "sum": {"should_quantize": True, "reduce_op": ReduceOp.SUM}}
        works = [
            manager.allreduce(x, **asked.get(name, {"should_quantize": True}))
            for name, x in found.items()
        ]
        assert all(work.wait() for work in works)
        assert manager.errored() is None
        stats = replica.compressed.stats()
        replica.end()
        assert manager.allreduce.__func__ is torchft.Manager.allreduce
        return {**found, "stats": stats}

    with ThreadPoolExecutor(2) as pool:
        results = [*pool.map(run, range(2))]
    mean = torch.stack([numbers(number, shape=(256, 300)) for number in range(2)]).mean(0)
    for result in results:
        for name in ("quantized", "transposed", "sum"):
            assert torch.equal(result[name], results[0][name])
        for name, exact in {"quantized": mean, "transposed": mean.t(), "sum": 2 * mean}.items():
            # Of two independent ranks e m / n, relative to the mean's norm; its tail is heavy.
            assert nmse(result[name], exact) == pytest.approx(0.01159, rel=0.15), name
        torch.testing.assert_close(result["exact"], mean)
        torch.testing.assert_close(result["double"], mean.double(), rtol=0, atol=1e-6)
        assert result["stats"].bytes_uncompressed == 3 * 4 * mean.numel()
        assert result["stats"].compression_ratio == pytest.approx(8, rel=0.04)


def test_replicas_that_disagree_discard_the_step(lighthouse: str) -> None:
    def run(number: int) -> tuple[str, bool]:
        replica = Replica(number, lighthouse, least=2, bits=3 + number)
        manager = replica.manager
        manager.start_quorum()
        assert not manager.allreduce(torch.ones(300), should_quantize=True).wait()
        error, commits = str(manager.errored()), manager.should_commit()
        replica.end()
        return error, commits

    with ThreadPoolExecutor(2) as pool:
        for error, commits in pool.map(run, range(2)):
            assert "configured differently in" in error
            assert "bits" in error
            assert not commits


def test_replicas_leave_and_join(lighthouse: str, keys: list[tuple[int, Key]]) -> None:
    """Two train; one leaves; the other goes on alone; a third one joins, and takes its state."""
    both, left, third_is_done = threading.Barrier(2), threading.Event(), threading.Event()

    def stays() -> Any:
        replica = Replica(0, lighthouse)
        both.wait(limit(30))
        seen = replica.train(lambda _: third_is_done.is_set())
        replica.end()
        return seen, replica.sizes

    def leaves() -> Any:
        replica = Replica(1, lighthouse)
        both.wait(limit(30))
        seen = replica.train(lambda seen: len(seen) == 3)
        replica.end()
        left.set()
        return seen, replica.sizes

    def joins() -> Any:
        assert left.wait(limit(60))
        time.sleep(1.5)  # in which one trains alone
        replica = Replica(2, lighthouse)
        seen = replica.train(lambda seen: len(seen) == 4)
        third_is_done.set()
        replica.end()
        return seen, replica.sizes

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(call) for call in (stays, leaves, joins)]
        (first, sizes), (second, pair), (third, late) = (
            future.result(timeout=limit(120)) for future in futures
        )
    assert pair == [2, 2, 2]
    assert late[:3] == [2, 2, 2]
    assert 1 in sizes, "it never went on alone"
    assert min(third) > max(second), "the one that joined did not take up the others' step"
    for other in (second, third):
        for step in first.keys() & other.keys():
            assert torch.equal(first[step], other[step]), step
        assert len(first.keys() & other.keys()) >= 3
    # No replica used a key twice, and each quorum has a seed of its own.
    assert len(set(keys)) == len(keys)
    assert len({key.seed for _, key in keys}) >= 2


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torchft\.Manager"):
        compress_manager(object())  # type: ignore[arg-type]
    manager = torchft.Manager.__new__(torchft.Manager)
    manager._pg = torchft.process_group.ProcessGroupDummy(0, 1)
    with pytest.raises(TypeError, match=r"ProcessGroupDummy, but only torchft\.ProcessGroupGloo"):
        compress_manager(manager)
