"""FSDP2 with compressed gradients.

    torchrun --nproc-per-node=2 launch/examples/train_fsdp.py [checkpoint to resume from]

Compression adds the lines that end with "# rhtcomm".
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rhtcomm.hooks  # rhtcomm


def main(checkpoint: str | None = None) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = rhtcomm.hooks.compress_fsdp(model, bits=4)  # rhtcomm

    x = torch.randn(4096, 64)  # the net is to learn a fixed linear map
    y = x @ torch.randn(64, 64) / 8
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "epoch": torch.tensor(0)}
    state["hook"] = handle  # rhtcomm
    if checkpoint is not None:
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    loss = torch.tensor(0.0)
    for epoch in range(int(state["epoch"]), 3):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64 * dist.get_world_size()):
            mine = batch[dist.get_rank() :: dist.get_world_size()]
            loss = nn.functional.mse_loss(model(x[mine]), y[mine])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state["model"], state["optimizer"] = get_state_dict(model, optimizer)
        state["epoch"] = torch.tensor(epoch + 1)
        dcp.save(state, checkpoint_id=f"fsdp-{epoch + 1}")
    if dist.get_rank() == 0:
        ratio = handle.stats().compression_ratio
        print(f"loss {loss.item():.6f}, {ratio:.1f} times fewer bytes")
    handle.close()  # rhtcomm
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
