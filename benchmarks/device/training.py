"""(f) The demo's model trained by launch/train_ddp.py, with and without the hook."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from device.devices import Device
from device.results import Results
from lib.processes import ROOT, TRAINER

__all__ = ["run"]

DEMO = ["--layers=4", "--width=160", "--heads=5", "--context=128", "--lr=0.004"]
TOY = ["--layers=1", "--width=32", "--heads=2", "--context=32", "--batch=2", "--eval-batches=1"]
HOOKS = {
    "none": ["--hook=none"],
    "rhtcomm, 4 bits": ["--hook=rht", "--bits=4"],
    "bf16": ["--hook=bf16"],
}
RUNS = (
    *(("gloo", 2, hook) for hook in HOOKS),
    *(("nccl", 1, hook) for hook in ("none", "rhtcomm, 4 bits")),
)


def train(
    backend: str, ranks: int, options: list[str], device: Device, seconds: float
) -> dict[str, Any]:
    """The summary of a run.

    Raises:
        AssertionError: it failed, or did not end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "summary.json"
        command = [sys.executable, TRAINER, f"--backend={backend}", f"--device={device.torch.type}"]
        command += [f"--summary={path}", *options, *(TOY if device.dry else DEMO)]
        environment = {
            **os.environ,
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
            **{"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"},
            "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
        }
        processes = [
            subprocess.Popen(
                command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(ranks)
        ]
        try:
            codes = [process.wait(max(1, seconds)) for process in processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {seconds:.0f} s") from None
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * ranks, f"exit codes {codes}"
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary


def run(device: Device, results: Results) -> None:
    steps = 120 if not device.dry else 3
    runs = RUNS if not device.dry else RUNS[1:2]
    losses: dict[str, float] = {}
    for backend, ranks, hook in runs:
        if results.left() < 8:
            results.say(f"no time was left for {backend}, {hook}")
            continue
        options = [*HOOKS[hook], f"--steps={steps}", "--warmup=15", "--eval-every=1000"]
        try:
            summary = train(backend, ranks, options, device, min(40, results.left() - 2))
        except AssertionError as error:
            results.failure(f"{backend}, {ranks} ranks, {hook}: {error}")
            continue
        times = {name: 1e3 * summary[f"median_{name}_seconds"] for name in ("step", "comm")}
        losses[f"{backend} {hook}"] = loss = float(summary["final_val_loss"])
        if not device.dry and not loss < 3:  # 5.5 untrained
            results.failure(f"{backend}, {hook}: the model did not learn, its loss is {loss}")
        results.row(
            f"The demo's model, {summary['parameters']:,} parameters, all ranks on this device",
            backend=backend,
            ranks=ranks,
            gradients=hook,
            steps=steps,
            **{"step, ms": times["step"], "with a bucket in flight, ms": times["comm"]},
            **{"exposed, ms": 1e3 * summary["median_exposed_seconds"]},
            **{"validation loss": f"{loss:.4f}", "MB sent": summary["bytes_per_step"] / 1e6},
        )
