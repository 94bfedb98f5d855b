#!/usr/bin/env bash
# torch 2.13.0: GradBucket.gradients() silently gives a communication hook wrong gradients for two
# kinds of parameters: channels_last gradients are in the wrong order, and of complex gradients only
# the first half is returned.
#
# DDP stores a gradient in its bucket in the order of the parameter's memory, and complex numbers as
# pairs of floats. `gradients()` splits the bucket by the parameters' numel() and views each part in
# row-major order. So a hook that works on gradients (such as torch's PowerSGD) gets wrong rows of a
# channels_last weight, and never sees the second half of a complex parameter. A hook that works on
# the whole `buffer()` is not affected.
#
# Seen:
#   channels_last: same values True, same order False
#   complex64: bucket 8 floats, gradients() shows 4
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/case.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
seen = {}


def hook(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    (gradient,), buffer = bucket.gradients(), bucket.buffer()
    seen[state] = gradient.clone(), buffer.numel()
    future = torch.futures.Future()
    future.set_result(buffer)
    return future


convolution = torch.nn.Conv2d(2, 1, 2, bias=False).to(memory_format=torch.channels_last)
model = DistributedDataParallel(convolution)
model.register_comm_hook("channels_last", hook)
model(torch.arange(8.0).view(1, 2, 2, 2)).sum().backward()
(shown, _), true = seen["channels_last"], convolution.weight.grad
assert shown.shape == true.shape
same_values = torch.equal(shown.flatten().sort().values, true.flatten().sort().values)
print(f"channels_last: same values {same_values}, same order {torch.equal(shown, true)}")


class Complex(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x):
        return (self.w * x).abs().sum()


model = DistributedDataParallel(Complex())
model.register_comm_hook("complex64", hook)
model(torch.ones(4)).backward()
shown, numel = seen["complex64"]
print(f"complex64: bucket {numel} floats, gradients() shows {shown.numel()}")
dist.destroy_process_group()
PYTHON
seen="$("$folder/venv/bin/python" -W ignore "$folder/case.py" 2>/dev/null)"
echo "$seen"
[[ "$seen" == "channels_last: same values True, same order False
complex64: bucket 8 floats, gradients() shows 4" ]]
