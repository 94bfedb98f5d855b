"""RHTState by itself, with buckets and a communicator made for the purpose."""

from typing import Any

import pytest
import torch

from rhtcomm import Key
from rhtcomm.communicator import Communicator
from rhtcomm.hooks import RHTState, rht_hook


class Bucket:
    """What the hook asks of dist.GradBucket."""

    def __init__(self, index: int, last: bool) -> None:
        self._index, self._last, self._buffer = index, last, torch.zeros(10)

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._last

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def parameters(self) -> list[torch.Tensor]:
        return [self._buffer]


class Alone(Communicator):
    """A communicator of one rank."""

    bytes_sent, rank, world_size = 0, 0, 1

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_reduce_(self, x: torch.Tensor, op: str = "sum") -> None:
        pass


def test_randomness_never_repeats_where_ddp_leaves_out_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DDP may skip a step's last buckets, so `is_last` alone does not tell the steps apart."""
    drawn: list[Key] = []
    monkeypatch.setattr(RHTState, "_mean", lambda self, buffer, key, parameters: drawn.append(key))
    with RHTState(communicator=Alone()) as state:
        for index, last in [(0, 0), (1, 0), (0, 0), (1, 0), (1, 0), (0, 0), (1, 0), (2, 1), (0, 0)]:
            rht_hook(state, Bucket(index, bool(last))).wait()
        resumed = RHTState(communicator=Alone())
        resumed.load_state_dict(state.state_dict())
    assert len(set(drawn)) == len(drawn) == 9
    assert drawn[-1] == Key(0, step=4, bucket=0)
    assert resumed.key == Key(0, step=4)


@pytest.mark.parametrize("failure", [ValueError("odd"), SystemExit(3), KeyboardInterrupt()])
def test_no_failure_of_the_worker_hangs_backward(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(RHTState, "_mean", fail)
    with RHTState(communicator=Alone()) as state:
        with pytest.raises(Exception, match=r"odd|SystemExit|KeyboardInterrupt"):
            rht_hook(state, Bucket(0, False)).wait()
        with pytest.raises(Exception, match="an earlier bucket failed"):
            rht_hook(state, Bucket(1, True)).wait()


def test_one_infinite_step_does_not_spoil_the_measured_error() -> None:
    with RHTState(communicator=Alone(), nmse_every=1) as state:
        for value in (float("inf"), 1.0):
            bucket = Bucket(0, True)
            bucket.buffer().fill_(value)
            rht_hook(state, bucket).wait()
        assert state.stats().nmse == 0.0
        assert state.stats().steps == 2


def test_one_rank_alone_compresses_no_bucket() -> None:
    with RHTState(communicator=Alone(), min_numel=0) as state:
        rht_hook(state, Bucket(0, True)).wait()
        assert state.stats().steps == 1
        assert state.stats().rotations == {1: 0, 2: 0, 3: 0}


def test_what_is_no_saved_state_is_refused_and_what_a_state_is_can_be_read() -> None:
    state = RHTState(bits=3, seed=5)
    with pytest.raises(ValueError, match=r"has \['model'\]; give what state_dict"):
        state.load_state_dict({"model": {}})
    assert "QuicFL(bits=3" in repr(state)
    assert "seed=5, step=0" in repr(state)
