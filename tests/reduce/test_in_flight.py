"""Chunks wait for each other, so that those in flight hold little memory."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Ranks
from simulation import ALGORITHMS, BLOCK, CODEC, KEY, chunks_of, data, same_bits, simulated

import rhtcomm
from rhtcomm.reduce import payloads
from rhtcomm.reduce.clock import Clock
from rhtcomm.reduce.job import Job
from rhtcomm.reduce.payloads import Course, pipeline

NUMEL = 48 * BLOCK
NOTHING = torch.empty(0, dtype=torch.uint8)


class Chunk:
    """Makes `exchanges` exchanges; `log` has their beginnings and ends."""

    def __init__(self, name: str, in_flight: int, exchanges: int, log: list[str]) -> None:
        self.name, self.in_flight, self.exchanges, self.log = name, in_flight, exchanges, log

    def course(self, job: Job, used: torch.Tensor) -> Course:
        for number in range(1, self.exchanges + 1):
            yield self._start, torch.tensor(number)
        return None

    def _start(self, x: torch.Tensor) -> Callable[[], None]:
        name = f"{self.name}{int(x)}"
        self.log.append(f"+{name}")
        return lambda: self.log.append(f"-{name}")


def log_of(chunks: str, in_flight: int, exchanges: int, ahead: int | None = None) -> str:
    log: list[str] = []
    made = [Chunk(name, in_flight, exchanges, log) for name in chunks]
    pipeline(made, Job(torch.zeros(1), KEY, Clock()), NOTHING, ahead)
    return " ".join(log)


def test_the_order_of_exchanges_when_few_chunks_fit() -> None:
    third = payloads.IN_FLIGHT_BYTES // 3
    assert log_of("abcde", third, 1) == "+a1 +b1 +c1 -a1 +d1 -b1 +e1 -c1 -d1 -e1"
    large = 2 * payloads.IN_FLIGHT_BYTES  # two are always in flight
    assert log_of("abc", large, 1) == "+a1 +b1 -a1 +c1 -b1 -c1"
    assert log_of("abc", large, 2) == "+a1 +b1 -a1 +a2 -b1 +b2 -a2 +c1 -b2 -c1 +c2 -c2"
    assert log_of("abcdef", payloads.IN_FLIGHT_BYTES // 4, 2) == (
        "+a1 +b1 +c1 +d1 -a1 +a2 -b1 +b2 -c1 +c2 -d1 +d2 "
        "-a2 +e1 -b2 +f1 -c2 -d2 -e1 +e2 -f1 +f2 -e2 -f2"
    )


def test_exchanges_end_in_the_order_in_which_they_began() -> None:
    """`Communicator` promises this to transports, of everything but all-reduces."""
    for room in range(2, 12):
        for exchanges in (1, 2):
            log = log_of("abcdefghij", payloads.IN_FLIGHT_BYTES // room, exchanges).split()
            begun = [entry[1:] for entry in log if entry[0] == "+"]
            assert begun == [entry[1:] for entry in log if entry[0] == "-"], (room, exchanges)


def test_the_order_of_all_reduces_when_few_chunks_fit() -> None:
    large = 2 * payloads.IN_FLIGHT_BYTES
    assert log_of("abc", large, 2, 1) == "+a1 +b1 -a1 +a2 -a2 +c1 -b1 +b2 -c1 +c2 -b2 -c2"
    # Of four, two are in their first exchange when the second one of the others begins and ends.
    assert log_of("abcdef", payloads.IN_FLIGHT_BYTES // 4, 2, 3) == (
        "+a1 +b1 +c1 +d1 -a1 +a2 -b1 +b2 -a2 +e1 -c1 +c2 -b2 +f1 "
        "-d1 +d2 -e1 +e2 -f1 +f2 -c2 -d2 -e2 -f2"
    )


def test_a_bucket_of_usual_size_is_not_held_up() -> None:
    """25 MiB with 4 bits, and with 8 bits among 2 ranks."""
    for bits, world_size, algorithm in [
        *((4, n, a) for n in (2, 4) for a in ("all_gather", "two_shot")),
        *((8, 2, a) for a in ("all_gather", "two_shot")),
    ]:
        codec, numel = rhtcomm.Codec(rhtcomm.QuicFL(bits)), 25 << 18
        made: Any = payloads.Payloads(
            codec, _Alone(world_size), algorithm, numel, torch.device("cpu")
        )
        held = sum(chunk.in_flight for chunk in made._chunks)
        assert held <= payloads.IN_FLIGHT_BYTES, (bits, world_size, algorithm)


class _Alone:
    """Stands for one of n ranks."""

    rank = 0
    start_all_gather = start_all_to_all = None

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size


class Held:
    """Counts the bytes of messages and of what arrives, as long as somebody holds them."""

    def __init__(self, communicator: Any) -> None:
        self.now = self.most = 0
        self._known = set[int]()
        for name in ("all_gather", "all_to_all", "gather", "broadcast"):
            start = getattr(communicator, f"start_{name}")
            setattr(communicator, f"start_{name}", self._counted(start))

    def _counted(self, start: Callable[[torch.Tensor], Callable[[], Any]]) -> Any:
        def counted(x: torch.Tensor) -> Callable[[], Any]:
            self._count(x)
            finish = start(x)
            return lambda: self._count(finish())

        return counted

    def _count(self, x: Any) -> Any:
        if x is not None and id(x) not in self._known:
            self._known.add(id(x))
            self.now += x.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(x, self._release, id(x), x.nbytes)
        return x

    def _release(self, known: int, nbytes: int) -> None:
        self._known.remove(known)
        self.now -= nbytes


def hold(rank: int, world_size: int) -> list[tuple[torch.Tensor, float]]:
    """Means by each algorithm, and the most bytes held at once in units of what is allowed."""
    found = []
    for algorithm in ALGORITHMS:
        communicator: Any = rhtcomm.TorchCommunicator().apart("cpu")
        held, x = Held(communicator), data(rank, NUMEL)
        allowed = 3 * (2 * world_size + 1) * CODEC.nbytes(2 * BLOCK)
        blocks = 1 if algorithm == "two_shot" else 2
        with chunks_of(blocks), pytest.MonkeyPatch.context() as patch:
            patch.setattr(payloads, "IN_FLIGHT_BYTES", allowed)
            rhtcomm.all_reduce(
                *(x, CODEC, KEY, communicator), algorithm=algorithm, min_numel=0, check=False
            )
        communicator.close()
        found.append((x, held.most / allowed))
    return found


def test_no_more_bytes_are_held_than_allowed(ranks: Ranks) -> None:
    for results in ranks.run(hold, 2):
        for algorithm, (mean, held) in zip(ALGORITHMS, results, strict=True):
            inputs = [data(rank, NUMEL) for rank in range(2)]
            assert same_bits(mean, simulated(inputs, CODEC, KEY, algorithm))
            assert 0 < held <= 1, algorithm
