"""Accelerate with compressed gradients.

    torchrun --nproc-per-node=2 launch/examples/train_accelerate.py [checkpoint to resume from]

Compression adds the lines that end with "# rhtcomm".
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rhtcomm.hooks.trainers.accelerate import register  # rhtcomm


def main(checkpoint: str | None = None) -> None:
    # With it and set_epoch, a resumed run shuffles like an uninterrupted one.
    order = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=order)  # log_with="wandb", ...
    accelerator.init_trackers("accelerate-example")
    set_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    x = torch.randn(4096, 64)  # the net is to learn a fixed linear map
    data = TensorDataset(x, x @ torch.randn(64, 64) / 8)
    model, optimizer, loader = accelerator.prepare(
        net,
        torch.optim.AdamW(net.parameters(), lr=1e-3),
        DataLoader(data, batch_size=64, shuffle=True),
    )
    handle = register(accelerator, model, bits=4)  # rhtcomm
    first_epoch = 0
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        first_epoch = int(checkpoint.split("-")[-1])
    step, loss = first_epoch * len(loader), torch.tensor(0.0)
    for epoch in range(first_epoch, 3):
        loader.set_epoch(epoch)
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            accelerator.log({"loss": loss.item()}, step=step)
            accelerator.log(handle.figures(), step=step)  # rhtcomm
            step += 1
        accelerator.save_state(f"accelerate-{epoch + 1}")
    ratio = handle.stats().compression_ratio
    accelerator.print(f"loss {loss.item():.6f}, {ratio:.1f} times fewer bytes")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
