"""Ray Train, with two workers."""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, call_in_fresh_process, load_module
from models import parameters_of
from trainers import (
    EPOCH,
    OPTIONS,
    RATE,
    batches,
    check_example,
    check_logged,
    check_resumed,
    check_same,
    example,
    loss_of,
    plain,
    seeded,
)

pytest.importorskip("ray", reason="make test-trainers installs it")


class Broken(Exception):
    """What ends the first attempt."""


def train(
    name: str, epochs: range, checkpoint: Any = None, unwrapped: bool = False, steps: int = 0
) -> torch.Tensor:
    """Parameters of a worker after some epochs, of which each is saved; fails after some steps."""
    import ray.train.torch
    from ray.train import Checkpoint

    from rhtcomm.hooks.trainers.ray import register, restore, save

    rank = ray.train.get_context().get_world_rank()
    net = seeded()
    model = ray.train.torch.prepare_model(net)
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    with register(model, **OPTIONS) as handle:
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                net.load_state_dict(torch.load(Path(folder, "net.pt")))
                restore(handle, folder)
        step = epochs.start * EPOCH
        for _ in epochs:
            for x in batches(rank):
                loss_of(net if unwrapped else model, x).backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                metrics = {"run": name, "step": step} | handle.figures()
                if step % EPOCH:
                    ray.train.report(metrics)
                if step == steps:
                    raise Broken
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    torch.save(net.state_dict(), Path(folder, "net.pt"))
                save(handle, folder)
                ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
    return parameters_of(net)


def loop(config: dict[str, str]) -> None:
    """What a worker does: at first it fails after an epoch, and then Ray starts it again."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        train("broken", range(2), steps=EPOCH + 1)
    with checkpoint.as_directory() as folder:
        files = sorted(os.listdir(folder))
    assert files == ["net.pt", "rhtcomm_rank0.pt", "rhtcomm_rank1.pt"]
    rank = ray.train.get_context().get_world_rank()
    results = {"files": files, "resumed": train("resumed", range(1, 2), checkpoint)}
    results["plain"], results["figures"] = plain(rank, epochs=2)
    results["whole"] = train("whole", range(2))
    with pytest.warns(match="hook was never called"):
        train("unwrapped", range(1), unwrapped=True)
    with tempfile.TemporaryDirectory() as empty, checkpoint.as_directory() as folder:
        Path(empty, "net.pt").symlink_to(Path(folder, "net.pt"))
        with pytest.warns(match="has no state of the hook"):
            results["forgotten"] = train("forgotten", range(1, 2), ray.train.Checkpoint(empty))
    torch.save(results, Path(config["folder"], f"results_{rank}.pt"))


def drive(folder: str) -> None:
    """The program that starts Ray."""
    warnings.simplefilter("ignore")
    import ray.train.torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback

    class Rows(UserCallback):
        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            with Path(folder, "rows.jsonl").open("a") as rows:
                print(json.dumps(metrics[0]), file=rows)

    os.chdir(folder)
    script = load_module(str(ROOT / "launch/examples/train_ray.py"))
    for module in (script, sys.modules[__name__]):  # which workers cannot import
        ray.cloudpickle.register_pickle_by_value(module)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    run_config = RunConfig(
        name="run",
        storage_path=folder,
        failure_config=FailureConfig(max_failures=1),
        callbacks=[Rows()],
    )
    ray.train.torch.TorchTrainer(
        loop,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=run_config,
    ).fit()
    whole = example("train_ray.py")
    saved = sorted(Path("ray-example").glob("*/checkpoint_*"))[1]
    resumed = example("train_ray.py", str(saved))
    assert resumed.split(",")[0] == whole.split(",")[0], (resumed, whole)  # the loss
    print(whole, end="")
    ray.shutdown()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ray")
    environment = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # one report is taken in each
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    *_, printed = call_in_fresh_process(drive, str(folder), **environment)
    rows = [json.loads(line) for line in Path(folder, "rows.jsonl").read_text().splitlines()]
    ranks = [torch.load(folder / f"results_{rank}.pt") for rank in range(2)]
    return {"ranks": ranks, "rows": rows, "printed": printed}


def test_same_bits_as_plain_ddp(results: dict[str, Any]) -> None:
    check_same(results["ranks"])


def test_resume_is_bit_identical(results: dict[str, Any]) -> None:
    check_resumed(results["ranks"])


def test_logs_each_step(results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row["run"] == "whole"]
    check_logged(rows, results["ranks"][0]["figures"])
    broken = [row["step"] for row in results["rows"] if row["run"] == "broken"]
    assert broken == [1, 2, 3, 4]


def test_a_hook_that_was_never_called_warns(results: dict[str, Any]) -> None:
    assert results["ranks"]  # the workers have seen the warning


def test_example(results: dict[str, Any]) -> None:
    check_example(results["printed"], loss=0.5)
