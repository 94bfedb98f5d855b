"""Lightning Fabric with compressed gradients.

    torchrun --nproc-per-node=2 launch/examples/train_fabric.py [checkpoint to resume from]

Compression adds the lines that end with "# rhtcomm".
"""

import sys
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rhtcomm.hooks  # rhtcomm


def main(checkpoint: str | None = None) -> None:
    logger = CSVLogger("logs", "fabric")
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", loggers=logger)
    fabric.launch()
    fabric.seed_everything(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
    handle = rhtcomm.hooks.register(model, bits=4)  # rhtcomm
    x = torch.randn(4096, 64)  # the net is to learn a fixed linear map
    data = TensorDataset(x, x @ torch.randn(64, 64) / 8)
    # Not shuffled: a resumed run would see other batches, since Fabric counts epochs from its own
    # start.
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=64))

    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "epoch": 0}
    state["hook"] = handle  # rhtcomm
    if checkpoint is not None:
        fabric.load(checkpoint, state)
    step, loss = state["epoch"] * len(loader), torch.tensor(0.0)
    while state["epoch"] < 3:
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(model(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            fabric.log("loss", loss.item(), step)
            fabric.log_dict(handle.figures(), step)  # rhtcomm
            step += 1
        state["epoch"] += 1
        fabric.save(f"fabric-{state['epoch']}.ckpt", state)
    ratio = handle.stats().compression_ratio
    fabric.print(f"loss {loss.item():.6f}, {ratio:.1f} times fewer bytes")
    handle.close()  # rhtcomm


if __name__ == "__main__":
    main(*sys.argv[1:])
