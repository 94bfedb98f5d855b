"""What a state and the hook refuse."""

import re
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Ranks
from models import probe_backward
from problems import numbers
from states import TIMEOUT, submit

import rhtcomm
from rhtcomm.hooks import RHTState, rht_hook

# ---- Of this rank -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"quantizer": "foo"}, "quantizer='foo' must be one of quic_fl, eden"),
        ({"algorithm": "foo"}, "algorithm='foo' must be one of auto, all_gather, two_shot"),
        ({"block": 48}, "block=48 must be a power of two"),
        ({"block": 16}, "block=16 must be a power of two from 32"),
        ({"rotations": 0}, "rotations=0"),
        ({"rotations": 4}, "rotations=4"),
        ({"min_numel": -1}, "min_numel=-1"),
        ({"nmse_every": -1}, "nmse_every=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1 << 64}, "seed=18446744073709551616"),
        ({"communicator": object(), "timeout": TIMEOUT}, "leave out process_group, timeout"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RHTState(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"process_group": "gloo"}, "process_group='gloo' must be a process group"),
        ({"communicator": rhtcomm.MPICommunicator}, "is a class; pass an instance of it"),
        ({"communicator": object()}, "must be an object such as"),
        ({"min_numel": 1.5}, r"RHTState: min_numel=1\.5 must be an integer"),
        ({"nmse_every": "1"}, "RHTState: nmse_every='1' must be an integer"),
        ({"seed": 0.5}, r"seed=0\.5 must be an integer"),
        ({"error_feedback": "no"}, "error_feedback='no' must be True or False"),
        ({"timeout": 5}, r"timeout=5 must be a datetime\.timedelta"),
        ({"communicator": "mpi"}, "communicator='mpi' must be an object"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RHTState(**arguments)


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_timeout_is_positive(seconds: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        RHTState(timeout=timedelta(seconds=seconds))
    with pytest.raises(ValueError, match="must be positive"):
        rhtcomm.MPICommunicator(timeout=seconds)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(3),),
        ((torch.ones(3),),),
        (torch.ones(3), 1),
        (SimpleNamespace(buffer=lambda: torch.ones(3)),),
    ],
    ids=["a tensor", "a tuple", "more", "something with a buffer"],
)
def test_other_callers_are_told_what_the_hook_is_for(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"instead of a GradBucket.*FullyShardedDataParallel"):
        rht_hook(RHTState(), *arguments)


def test_a_hook_without_a_state_says_how_to_register_it() -> None:
    with pytest.raises(TypeError, match=r"None, not an RHTState; register it with"):
        rht_hook(None, None)  # type: ignore[arg-type]


def test_without_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"not initialized; call.*init_process_group"):
        submit(RHTState(), torch.zeros(5))


# ---- Of other ranks ---------------------------------------------------------------------------

CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bits": ({"bits": 4}, {"bits": 3}),
    "quantizer": ({"quantizer": "eden"}, {"quantizer": "quic_fl"}),
    "rotations": ({"rotations": 2}, {"rotations": 3}),
    "block": ({"block": 512}, {"block": 256}),
    "algorithm": ({"algorithm": "auto"}, {"algorithm": "two_shot"}),
    "seed": ({"seed": 1}, {"seed": 2}),
    "min_numel": ({"min_numel": 0}, {"min_numel": 1}),
    "nmse_every": ({"nmse_every": 0}, {"nmse_every": 1}),
}


def configure_differently(rank: int, world_size: int) -> dict[str, str | None]:
    """Rank 1 has the second configuration, the others the first."""
    errors = {}
    for name, configurations in CONFIGURATIONS.items():
        with RHTState(**configurations[rank == 1], timeout=TIMEOUT) as state:
            errors[name] = probe_backward(state, numbers(rank, shape=(1000,)))
    with RHTState(seed=5, timeout=TIMEOUT) as state:
        state.load_state_dict({"seed": 5, "step": 7 if rank == 1 else 8})
        errors["step"] = probe_backward(state, numbers(rank, shape=(1000,)))
    return errors


def test_ranks_with_different_arguments(ranks: Ranks) -> None:
    for errors in ranks.run(configure_differently, 3):
        for name, error in errors.items():
            assert error is not None, name
            assert "DisagreementError" in error
            assert f"configured differently in {name} (" in error
            assert "on ranks 0, 2; " in error
            assert "on rank 1" in error
