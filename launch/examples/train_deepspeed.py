"""DeepSpeed without ZeRO with compressed gradients.

    torchrun --nproc-per-node=2 launch/examples/train_deepspeed.py [checkpoints to resume from]

Compression adds the lines that end with "# rhtcomm".
"""

import sys
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from rhtcomm.hooks.trainers.deepspeed import register  # rhtcomm

CONFIG = {
    "train_micro_batch_size_per_gpu": 64,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "csv_monitor": {"enabled": True, "output_path": "logs", "job_name": "deepspeed"},
}


def main(checkpoint: str | None = None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    x = torch.randn(4096, 64)  # the net is to learn a fixed linear map
    data = TensorDataset(x, x @ torch.randn(64, 64) / 8)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=CONFIG)
    handle = register(engine, bits=4)  # rhtcomm
    sampler: DistributedSampler[Any] = DistributedSampler(data)
    loader = DataLoader(data, batch_size=64, sampler=sampler)
    first_epoch = 0
    if checkpoint is not None:
        _, saved = engine.load_checkpoint(checkpoint)
        first_epoch = saved["epoch"]
    loss = torch.tensor(0.0)
    for epoch in range(first_epoch, 3):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(
                engine(inputs.to(engine.device)), targets.to(engine.device)
            )
            engine.backward(loss)
            engine.step()
        engine.save_checkpoint("deepspeed-example", client_state={"epoch": epoch + 1})
    if engine.global_rank == 0:
        ratio = handle.stats().compression_ratio
        print(f"loss {loss.item():.3f}, {ratio:.1f} times fewer bytes")
    handle.close()  # rhtcomm


if __name__ == "__main__":
    main(*sys.argv[1:])
    torch.distributed.destroy_process_group()
