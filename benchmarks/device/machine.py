"""What the machine is, for the head of the report."""

import os

import torch

import rhtcomm
from device.devices import Device
from device.results import Results
from rhtcomm.kernels import kernel_for


def run(device: Device, results: Results) -> None:
    results.fact(**device.facts())
    kernel = kernel_for(torch.device("cpu"), rhtcomm.QuicFL(4))
    variant = getattr(kernel, "variant", "reference")
    results.fact(**{"CPU cores": os.cpu_count(), "kernels of the CPU": variant})
    if variant == "reference":
        results.failure("the C kernels are missing, so that comparisons with the CPU are slow")
    results.row("Clocks", when="at the beginning", **device.clocks())
