"""DDP on one GPU with delays wherever something might be forgotten to wait; and on CPU, without.

The cases are those of benchmarks/device/ddp.py, which takes more steps of them.
"""

import os

import pytest
import torch.distributed as dist
from cuda import needs_cuda
from harness import Ranks

from device import ddp
from device.devices import Cpu, Gpu

STEPS = 24


def on_gpu(rank: int, world_size: int, case: ddp.Case) -> ddp.Outcome:
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    group = dist.group.WORLD if case.backend == "gloo" else dist.new_group([0], backend="nccl")
    assert group is not None
    return ddp.train(group, case, Gpu(), STEPS)


def on_cpu(rank: int, world_size: int, case: ddp.Case) -> ddp.Outcome:
    assert dist.group.WORLD is not None
    return ddp.train(dist.group.WORLD, case, Cpu(), 3)


@needs_cuda
@pytest.mark.parametrize("case", ddp.CASES, ids=lambda case: case.name)
def test_buckets_have_the_bits_of_the_cpu_whatever_is_late(case: ddp.Case, ranks: Ranks) -> None:
    ddp.check(case, ranks.run(on_gpu, case.ranks, case), STEPS)


@pytest.mark.parametrize("case", [c for c in ddp.CASES if c.twin != "StreamEngine"], ids=str)
def test_the_cases_run_on_cpu_too(case: ddp.Case, ranks: Ranks) -> None:
    assert ddp.check(case, ranks.run(on_cpu, case.ranks, case), 3) > 0
