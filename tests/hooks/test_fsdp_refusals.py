"""rhtcomm.hooks.compress_fsdp: what it refuses, and what it says."""

import logging

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from models import mlp
from problems import numbers
from sharded import FINE, WIDTHS, backward, net, probe, sharded
from states import logged
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rhtcomm import DisagreementError
from rhtcomm.hooks import compress_fsdp


def refuse(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for model, kind, message in (
        (4, TypeError, "model=4 must be a model that was sharded by fully_shard"),
        (
            net(),
            TypeError,
            "no module of this Sequential was sharded by fully_shard; call it",
        ),
        (sharded(net(), mesh), ValueError, r'replicate_group=mesh.get_group\("replicate"\)'),
    ):
        with pytest.raises(kind, match=message):
            compress_fsdp(model)  # type: ignore[arg-type]
    model = sharded(net(), mesh["shard"])
    fully_shard(other := nn.Linear(4, 4), mesh=mesh["replicate"])
    with pytest.raises(ValueError, match="pass one mesh for all units to fully_shard"):
        compress_fsdp(nn.ModuleList([model, other]))
    for options, message in (
        ({"process_group": dist.group.WORLD}, "leave out process_group; each unit has the ranks"),
        ({"communicator": object()}, "leave out communicator"),
        (
            {"error_feedback": True},
            "leave out error_feedback; every rank would have to keep a",
        ),
        ({"equalize": True}, "leave out equalize; its scales belong to whole parameters"),
        ({"quantizer": "lattice"}, "has no payload for a single rank"),
        ({"algorithm": "two_shot"}, "algorithm='two_shot' needs replicate_group"),
        ({"replicate_group": mesh.get_group("shard")}, "must be the only rank in both"),
        ({"rotations": "auto", "replicate_group": mesh.get_group("replicate")}, "pass a number"),
        ({"exclude": ["*.wait"]}, "no parameter of the model matches"),
        ({"bits": 9}, "bits"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_fsdp(model, **options)
    with pytest.raises(TypeError, match=r"replicate_group=.* must be a process group"):
        compress_fsdp(model, replicate_group=mesh["replicate"])  # type: ignore[arg-type]
    model[0].set_allocate_memory_from_process_group_for_comm(True)  # type: ignore[index]
    with pytest.raises(
        RuntimeError, match=r"0 already has a custom reduce-scatter \(ProcessGroupAlloc"
    ):
        compress_fsdp(model)


def test_what_cannot_be_compressed_is_refused(ranks: Ranks) -> None:
    ranks.run(refuse, 4)


def call_twice(rank: int, world_size: int) -> None:
    model = sharded(net())
    with compress_fsdp(model, **FINE):
        with pytest.raises(RuntimeError, match="already has a custom reduce-scatter"):
            compress_fsdp(model, **FINE)
        backward(model, rank, 0)


def test_a_model_takes_one_hook(ranks: Ranks) -> None:
    ranks.run(call_twice, 2)


def differ(rank: int, world_size: int, what: str) -> str:
    model = sharded(mlp(*WIDTHS[: 3 + rank]) if what == "units" else net())
    options = FINE | ({"bits": 3 + rank} if what == "bits" else {})
    options |= {"exclude": [["0.bias"], ["2.bias"]][rank]} if what == "exclude" else {}
    with pytest.raises(DisagreementError) as caught:
        compress_fsdp(model, **options)
    return str(caught.value)


@pytest.mark.parametrize("what", ["bits", "units", "exclude"])
def test_ranks_that_differ_find_out_at_once(what: str, ranks: Ranks) -> None:
    for message in ranks.run(differ, 2, what):
        assert f"configured differently in {what} (" in message


def say(rank: int, world_size: int) -> list[str]:
    with logged(logging.INFO) as lines:
        model = sharded(net())
        with compress_fsdp(model, bits=4, min_numel=0, warmup_steps=0) as handle:
            backward(model, rank, 0)
            sent = handle.stats().bytes_sent
        model = probe(100, dtype=torch.float64)
        with compress_fsdp(model, **FINE):
            for step in range(2):
                model(numbers(rank, step, shape=(100,)).double()).backward()
    return [*lines, f"{sent / 1e6:.2f} MB"]


def test_the_log_says_what_it_does_and_what_travels_exactly(ranks: Ranks) -> None:
    (line, _, exact, sent), other = ranks.run(say, 2)
    assert line.startswith("rhtcomm: gradients of 2 ranks are averaged by Codec(quantizer=QuicFL")
    assert f"a rank sends about {sent} per step instead of 0.02 MB" in line
    assert "torch.float64 are sent uncompressed" in exact
    assert other[:-1] == [exact]
