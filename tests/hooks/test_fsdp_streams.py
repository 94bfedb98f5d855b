"""compress_fsdp on transports that enqueue exchanges, as NCCL does: what is queued, in which order.

CPU tensors over Gloo stand in for CUDA tensors over NCCL, and `Streams` for CUDA's streams.
"""

import contextlib
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from problems import numbers
from sharded import FINE, backward, net, probe, same, sharded
from streams import AUTOGRADS, in_place_of_cuda, no_look_at_numbers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from rhtcomm import PayloadError
from rhtcomm.hooks import Handle, compress_fsdp
from rhtcomm.hooks.buckets import Bucket
from rhtcomm.hooks.inline import InlineEngine

Gradients = list[dict[str, torch.Tensor]]


def compressed(world_size: int, **options: Any) -> tuple[nn.Module, Handle]:
    """On four ranks, two replicas."""
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh.get_group("replicate") if world_size == 4 else None
    model = sharded(net(), mesh["shard"])
    return model, compress_fsdp(model, replicate_group=group, **(FINE | options))


def train(rank: int, world_size: int) -> Gradients:
    model, handle = compressed(world_size)
    with handle:
        return [backward(model, rank, step) for step in range(3)]


def train_on_streams(rank: int, world_size: int) -> tuple[Gradients, list[tuple[str, str]]]:
    """The gradients, and what a unit asks for in the last step."""
    groups, threads = len(dist.distributed_c10d._world.pg_map), {*threading.enumerate()}
    run = InlineEngine.run

    def run_without_waiting(engine: InlineEngine, bucket: Bucket) -> None:
        with no_look_at_numbers() if engine.agreed else contextlib.nullcontext():
            run(engine, bucket)

    with in_place_of_cuda() as streams, pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineEngine, "run", run_without_waiting)
        model, handle = compressed(world_size)
        made = len(dist.distributed_c10d._world.pg_map)
        found = []
        for step in range(3):
            streams.asked()
            found.append(backward(model, rank, step))
        asked, units = streams.asked(), 3
        assert len(asked) % units == 0
        each = len(asked) // units
        assert all(asked[i : i + each] == asked[:each] for i in range(0, len(asked), each))
        assert {*threading.enumerate()} == threads
        assert len(dist.distributed_c10d._world.pg_map) == made >= groups
        for engine in handle.state.engines:  # type: ignore[attr-defined]
            (group,) = engine.topology.carriers()
            assert group in dist.distributed_c10d._world.pg_map, "a group of its own"
        streams.host_may_wait = True
        handle.close()
    return found, asked[:each]


def test_all_is_queued_where_fsdp_calls_and_nobody_waits(ranks: Ranks) -> None:
    scatter = ["start all_to_all", "finish all_to_all", "copy headers"]
    average = ["record_stream", "start all_gather", "finish all_gather", "copy headers"]
    for world_size, expected in ((2, scatter), (4, scatter + average)):
        plain = ranks.run(train, world_size)
        outcomes = ranks.run(train_on_streams, world_size)
        for (found, asked), same_found in zip(outcomes, plain, strict=True):
            assert asked == [(what, AUTOGRADS) for what in expected]
            assert all(same(one, other) for one, other in zip(found, same_found, strict=True))


def mistake_a_payload(rank: int, world_size: int) -> None:
    """Whether the next unit, or who asks for a checkpoint, is told of it."""
    with in_place_of_cuda() as streams:
        streams.host_may_wait = True
        for units in (3, 1):
            model = sharded(net()) if units == 3 else probe(600)
            handle = compress_fsdp(model, **FINE)
            for step in range(2):
                if step:
                    handle.load_state_dict({"seed": 0, "step": 7 + rank})
                    handle.state.engine.agreed = True  # else they would compare the steps
                if units == 3:
                    wrong = pytest.raises(PayloadError, match="was made for another key")
                    with wrong if step else contextlib.nullcontext():
                        backward(model, rank, step)
                else:
                    model(numbers(rank, step, shape=(600,))).backward()
            if units == 1:
                with pytest.raises(PayloadError, match="was made for another key"):
                    handle.state_dict()
            handle.close()


def test_payloads_of_another_step_are_found_out_later(ranks: Ranks) -> None:
    ranks.run(mistake_a_payload, 2)


def separate(rank: int, world_size: int) -> None:
    with in_place_of_cuda():
        model, _ = compressed(world_size)
        model.set_separate_reduce_scatter_group(True)
        with pytest.raises(RuntimeError, match="call set_separate_reduce_scatter_group before"):
            backward(model, rank, 0)


def separate_before(rank: int, world_size: int) -> None:
    with in_place_of_cuda() as streams:
        model = sharded(net())
        model.set_separate_reduce_scatter_group(True)
        handle = compress_fsdp(model, **FINE)
        backward(model, rank, 0)
        (engine,) = handle.state.engines  # type: ignore[attr-defined]
        assert engine.topology.carriers() != [dist.group.WORLD]
        streams.host_may_wait = True
        handle.close()


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_separate_reduce_scatter_group"), reason="torch has no such groups"
)
def test_exchanges_go_over_the_group_that_fsdp_reduces_by(ranks: Ranks) -> None:
    ranks.run(separate, 2)
    ranks.run(separate_before, 2)


def capture(rank: int, world_size: int) -> None:
    with in_place_of_cuda() as streams:
        model, _ = compressed(world_size)
        streams.capturing = True
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            backward(model, rank, 0)


def test_a_capture_is_refused(ranks: Ranks) -> None:
    ranks.run(capture, 2)
