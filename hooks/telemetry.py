"""What the hook has done, in numbers."""

import math
from dataclasses import dataclass, field

import torch

from ..reduce import Report

__all__ = ["Stats", "Totals", "figures"]


@dataclass(frozen=True)
class Stats:
    """What the hook has done so far, on this rank.

    Seconds are wall-clock time of the thread that exchanges. Chunks of a bucket travel while others
    are encoded and decoded; `exchange_seconds` is what it waited for in addition, without the
    acknowledgements that ranks exchange behind the last result of a step. On CUDA they are the time
    to launch the work, except for exchanges through host memory (Gloo), which wait for the device.
    `bytes_uncompressed` is what a ring all-reduce of the gradients in their own dtype would have
    sent; with FSDP2, a ring reduce-scatter. `nmse` is |mean - exact|^2 / |exact|^2 over the sampled
    buckets, None if none was sampled. `rotations` counts compressed buckets by the number of
    transforms that they took.
    """

    steps: int
    bytes_sent: int
    bytes_uncompressed: int
    encode_seconds: float
    exchange_seconds: float
    decode_seconds: float
    nmse: float | None
    rotations: dict[int, int]

    @property
    def bytes_saved(self) -> int:
        return self.bytes_uncompressed - self.bytes_sent

    @property
    def compression_ratio(self) -> float:
        return self.bytes_uncompressed / self.bytes_sent if self.bytes_sent else 1.0


def figures(before: Stats, after: Stats) -> dict[str, float]:
    """Means over the steps between two Stats, under names for a logger; empty where there are none.

    `rhtcomm/bytes_sent` and the seconds are of one step; `rhtcomm/nmse`, where errors are measured,
    is of all steps so far.
    """
    steps = after.steps - before.steps
    if steps == 0:
        return {}
    sent = after.bytes_sent - before.bytes_sent
    uncompressed = after.bytes_uncompressed - before.bytes_uncompressed
    values = {
        "bytes_sent": sent / steps,
        "compression_ratio": uncompressed / sent if sent else 1.0,
        "encode_seconds": (after.encode_seconds - before.encode_seconds) / steps,
        "exchange_seconds": (after.exchange_seconds - before.exchange_seconds) / steps,
        "decode_seconds": (after.decode_seconds - before.decode_seconds) / steps,
    }
    if after.nmse is not None:
        values["nmse"] = after.nmse
    return {f"rhtcomm/{name}": value for name, value in values.items()}


@dataclass
class Totals:
    """Sums of reports; the thread that exchanges adds, others may read."""

    bytes_sent: int = 0
    bytes_uncompressed: int = 0
    encode_seconds: float = 0.0
    exchange_seconds: float = 0.0
    decode_seconds: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    rotations: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0, 3: 0})

    def add(self, report: Report) -> None:
        self.bytes_sent += report.bytes_sent
        self.bytes_uncompressed += report.bytes_uncompressed
        self.encode_seconds += report.encode_seconds
        self.exchange_seconds += report.exchange_seconds
        self.decode_seconds += report.decode_seconds
        if report.rotations is not None:
            self.rotations[report.rotations] += 1

    def add_sample(self, mean: torch.Tensor, exact: torch.Tensor) -> None:
        """The error of a mean, where both are finite: not so in steps that a scaler skips."""
        error = (mean.float() - exact).square().sum().item()
        norm = exact.square().sum().item()
        if math.isfinite(error) and math.isfinite(norm):
            self.squared_error += error
            self.squared_norm += norm

    def stats(self, steps: int) -> Stats:
        return Stats(
            steps=steps,
            bytes_sent=self.bytes_sent,
            bytes_uncompressed=self.bytes_uncompressed,
            encode_seconds=self.encode_seconds,
            exchange_seconds=self.exchange_seconds,
            decode_seconds=self.decode_seconds,
            nmse=self.squared_error / self.squared_norm if self.squared_norm else None,
            rotations=dict(self.rotations),
        )
