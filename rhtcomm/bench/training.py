"""Training steps of the user's own model, with and without compression.

``--model module:function``: the function returns ``(model, loss)``, or with an optimizer
``(model, loss, optimizer)``. `model` is a module on the CPU, in no DistributedDataParallel, with
the same weights on all ranks. ``loss(model)`` draws this rank's batch, calls the model (which then
is the DistributedDataParallel) and returns the loss. A step is zero_grad, loss, backward, and the
optimizer's step where there is one.

``--step script.py``: the script's function ``bench()`` returns ``(model, step)``, for training
loops of another form. `model` is a DistributedDataParallel without a communication hook, and
``step()`` does one whole step. torch.distributed is initialized when it is called.

DistributedDataParallel gets one hook, which does what the contestant of the turn does. So all
contestants train one model by the same steps. One of them, "no communication", returns each
rank's own gradients at once; what another one's step takes in addition is its exposed
communication. (That contestant makes weights of ranks differ, so they are worth nothing
afterwards.)
"""

import functools
import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rhtcomm.bench.budget import MOST, TURN
from rhtcomm.bench.contestants import Contestant, compressed_by, interest, synchronize, torchs
from rhtcomm.bench.ranks import Ranks
from rhtcomm.bench.results import Step
from rhtcomm.bench.rounds import Budget, bar, quantiles

__all__ = ["load", "measure_steps"]

_WARMUP = 3  # steps; DistributedDataParallel rebuilds its buckets after the first
_NOTHING = "no communication"
_USUAL = ("quic_fl", "ecdq")  # quantizers
_MIN_NUMEL = 1 << 14  # as `register` has it
_FEWEST = 4  # contestants, of which one compresses

Training = tuple[DistributedDataParallel, Callable[[], None]]


def load(model: str | None, step: str | None, device: torch.device) -> Training:
    """What --model or --step names; see the top of this file.

    Raises:
        ValueError: it cannot be imported, or returns something else.
    """
    if model is not None:
        return _of_model(_function(model)(), model, device)
    assert step is not None
    made = getattr(_script(step), "bench", None)
    if made is None:
        raise ValueError(f"rhtcomm bench: --step {step} has no function bench(); see docs/bench.md")
    found = made()
    good = isinstance(found, tuple) and len(found) == 2 and callable(found[1])
    if not good or not isinstance(found[0], DistributedDataParallel):
        raise ValueError(
            f"rhtcomm bench: bench() of --step {step} must return a DistributedDataParallel and a "
            f"function that does one step, not {found!r:.80}"
        )
    ddp, one_step = found
    return ddp, one_step


def _function(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"rhtcomm bench: --model {name} must be like package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rhtcomm bench: --model {name} cannot be imported: {error}") from error
    return found


def _script(path: str) -> object:
    if not Path(path).is_file():
        raise ValueError(f"rhtcomm bench: --step {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    return module


def _of_model(found: Any, name: str, device: torch.device) -> Training:
    good = isinstance(found, tuple) and len(found) in (2, 3) and callable(found[1])
    if not good or not isinstance(found[0], nn.Module):
        raise ValueError(
            f"rhtcomm bench: --model {name} must return (model, loss) or (model, loss, optimizer), "
            f"not {found!r:.80}"
        )
    module, loss = found[:2]
    optimizer = found[2] if len(found) == 3 else None
    module.to(device)
    ddp = DistributedDataParallel(module, [device] if device.type != "cpu" else None)

    def step() -> None:
        ddp.zero_grad(set_to_none=True)
        loss(ddp).backward()
        if optimizer is not None:
            optimizer.step()

    return ddp, step


class _Switch:
    """The state of the one hook that DDP gets: whose turn it is."""

    contestant: Contestant


def _switching_hook(
    state: _Switch,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    contestant = state.contestant
    return contestant.hook(contestant.state, bucket)


def _local_hook(
    state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """This rank's own gradients."""
    buffer: torch.Tensor = bucket.buffer()
    devices: Any = [buffer.device] if buffer.device.type != "cpu" else None
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
    done.set_result(buffer)
    return done


@dataclass
class _Timed:
    contestant: Contestant
    seconds: list[float] = field(default_factory=list)


def contestants_for(
    carrier: str,
    world_size: int,
    bits: Sequence[float],
    quantizers: Sequence[str],
    connections: int = 1,
) -> list[Contestant]:
    """No communication, torch's hooks, and this package's as `register` has it by default.

    The more interesting ones come first.
    """
    found = [Contestant(_NOTHING, carrier, _local_hook, lambda: None, 0.0)]
    found += torchs(carrier, world_size, ("float32", "bf16"))
    algorithm = "two_shot" if world_size > 2 else "all_gather"  # as "auto" has large buckets
    ours = compressed_by(
        carrier,
        bits,
        [q for q in quantizers if q in _USUAL],
        [algorithm],
        min_numel=_MIN_NUMEL,
        connections=connections,
    )
    return found + sorted(ours, key=functools.partial(interest, world_size))


def measure_steps(
    training: Training,
    field: Sequence[Contestant],
    until: float,
    budget: Budget,
    ranks: Ranks,
) -> tuple[list[Step], Sequence[Contestant]]:
    """Time steps of a model by each contestant, in turns, until `until` seconds are gone.

    Returns:
        Their times, and the last contestants, where steps are so long that there is no time.
    """
    ddp, step = training
    switch = _Switch()
    switch.contestant = field[1]
    ddp.register_comm_hook(switch, _switching_hook)
    alone = [_seconds(step, ranks) for _ in range(_WARMUP)][-1]
    of_two_turns = 2 * (TURN + 1) * alone
    count = ranks.tell(int((until - budget.gone()) / of_two_turns))
    count = max(_FEWEST, count)
    timed = [_Timed(one) for one in field[:count]]
    start = budget.gone()
    with bar(MOST * len(timed), "steps", ranks) as progress:
        for turn in range(MOST):
            cost = (budget.gone() - start) / max(1, turn)
            if not ranks.tell(turn == 0 or budget.gone() + cost <= until):
                break
            for one in timed:
                progress.set_postfix_str(one.contestant.name, refresh=False)
                switch.contestant = one.contestant
                one.seconds += [_seconds(step, ranks) for _ in range(TURN + 1)][1:]
                progress.update()
    for one in timed:
        one.seconds = ranks.largest(*one.seconds)
    budget.end("training steps")
    alone = statistics.median(timed[0].seconds)
    return [_row(one, alone) for one in timed], field[count:]


def _seconds(step: Callable[[], None], ranks: Ranks) -> float:
    synchronize(ranks.device)
    dist.barrier()
    start = time.perf_counter()
    step()
    synchronize(ranks.device)
    return time.perf_counter() - start


def _row(one: _Timed, alone: float) -> Step:
    low, median, high = quantiles(one.seconds)
    who = one.contestant
    rounds, exposed = len(one.seconds), median - alone
    return Step(
        who.name, who.quantizer, who.algorithm, who.bits, rounds, median, low, high, exposed
    )
