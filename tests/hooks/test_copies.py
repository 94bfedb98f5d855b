"""Copies of a state have no group, and go on."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from harness import Ranks
from models import backward, net, wrapped
from problems import nmse, numbers
from states import FINE, SOON, TIMEOUT, TOLERANCE, submit
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from rhtcomm.hooks import RHTState, rht_hook


def copy_a_model_in_training(rank: int, world_size: int, quantizer: str) -> None:
    options: dict[str, Any] = {**FINE, "bits": 6, "error_feedback": True, "timeout": TIMEOUT}
    state = RHTState(**options, quantizer=quantizer)  # type: ignore[arg-type]
    ddp = wrapped(net(), state)
    average = AveragedModel(ddp)
    for step in range(2):
        backward(ddp, rank, step)
        average.update_parameters(ddp)
    twin = copy.deepcopy(ddp)
    file = io.BytesIO()
    torch.save(ddp, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for copied in (twin, loaded, AveragedModel(ddp).module):
        (_, own), *_ = copied._comm_hooks
        assert own is not state
        assert own.engine is None
        # The copy of a model has no hook, so its state can be registered again, and goes on.
        fresh = DistributedDataParallel(copied.module)
        fresh.register_comm_hook(own, rht_hook)
        saved = state.state_dict(ddp), own.state_dict(fresh)
        assert saved[0]["step"] == saved[1]["step"] == 2
        for name, residual in saved[0]["residuals"].items():
            assert residual.any()
            assert torch.equal(residual, saved[1]["residuals"][name])
    # The last of them: the same payloads from here on.
    again = RHTState(**options, quantizer=quantizer)  # type: ignore[arg-type]
    other = wrapped(copy.deepcopy(ddp.module), again)
    again.load_state_dict(state.state_dict(ddp), other)
    assert torch.equal(backward(fresh, rank, 7), backward(other, rank, 7))
    for each in (state, own, again):
        each.close()
    plain = pickle.loads(pickle.dumps(RHTState(3, seed=5)))
    assert (plain.codec.quantizer.bits, plain.key.seed) == (3, 5)


@pytest.mark.parametrize("quantizer", ["quic_fl", "eden", "ecdq"])
def test_copies_have_no_group_and_go_on(quantizer: str, ranks: Ranks) -> None:
    ranks.run(copy_a_model_in_training, 2, quantizer)


def copy_within_a_step(rank: int, world_size: int) -> list[float]:
    """Between buckets, at another one on each rank, as a thread that saves might."""
    state = RHTState(**FINE, timeout=SOON)
    x = [numbers(rank, i, shape=(1000,)) for i in range(3)]
    exact = [torch.stack([numbers(r, i, shape=(1000,)) for r in range(2)]).mean(0) for i in (0, 1)]
    copies = []
    for index in range(3):
        submit(state, x[index].clone(), index, index == 2).wait()
        if index == rank:
            copies.append(copy.deepcopy(state))
    errors = []
    with copies[0] as copied:
        for _ in range(3):
            found = [submit(copied, x[i].clone(), i, i == 1).wait() for i in range(2)]
            errors += [nmse(f, e) for f, e in zip(found, exact, strict=True)]
    state.close()
    return errors


def test_copies_that_were_made_within_a_step_begin_one(ranks: Ranks) -> None:
    for errors in ranks.run(copy_within_a_step, 2):
        assert max(errors) < TOLERANCE


def test_copies_while_another_thread_sees_new_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"quantizer": "eden", "error_feedback": True, "equalize": True}
    state, seen, clone = RHTState(**options), [nn.Parameter(torch.ones(4))], torch.Tensor.clone
    assert state.scales is not None

    def see() -> None:
        assert state.scales is not None
        state.scales.learn(seen[-1:], torch.ones(4))
        state.residuals.pieces(seen[-1:], torch.ones(4))

    def clone_meanwhile(x: torch.Tensor, **given: Any) -> torch.Tensor:
        if x.numel() in (1, 4) and len(seen) < 9:  # of scales, and of a residual
            seen.append(nn.Parameter(torch.ones(4)))
            see()
        return clone(x, **given)

    see()
    monkeypatch.setattr(torch.Tensor, "clone", clone_meanwhile)
    assert len(state.scales.by_parameter()) == 1
    assert len(state.residuals.by_parameter()) == 2
    assert len(seen) == 4


def test_a_shallow_copy_counts_for_itself() -> None:
    state = RHTState(rotations="auto")
    other = copy.copy(state)
    other.load_state_dict({"seed": 0, "step": 1, "rotations": [[0, 1000, 1]]})
    other.totals.rotations[1] += 1
    other.ends.add(3)
    assert state.state_dict()["rotations"] == []
    assert state.stats().rotations == {1: 0, 2: 0, 3: 0}
    assert not state.ends
