"""What the hook has done, in numbers: of one bucket, of a step, of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..randomness import Key
from ..reduce import Report

__all__ = ["BucketReport", "Stats", "Totals", "error_of", "figures"]


@dataclass(slots=True)
class BucketReport:
    """What happened to one bucket in one step, on this rank; observers get it.

    Seconds are as in `Stats`. Without `exposed_seconds` it is not known how long training waited:
    where FSDP2 trains on a device, and in the few steps whose last bucket DDP does not name.
    """

    rank: int
    """Of those that average."""
    step: int
    """Counted from 0; it goes on after a resume."""
    bucket: int
    """Its number; with the step it tells buckets apart."""
    numel: int
    """Coordinates. With FSDP2, of the shards of all ranks."""
    bits: float
    """Per coordinate of what is compressed; 16, 32 or 64 where nothing is."""
    bytes_sent: int
    """By this rank."""
    bytes_uncompressed: int
    """What a ring all-reduce of the bucket in its own dtype would have sent."""
    encode_seconds: float
    """Rotating, quantizing and packing."""
    exchange_seconds: float
    """Waiting for messages."""
    decode_seconds: float
    """Unpacking, adding up and rotating back."""
    rotations: int | None
    """Transforms taken, None where nothing was compressed."""
    squared_error: float = 0.0
    """|mean - exact|^2, where `nmse_every` asks for it in this step."""
    squared_norm: float = 0.0
    """|exact|^2, likewise."""
    exposed_seconds: float | None = None
    """How long training stood still for this bucket's mean; 0: it was there before."""
    last: bool = False
    """Whether the reports of its step end with it."""

    @classmethod
    def of(
        cls, report: Report, rank: int, key: Key, numel: int, error: float, norm: float
    ) -> "BucketReport":
        """A reducer's report, with what it does not say."""
        return cls(
            rank,
            key.step,
            key.bucket,
            numel,
            report.bits,
            report.bytes_sent,
            report.bytes_uncompressed,
            report.encode_seconds,
            report.exchange_seconds,
            report.decode_seconds,
            report.rotations,
            error,
            norm,
        )

    @property
    def compression_ratio(self) -> float:
        """`bytes_uncompressed` over `bytes_sent`; 1 if nothing was sent."""
        return _ratio(self.bytes_uncompressed, self.bytes_sent)

    @property
    def nmse(self) -> float | None:
        """|mean - exact|^2 / |exact|^2, None where it was not measured."""
        return _nmse(self.squared_error, self.squared_norm)


@dataclass(frozen=True)
class Stats:
    """What the hook has done so far, on this rank; ``later - earlier``: in the steps between.

    Seconds are wall-clock time of the thread that exchanges. Chunks of a bucket travel while others
    are encoded and decoded; `exchange_seconds` is what it waited for in addition, without the
    acknowledgements that ranks exchange behind the last result of a step. On CUDA they are the time
    to launch the work, except for exchanges through host memory (Gloo), which wait for the device.
    """

    steps: int
    """Steps that began."""
    bytes_sent: int
    """By this rank, to other nodes where there are two levels."""
    bytes_uncompressed: int
    """What a ring all-reduce of the gradients in their own dtype would have sent; with FSDP2, a
    ring reduce-scatter."""
    encode_seconds: float
    """Rotating, quantizing and packing."""
    exchange_seconds: float
    """Waiting for messages."""
    decode_seconds: float
    """Unpacking, adding up and rotating back."""
    rotations: dict[int, int]
    """How many compressed buckets took 1, 2 and 3 transforms."""
    squared_error: float = 0.0
    """|mean - exact|^2, summed over the buckets that `nmse_every` sampled."""
    squared_norm: float = 0.0
    """|exact|^2, likewise."""
    exposed_seconds: float | None = None
    """With an observer: how long training stood still for the means; None if not measured."""
    waits: dict[int, int] = field(default_factory=dict)
    """With an observer: how many buckets training waited for, by how long. 0: not at all; else the
    next power of two of microseconds: ``waits[64]`` took at least 32 and less than 64."""

    def __sub__(self, earlier: "Stats") -> "Stats":
        exposed = self.exposed_seconds
        if exposed is not None and earlier.exposed_seconds is not None:
            exposed -= earlier.exposed_seconds
        waits = _minus(self.waits, earlier.waits)
        return Stats(
            steps=self.steps - earlier.steps,
            bytes_sent=self.bytes_sent - earlier.bytes_sent,
            bytes_uncompressed=self.bytes_uncompressed - earlier.bytes_uncompressed,
            encode_seconds=self.encode_seconds - earlier.encode_seconds,
            exchange_seconds=self.exchange_seconds - earlier.exchange_seconds,
            decode_seconds=self.decode_seconds - earlier.decode_seconds,
            rotations=_minus(self.rotations, earlier.rotations),
            squared_error=self.squared_error - earlier.squared_error,
            squared_norm=self.squared_norm - earlier.squared_norm,
            exposed_seconds=exposed if any(waits.values()) else None,
            waits={limit: count for limit, count in waits.items() if count},
        )

    @property
    def nmse(self) -> float | None:
        """|mean - exact|^2 / |exact|^2 over the sampled buckets, None if none was sampled."""
        return _nmse(self.squared_error, self.squared_norm)

    @property
    def bytes_saved(self) -> int:
        """`bytes_uncompressed` minus `bytes_sent`."""
        return self.bytes_uncompressed - self.bytes_sent

    @property
    def compression_ratio(self) -> float:
        """`bytes_uncompressed` over `bytes_sent`; 1 if nothing was sent."""
        return _ratio(self.bytes_uncompressed, self.bytes_sent)


def _minus(counts: Mapping[int, int], before: Mapping[int, int]) -> dict[int, int]:
    return {what: count - before.get(what, 0) for what, count in counts.items()}


def _ratio(uncompressed: int, sent: int) -> float:
    return uncompressed / sent if sent else 1.0


def _nmse(squared_error: float, squared_norm: float) -> float | None:
    return squared_error / squared_norm if squared_norm else None


def figures(before: Stats, after: Stats) -> dict[str, float]:
    """Means over the steps between two Stats, under names for a logger; empty where there are none.

    `rhtcomm/bytes_sent` and the seconds are of one step. `rhtcomm/exposed_seconds` is there with an
    observer. `rhtcomm/nmse`, where errors are measured, is of all steps so far.
    """
    between = after - before
    if between.steps == 0:
        return {}
    sums = {
        "bytes_sent": between.bytes_sent,
        "encode_seconds": between.encode_seconds,
        "exchange_seconds": between.exchange_seconds,
        "decode_seconds": between.decode_seconds,
        "exposed_seconds": between.exposed_seconds,
    }
    values = {name: x / between.steps for name, x in sums.items() if x is not None}
    values["compression_ratio"] = between.compression_ratio
    if after.nmse is not None:
        values["nmse"] = after.nmse
    return {f"rhtcomm/{name}": value for name, value in values.items()}


@dataclass
class Totals:
    """Sums of reports. The thread that exchanges adds; `add_wait`: the one that trains.

    Others may read.
    """

    bytes_sent: int = 0
    bytes_uncompressed: int = 0
    encode_seconds: float = 0.0
    exchange_seconds: float = 0.0
    decode_seconds: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    exposed_seconds: float = 0.0
    rotations: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0, 3: 0})
    waits: dict[int, int] = field(default_factory=dict)

    def add(self, report: Report | BucketReport) -> None:
        self.bytes_sent += report.bytes_sent
        self.bytes_uncompressed += report.bytes_uncompressed
        self.encode_seconds += report.encode_seconds
        self.exchange_seconds += report.exchange_seconds
        self.decode_seconds += report.decode_seconds
        if report.rotations is not None:
            self.rotations[report.rotations] += 1

    def add_error(self, squared_error: float, squared_norm: float) -> None:
        self.squared_error += squared_error
        self.squared_norm += squared_norm

    def add_wait(self, seconds: float) -> None:
        limit = 1 << int(seconds * 1e6).bit_length() if seconds else 0
        self.exposed_seconds += seconds
        self.waits[limit] = self.waits.get(limit, 0) + 1

    def stats(self, steps: int) -> Stats:
        return Stats(
            steps=steps,
            bytes_sent=self.bytes_sent,
            bytes_uncompressed=self.bytes_uncompressed,
            encode_seconds=self.encode_seconds,
            exchange_seconds=self.exchange_seconds,
            decode_seconds=self.decode_seconds,
            rotations=dict(self.rotations),
            squared_error=self.squared_error,
            squared_norm=self.squared_norm,
            exposed_seconds=self.exposed_seconds if self.waits else None,
            waits=dict(sorted(self.waits.items())),
        )


def error_of(mean: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """|mean - exact|^2 and |exact|^2; zeros unless both are finite: a scaler skips such steps."""
    error = (mean.float() - exact).square().sum().item()
    norm = exact.square().sum().item()
    return (error, norm) if math.isfinite(error) and math.isfinite(norm) else (0.0, 0.0)
