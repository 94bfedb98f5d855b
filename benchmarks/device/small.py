"""A few calls of the codec, for tools that watch a program."""

import torch

import rhtcomm
from device.devices import Device, device_for
from device.results import Results
from device.tensors import numbers
from rhtcomm.quantizers import Quantizer

__all__ = ["COUNTED", "ENDED", "SANITIZED", "count", "sanitize", "sanitize_one"]

KEY = rhtcomm.Key(1)
ENDED = "all kernels ended"
# k and dtype of what is counted: an encode and a decode of each, in this order, once to compile and
# once to count.
COUNTED = ((2, torch.float32), (2, torch.bfloat16), (1, torch.float32))


SANITIZED = (rhtcomm.QuicFL(4), rhtcomm.QuicFL(3, 1 / 512), rhtcomm.Eden(4))


def both_ways(codec: rhtcomm.Codec, x: torch.Tensor, device: Device) -> None:
    with device.kernels():
        payload = codec.encode(x, KEY)
        codec.decode_mean(payload[None], KEY, x.numel(), out=torch.empty_like(x))
    device.synchronize()


def sanitize_one(quantizer: Quantizer, dry: bool) -> None:
    """A few blocks and a tail."""
    device = device_for(dry)
    x = numbers((17 if not dry else 1) * 4096 - 777, torch.float32).to(device.torch)
    both_ways(rhtcomm.Codec(quantizer, 2), x, device)


def sanitize(device: Device, results: Results) -> None:
    for quantizer in SANITIZED:
        sanitize_one(quantizer, device.dry)
    print(ENDED)


def count(device: Device, results: Results) -> None:
    for k, dtype in [*COUNTED, *COUNTED]:
        x = numbers(device.bucket // dtype.itemsize, dtype).to(device.torch)
        both_ways(rhtcomm.Codec(rhtcomm.QuicFL(4), k), x, device)
    print(ENDED)
