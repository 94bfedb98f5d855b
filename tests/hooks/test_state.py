"""RHTState by itself, with buckets and a communicator made for the purpose."""

from typing import Any

import pytest
import torch
from groups import Alone
from states import Bucket

from rhtcomm import Key
from rhtcomm.hooks import RHTState, rht_hook
from rhtcomm.reduce import Reducer, Report


def test_randomness_never_repeats_where_ddp_leaves_out_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DDP may skip a step's last buckets, so `is_last` alone does not tell the steps apart."""
    drawn: list[Key] = []

    def draw(_: Reducer, flat: torch.Tensor, key: Key, **__: Any) -> Report:
        drawn.append(key)
        return Report.of_nothing()

    monkeypatch.setattr(Reducer, "mean_", draw)
    with RHTState(communicator=Alone()) as state:
        for index, last in [(0, 0), (1, 0), (0, 0), (1, 0), (1, 0), (0, 0), (1, 0), (2, 1), (0, 0)]:
            rht_hook(state, Bucket(torch.zeros(10), index, bool(last))).wait()
        resumed = RHTState(communicator=Alone())
        resumed.load_state_dict(state.state_dict())
    assert len(set(drawn)) == len(drawn) == 9
    assert drawn[-1] == Key(0, step=4, bucket=0)
    assert resumed.key == Key(0, step=5)  # states are saved between steps


@pytest.mark.parametrize("failure", [ValueError("odd"), SystemExit(3), KeyboardInterrupt()])
def test_no_failure_of_the_worker_hangs_backward(failure: BaseException) -> None:
    class Failing(Alone):
        world_size = 2

        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            raise failure

    with RHTState(communicator=Failing()) as state:
        with pytest.raises(Exception, match=r"odd|SystemExit|KeyboardInterrupt"):
            rht_hook(state, Bucket(torch.zeros(10), last=False)).wait()
        with pytest.raises(Exception, match="an earlier bucket failed"):
            rht_hook(state, Bucket(torch.zeros(10), 1)).wait()


def test_one_infinite_step_does_not_spoil_the_measured_error() -> None:
    with RHTState(communicator=Alone(), nmse_every=1) as state:
        for value in (float("inf"), 1.0):
            rht_hook(state, Bucket(torch.full((10,), value))).wait()
        assert state.stats().nmse == 0.0
        assert state.stats().steps == 2


def test_one_rank_alone_compresses_no_bucket() -> None:
    with RHTState(communicator=Alone(), min_numel=0) as state:
        rht_hook(state, Bucket(torch.zeros(10))).wait()
        assert state.stats().steps == 1
        assert state.stats().rotations == {1: 0, 2: 0, 3: 0}
