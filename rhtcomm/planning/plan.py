"""Which way a bucket should travel: `rhtcomm.plan`, from the predictions of the cost model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rhtcomm.markdown import table
from rhtcomm.planning.cost import TYPICAL, Model, Prediction
from rhtcomm.planning.probe import CodecSpeed, Link, PlanQuantizer, codec_of, measure_codec
from rhtcomm.quantizers.ecdq import BITS as ECDQ_BITS

__all__ = ["BITS", "Plan", "plan"]

# What compression must gain to be worth its error and another dependency.
WORTHWHILE = 1.1

BITS: dict[str, list[float]] = {"quic_fl": list(range(1, 9)), "ecdq": list(ECDQ_BITS)}
_BITS_IN_WORDS = {"quic_fl": "1 to 8", "ecdq": "1, 1.25, 1.5, ..., 6"}


@dataclass(frozen=True)
class Plan:
    """Predictions for one bucket, and what to do.

    `recommended` is the fastest compressed prediction within the error allowed. Where that is not
    1.1 times as fast as the best uncompressed one, it is the latter, and `pays` is False.
    """

    predictions: tuple[Prediction, ...]
    recommended: Prediction
    pays: bool

    @property
    def verdict(self) -> str:
        """The recommendation in one sentence."""
        plain = min((p for p in self.predictions if p.bits > 8), key=lambda p: p.seconds)
        if not self.pays:
            return (
                f"Compression will not pay: {plain.name} takes {1e3 * plain.seconds:.3g} ms, and "
                "nothing compressed within the error allowed is at least "
                f"{WORTHWHILE} times as fast."
            )
        factor = plain.seconds / self.recommended.seconds
        return (
            f"Take {self.recommended.name}: {1e3 * self.recommended.seconds:.3g} ms, {factor:.1f} "
            f"times as fast as {plain.name}."
        )

    def __str__(self) -> str:
        header = ["", "ms", "latency", "link", "codec", "posting", "transport", "MB sent", "NMSE"]
        rows = [_cells(p) for p in self.predictions]
        return f"{table(header, rows)}\n\n{self.verdict}"


def plan(
    numel: int,
    world_size: int,
    link_gbps: float | None = None,
    *,
    latency: float | None = None,
    bits: Sequence[float] | None = None,
    max_nmse: float = 0.03,
    speeds: Mapping[float, CodecSpeed] | None = None,
    slowdown: float = 1.0,
    quantizer: PlanQuantizer = "quic_fl",
    link: Link | None = None,
    cores: float = math.inf,
    threads: int = 1,
) -> Plan:
    """Predict the exchange of a bucket by each configuration, and recommend one.

    The formula is at the top of `rhtcomm/planning/cost.py`.

    Args:
        numel: N, coordinates of the bucket, float32.
        world_size: n, ranks, each with a link of its own.
        link_gbps: rate of a link in each direction, in Gbit/s (10^9 bits per second), by default
            the link's.
        latency: L, seconds for a message to arrive, by default the link's.
        bits: the numbers of bits to consider; by default 1 to 8 of QUIC-FL, 1 to 6 of ECDQ.
        max_nmse: the largest squared error allowed, relative to what is encoded, summed over the
            encodings a gradient goes through (all_gather: one, two_shot and gather: two). The
            default allows QUIC-FL's 4 bits in both.
        speeds: the codec's speed by bits, by default measured now, on the CPU and with the threads
            that torch has in this process (takes a second).
        slowdown: s, how much slower the codec runs in training than measured.
        quantizer: "quic_fl" or "ecdq".
        link: what `measure_link` found, by default typical figures of TCP on Linux.
        cores: k, of a rank; by default as many as it can use.
        threads: t, of the codec, when its speed was measured.

    Raises:
        ValueError: an argument is out of its range, or neither `link_gbps` nor `link` is given.
    """
    if link_gbps is None and link is None:
        raise ValueError("rhtcomm.plan: give link_gbps, the link's rate in Gbit/s, or link")
    link = TYPICAL if link is None else link
    gbps = link.gbps if link_gbps is None else link_gbps
    link = dataclasses.replace(
        link, gbps=gbps, latency=link.latency if latency is None else latency
    )
    finite = 0 <= link.latency < math.inf and 0 < slowdown < math.inf
    if numel < 1 or world_size < 2 or not gbps > 0 or not finite:
        raise ValueError(
            f"rhtcomm.plan: numel={numel}, link_gbps={gbps} and slowdown={slowdown} must be "
            f"positive, world_size={world_size} at least 2, latency={link.latency} not negative"
        )
    if not cores > 0 or threads < 1:
        raise ValueError(f"rhtcomm.plan: cores={cores} and threads={threads} must be positive")
    if quantizer not in BITS:
        raise ValueError(f'rhtcomm.plan: quantizer={quantizer!r} must be "quic_fl" or "ecdq"')
    if bits is None:
        bits = [int(b) for b in BITS[quantizer] if b % 1 == 0]
    if not bits or not set(bits) <= set(BITS[quantizer]):
        raise ValueError(
            f"rhtcomm.plan: bits={tuple(bits)} must be some of {_BITS_IN_WORDS[quantizer]}"
        )
    if speeds is None:
        speeds = {b: measure_codec(b, quantizer=quantizer) for b in bits}
    if missing := set(bits) - set(speeds):
        raise ValueError(f"rhtcomm.plan: speeds lack {sorted(missing)} bits, which bits ask for")

    model = Model(numel, world_size, link, cores, threads, slowdown)
    predictions = list(model.uncompressed([speeds[b] for b in bits]))
    for b in bits:
        predictions += model.compressed(b, codec_of(quantizer, b), speeds[b])

    def fastest(of_them: Sequence[Prediction]) -> Prediction | None:
        return min(of_them, key=lambda p: p.seconds, default=None)

    plain = fastest([p for p in predictions if p.bits > 8])
    best = fastest([p for p in predictions if p.bits <= 8 and p.nmse <= max_nmse])
    assert plain is not None
    if best is None or best.seconds * WORTHWHILE > plain.seconds:
        return Plan(tuple(predictions), plain, pays=False)
    return Plan(tuple(predictions), best, pays=True)


def _cells(p: Prediction) -> list[str]:
    seconds = (
        p.seconds,
        p.latency_seconds,
        p.link_seconds,
        p.codec_seconds,
        p.posting_seconds,
        p.transport_seconds,
    )
    times = [f"{1e3 * part:.2f}" for part in seconds]
    return [p.name, *times, f"{p.bytes_sent / 1e6:.3f}", f"{p.nmse:.2g}"]
