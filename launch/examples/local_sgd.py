"""DiLoCo: ranks train independently, and periodically average the changes of their parameters.

    torchrun --nproc-per-node=2 launch/examples/local_sgd.py [checkpoint to resume from]

Compression and outer steps are the lines that end with "# rhtcomm".
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import rhtcomm.hooks  # rhtcomm


def main(checkpoint: str | None = None) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same model on all ranks
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averager = rhtcomm.hooks.OuterAverager(model, period=8, bits=4)  # rhtcomm

    x = torch.randn(4096, 64)  # the net is to learn a fixed linear map
    y = x @ torch.randn(64, 64) / 8
    first = 0
    if checkpoint is not None:
        saved = torch.load(f"{checkpoint}-{rank}.pt")  # ranks differ between outer steps
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        averager.load_state_dict(saved["averager"])  # rhtcomm
        first = saved["epoch"]
    for epoch in range(first, 3):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64 * world_size):
            mine = batch[rank::world_size]
            nn.functional.mse_loss(model(x[mine]), y[mine]).backward()
            optimizer.step()
            averager.step()  # rhtcomm
            optimizer.zero_grad()
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        parts["averager"] = averager  # rhtcomm
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "epoch": epoch + 1}, f"local-sgd-{epoch + 1}-{rank}.pt")
    averager.synchronize()  # rhtcomm
    if rank == 0:
        with torch.no_grad():
            loss = nn.functional.mse_loss(model(x), y)
        stats = averager.stats()
        print(f"loss {loss:.6f}; {stats.steps} outer steps sent {stats.bytes_sent / 1e3:.0f} kB")
    averager.close()  # rhtcomm
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
