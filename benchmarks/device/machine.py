"""What the machine is, for the head of the report."""

import os

from device.devices import Device
from device.results import Results


def run(device: Device, results: Results) -> None:
    results.fact(**device.facts())
    results.fact(**{"CPU cores": os.cpu_count()})
    results.row("Clocks", when="at the beginning", **device.clocks())
