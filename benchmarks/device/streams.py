"""(d) The cases of ddp.py, each in processes of its own, all at once."""

import gc
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from device import ddp
from device.children import Failed, together
from device.devices import Device, device_for
from device.results import Results

__all__ = ["run"]


def rank(case: ddp.Case, rank: int, store: str, dry: bool, steps: int) -> ddp.Outcome:
    """One rank, in a process of its own."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    device = device_for(dry)
    dist.init_process_group(
        "gloo" if dry else case.backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=case.ranks,
        timeout=timedelta(seconds=60),
        device_id=None if dry or case.backend == "gloo" else device.torch,
    )
    group = dist.group.WORLD
    assert group is not None
    outcome = ddp.train(group, case, device, steps)
    gc.collect()  # what refers to the group goes before it
    dist.destroy_process_group()
    return outcome


def run(device: Device, results: Results) -> None:
    cases = ddp.CASES
    if device.dry:
        cases = (cases[1], cases[4])
    with tempfile.TemporaryDirectory() as folder:
        calls = [
            (rank, (case, i, str(Path(folder) / f"store{number}"), device.dry, device.steps))
            for number, case in enumerate(cases)
            for i in range(case.ranks)
        ]
        outcomes = iter(together(calls, threads=1, seconds=results.left() - 3))
    wrong = 0
    for case in cases:
        of_ranks = [next(outcomes) for _ in range(case.ranks)]
        row: dict[str, object] = {"case": case.name, "steps": device.steps}
        failed = next((o for o in of_ranks if isinstance(o, Failed)), None)
        try:
            if failed is not None:
                raise AssertionError(failed.reason)
            row["buckets compared"] = ddp.check(case, of_ranks, device.steps)
            row |= {"equal": True, "ms a step, all at once": 1e3 * of_ranks[0].seconds}
        except AssertionError as error:
            wrong += 1
            row["equal"] = False
            results.failure(f"{case.name}: {error}")
            for outcome in of_ranks:
                print(getattr(outcome, "trace", ""), flush=True)
        results.row("Training with delays: replicas, and buckets against the CPU", **row)
    results.target("Cases of DDP with delays that went wrong", wrong, 0, "")
