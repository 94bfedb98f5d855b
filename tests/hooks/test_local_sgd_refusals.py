"""What an averager refuses, and that ranks hear of each other's failures."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from outer import averager, mean_of_models, normed, wander
from states import GAVE_UP, LOST_PEER
from torch import nn

from rhtcomm.hooks import OuterAverager


def frozen() -> nn.Module:
    return normed().requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"period": 0}, ValueError, "period=0 must be at least 1"),
        ({"period": 2.5}, TypeError, r"period=2\.5 must be an integer"),
        ({"fragments": 5}, ValueError, r"fragments=5 must lie in \[1, period=4\]"),
        ({"fragments": 0}, ValueError, r"fragments=0 must lie in \[1, period=4\]"),
        ({"fragments": 7, "period": 9}, ValueError, "the model has 6 trainable parameters"),
        ({"delay": 4}, ValueError, "delay=4 must be less than period=4"),
        ({"equalize": True}, ValueError, "leave out equalize"),
        ({"bits": 9}, ValueError, "9"),
        ({"model": frozen()}, ValueError, "no parameter of the model requires a gradient"),
        ({"model": "model"}, TypeError, r"must be a torch\.nn\.Module"),
        ({"model": nn.Linear(2, 2, device="meta")}, TypeError, "weight is on the meta device"),
        (
            {"optimizer": torch.optim.SGD(normed().parameters(), 1.0)},
            TypeError,
            "of type SGD; it must be a function that takes the list of anchors and returns",
        ),
        ({"optimizer": lambda anchors: anchors}, TypeError, "which is not a torch.optim.Optimizer"),
        (
            {"optimizer": lambda anchors: mean_of_models(anchors[1:])},
            ValueError,
            "has 5 parameters, but there are 6 anchors",
        ),
    ],
)
def test_arguments_that_are_refused(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    arguments: dict[str, Any] = {"model": normed(), "period": 4, **change}
    with pytest.raises(error, match=text):
        OuterAverager(**arguments)


# ---- Ranks that disagree ----------------------------------------------------------------------


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def disagree(rank: int, world_size: int) -> dict[str, str]:
    def other_buffer() -> nn.Module:
        model = normed()
        model[1].running_var[7] += rank
        return model

    messages = {
        "period": said(lambda: averager(normed(), period=2 + rank)),
        "optimizer": said(lambda: averager(normed(), (None, mean_of_models)[rank], period=2)),
        "parameters": said(lambda: averager(normed(seed=rank), period=2)),
        "buffers": said(lambda: averager(other_buffer(), period=2)),
    }
    model = normed()
    with averager(model, period=1) as outer:
        outer.step()
        saved = outer.state_dict()
        if rank == 1:
            saved["anchors"]["0.weight"][0, 0] += 1
        outer.load_state_dict(saved)
        messages["loaded"] = said(outer.step)
    messages["closed"] = said(outer.step)
    return messages


def test_ranks_that_disagree_find_out(ranks: Ranks) -> None:
    expected = {
        "period": r"DisagreementError.* period \(2 on rank 0; 3 on rank 1\)",
        "optimizer": "DisagreementError.* outer optimizer",
        "parameters": r"DisagreementError.* 4 of 8 .*such as 0\.weight, differ between ranks",
        "buffers": r"DisagreementError.* 1 of 8 .*such as 1\.running_var, differ between ranks",
        "loaded": "DisagreementError.* anchors that were loaded",
        "closed": "RuntimeError.* the averager was closed",
    }
    for messages in ranks.run(disagree, 2):
        for name, pattern in expected.items():
            assert re.search(pattern, messages[name]), (name, messages[name])


def rounds_differently(rank: int, world_size: int) -> list[str]:
    messages: list[str] = []
    fused = "rhtcomm.hooks.outer._fused_sum"
    with pytest.MonkeyPatch.context() as patch:
        for drawn in (torch.zeros(9), torch.full((9,), float(rank))):
            patch.setattr(fused, lambda device, drawn=drawn: drawn)
            patch.setattr(
                logging.getLogger("rhtcomm"), "warning", lambda *a: messages.append(a[0] % a[1:])
            )
            averager(normed(), period=1).state.close()
            messages.append("made")
    return messages


def test_processors_that_round_differently_are_told(ranks: Ranks) -> None:
    first, second = ranks.run(rounds_differently, 2)
    assert first[0] == first[2] == "made"
    assert "which have another kind of processor" in first[1]
    assert second == ["made", "made"]


# ---- Ranks that fail --------------------------------------------------------------------------


def fail_on_rank_1(rank: int, world_size: int, delay: int) -> list[str]:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if rank == 1 and outer.inner_steps > 3:
                raise ZeroDivisionError("made by the test")
            return super().step(closure)

    model, messages = normed(), []
    outer = averager(
        model, lambda anchors: Failing(anchors, lr=0.7, momentum=0.9), period=3, delay=delay
    )
    for step in range(12):
        wander(model, rank, step)
        messages.append(said(outer.step))
    dist.barrier()  # the others hear before connections close
    outer.close()
    return messages


@pytest.mark.parametrize("delay", [0, 2])
def test_a_rank_that_fails_wakes_the_others(delay: int, ranks: Ranks) -> None:
    for rank, messages in enumerate(ranks.run(fail_on_rank_1, 3, delay)):
        failed = [message for message in messages if message != "no error"]
        # Applied after 3 + delay steps, and for the second time three later.
        first = 5 if delay == 0 else 4
        assert messages[:first].count("no error") == first
        if rank == 1:
            assert "made by the test" in failed[0]
        else:
            assert "rhtcomm.hooks.OuterAverager: " in failed[0]
            assert re.search(f"{GAVE_UP}|{LOST_PEER}", failed[0])
            assert "did not answer" not in failed[0]
        assert "an earlier bucket failed" in messages[-1] or failed[0] == messages[-1]


# ---- Checkpoints that do not fit --------------------------------------------------------------


def misfits(rank: int, world_size: int) -> dict[str, str]:
    model = normed()
    outer = averager(model, period=4, delay=2, error_feedback=True)
    for step in range(5):
        wander(model, rank, step)
        outer.step()
    good = outer.state_dict()
    own = f"in flight of rank {rank} of {world_size}"
    changed = {
        "nothing": {},
        "anchors": good | {"anchors": {"0.weight": torch.zeros(3)}},
        "buffers": good | {"buffers": {}},
        "fragments": good | {"exchanged": [4, 4]},
        "steps": good | {"inner_steps": "five"},
        "groups": good | {"optimizer": good["optimizer"] | {"param_groups": []}},
        "momenta": good | {"optimizer": good["optimizer"] | {"state": {}}},
        "flight": {name: value for name, value in good.items() if name != own},
        "lengths": good | {own: {"0": {"starts": [torch.zeros(2)], "changes": [torch.zeros(2)]}}},
        "residuals": {name: x for name, x in good.items() if not name.startswith("residuals")},
    }
    messages = {
        name: said(lambda saved=saved: outer.load_state_dict(saved))  # type: ignore[misc]
        for name, saved in changed.items()
    }
    torch.testing.assert_close(outer.state_dict(), good, rtol=0, atol=0)
    outer.close()
    return messages


def test_checkpoints_that_do_not_fit_change_nothing(ranks: Ranks) -> None:
    expected = {
        "nothing": r"this has \[\]",
        "anchors": "anchors of another model",
        "buffers": "buffers of another model: 1.running_mean",
        "fragments": "fragments=2, but this averager has 1",
        "steps": "inner_steps is 'five'",
        "groups": r"groups of \[\] parameters when it was saved, but now has \[6\]",
        "momenta": "held 6 values when it was saved, but here are 0",
        "flight": r"1 exchange\(s\) were in flight",
        "lengths": "fragment 0 was in flight with",
        "residuals": "has no residuals",
    }
    for messages in ranks.run(misfits, 2):
        assert messages.keys() == expected.keys()
        for name, pattern in expected.items():
            assert re.search(f"ValueError: .*{pattern}", messages[name]), (name, messages[name])


def close_early(rank: int, world_size: int) -> None:
    outer = averager(normed(), period=9)
    outer.step()
    with pytest.warns(UserWarning, match=r"after 1 calls of step\(\) with period=9"):
        outer.close()
    outer.close()  # says nothing more


def test_one_that_never_exchanged_warns(ranks: Ranks) -> None:
    ranks.run(close_early, 2)
