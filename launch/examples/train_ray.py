"""Ray Train with compressed gradients.

    python launch/examples/train_ray.py [checkpoint to resume from]

Compression adds the lines that end with "# rhtcomm".
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rhtcomm.hooks.trainers.ray import register, restore, save  # rhtcomm


def train_loop(config: dict[str, Any]) -> None:
    """The training loop of each worker."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    x = torch.randn(4096, 64)  # the net is to learn a fixed linear map
    data = TensorDataset(x, x @ torch.randn(64, 64) / 8)
    model = ray.train.torch.prepare_model(net)
    loader = ray.train.torch.prepare_data_loader(DataLoader(data, batch_size=64, shuffle=True))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    handle = register(model, bits=4)  # rhtcomm

    first_epoch = 0
    # After a failure Ray restarts the workers with the last reported checkpoint.
    checkpoint = ray.train.get_checkpoint() or config["checkpoint"]
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, "training.pt"))
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
            first_epoch = saved["epoch"]
            restore(handle, folder)  # rhtcomm
    on_rank_0 = ray.train.get_context().get_world_rank() == 0
    loss = torch.tensor(0.0)
    for epoch in range(first_epoch, 3):
        loader.sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        metrics = {"loss": loss.item()}
        metrics |= handle.figures()  # rhtcomm
        with tempfile.TemporaryDirectory() as folder:
            if on_rank_0:
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"epoch": epoch + 1}, Path(folder, "training.pt"))
            save(handle, folder)  # rhtcomm
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
    handle.close()  # rhtcomm


def main(checkpoint: str | None = None) -> None:
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={"checkpoint": checkpoint and Checkpoint(Path(checkpoint).resolve())},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(Path("ray-example").resolve())),
    )
    last = trainer.fit().metrics
    print(f"loss {last['loss']:.6f}, {last['rhtcomm/compression_ratio']:.1f} times fewer bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
