"""How long the exchange of a bucket will take, and whether compression pays: a cost model.

With n ranks, N coordinates, a link of B bytes per second in each direction, a latency L, and P_b
the payload's bytes at b bits, a rank needs for one bucket

    float32       2 (n - 1) / n  4 N F / B  +  2 (n - 1) L
    bf16          half the bytes of float32, and C N for the casts
    all_gather    (n - 1) P_b F / B  +  (n - 1) L  +  s (E + D_1 + (n - 1) D_2) N
    two_shot      2 (n - 1) / n P_b F / B  +  2 (n - 1) L
                  + s (E + (D_1 + (n - 1) D_2 + E) / n + D_1) N

where F = 1514 / 1448 is what the frames of Ethernet, IP and TCP add. Per coordinate, E is the time
to encode, D_1 to decode a single payload, D_2 to add one more payload, and C to cast to bf16 and
back; s is how much slower the codec runs in training than it was measured. A bucket travels in c
chunks, each while others are encoded or decoded: the longer of link and codec counts in full, the
shorter by one c-th (c = 1 without compression). The model ignores what the backward pass hides,
congestion, the sums of an uncompressed all-reduce, and links between machines that are slower than
the machines' own.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rhtcomm.codebooks import EXPECTED_VNMSE
from rhtcomm.codec import Codec
from rhtcomm.communicators import ring_bytes
from rhtcomm.kernels import kernel_for
from rhtcomm.quantizers import ECDQ, QuicFL
from rhtcomm.quantizers.ecdq import BITS
from rhtcomm.randomness import Key
from rhtcomm.reduce.split import split_into_chunks, split_into_shards

__all__ = ["CodecSpeed", "Plan", "Prediction", "measure_codec", "plan"]

FRAMING = 1514 / 1448
# What compression must gain to be worth its error and another dependency.
WORTHWHILE = 1.1

PlanQuantizer = Literal["quic_fl", "ecdq"]
_BITS: dict[str, list[float]] = {
    "quic_fl": list(range(1, 9)),
    "ecdq": list(BITS),
}
_BITS_IN_WORDS = {"quic_fl": "1 to 8", "ecdq": "1, 1.25, 1.5, ..., 6"}


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds per coordinate, at some number of bits."""

    encode: float  # E
    decode: float  # D_1: of one payload
    decode_more: float  # D_2: of each further payload of the same mean
    cast: float  # C: to bfloat16 and back


@dataclass(frozen=True)
class Prediction:
    """One way to exchange a bucket."""

    algorithm: str  # "float32", "bf16", "all_gather" or "two_shot"
    bits: float
    bytes_sent: int  # per rank, without what frames add
    chunks: int
    link_seconds: float
    codec_seconds: float
    nmse: float  # summed over the hops: of one encoding, relative to what is encoded

    @property
    def seconds(self) -> float:
        shorter, longer = sorted((self.link_seconds, self.codec_seconds))
        return longer + shorter / self.chunks

    @property
    def name(self) -> str:
        return f"{self.bits:g} bits, {self.algorithm}" if self.bits <= 8 else self.algorithm


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
                f"nothing compressed within the error allowed is {WORTHWHILE} times as fast."
            )
        factor = plain.seconds / self.recommended.seconds
        return (
            f"Take {self.recommended.name}: {1e3 * self.recommended.seconds:.3g} ms, {factor:.1f} "
            f"times as fast as {plain.name}."
        )

    def __str__(self) -> str:
        lines = [f"{'':22}{'ms':>10}{'link':>10}{'codec':>10}{'MB sent':>10}{'NMSE':>10}"]
        for p in self.predictions:
            times = "".join(
                f"{1e3 * seconds:10.2f}" for seconds in (p.seconds, p.link_seconds, p.codec_seconds)
            )
            lines.append(f"{p.name:22}{times}{p.bytes_sent / 1e6:10.3f}{p.nmse:10.2g}")
        return "\n".join([*lines, "", self.verdict])


def plan(
    numel: int,
    world_size: int,
    link_gbps: float,
    *,
    latency: float = 50e-6,
    bits: Sequence[float] | None = None,
    max_nmse: float = 0.03,
    speeds: Mapping[float, CodecSpeed] | None = None,
    slowdown: float = 1.0,
    quantizer: PlanQuantizer = "quic_fl",
) -> Plan:
    """Predict the exchange of a bucket by each configuration, and recommend one.

    The formula is at the top of `rhtcomm/cost.py`.

    Args:
        numel: N, coordinates of the bucket, float32.
        world_size: n, ranks, each with a link of its own.
        link_gbps: rate of a link in each direction, in Gbit/s (10^9 bits per second).
        latency: L, seconds for a message to arrive.
        bits: the numbers of bits to consider; by default 1 to 8 of QUIC-FL, 1 to 6 of ECDQ.
        max_nmse: the largest squared error allowed, relative to what is encoded, summed over the
            encodings a gradient goes through (all_gather: one, two_shot: two). The default allows
            QUIC-FL's 4 bits in both.
        speeds: the codec's speed by bits, by default measured now, on the CPU and with the threads
            that torch has in this process (takes a second).
        slowdown: s, how much slower the codec runs in training than measured. A rank keeps two
            cores busy, one with the codec, one with the transport. Where fewer are free, s is 2
            over their number, as `benchmarks/scaling.md` checks.
        quantizer: "quic_fl" or "ecdq".

    Raises:
        ValueError: an argument is out of its range.
    """
    if numel < 1 or world_size < 2 or not link_gbps > 0 or not latency >= 0 or not slowdown > 0:
        raise ValueError(
            f"rhtcomm.plan: numel={numel}, link_gbps={link_gbps} and slowdown={slowdown} must be "
            f"positive, world_size={world_size} at least 2, latency={latency} not negative"
        )
    if quantizer not in _BITS:
        raise ValueError(f'rhtcomm.plan: quantizer={quantizer!r} must be "quic_fl" or "ecdq"')
    if bits is None:
        bits = [int(b) for b in _BITS[quantizer] if b % 1 == 0]
    if not bits or not set(bits) <= set(_BITS[quantizer]):
        raise ValueError(
            f"rhtcomm.plan: bits={tuple(bits)} must be some of {_BITS_IN_WORDS[quantizer]}"
        )
    codecs = {b: _codec(quantizer, b) for b in bits}
    if speeds is None:
        speeds = {b: measure_codec(b, quantizer=quantizer) for b in bits}
    if missing := set(bits) - set(speeds):
        raise ValueError(f"rhtcomm.plan: speeds lack {sorted(missing)} bits, which bits ask for")

    predictions = predict(numel, world_size, link_gbps, latency, codecs, speeds, slowdown)

    def fastest(of_them: Sequence[Prediction]) -> Prediction | None:
        return min(of_them, key=lambda p: p.seconds, default=None)

    plain = fastest([p for p in predictions if p.bits > 8])
    best = fastest([p for p in predictions if p.bits <= 8 and p.nmse <= max_nmse])
    assert plain is not None
    if best is None or best.seconds * WORTHWHILE > plain.seconds:
        return Plan(predictions, plain, pays=False)
    return Plan(predictions, best, pays=True)


def predict(
    numel: int,
    world_size: int,
    link_gbps: float,
    latency: float,
    codecs: Mapping[float, Codec],
    speeds: Mapping[float, CodecSpeed],
    slowdown: float,
) -> tuple[Prediction, ...]:
    """The formula at the top, for each codec, by its bits; arguments as of `plan`."""

    def prediction(
        algorithm: str,
        bits: float,
        chunks: int,
        sent: int,
        messages: int,
        codec: float,
        nmse: float,
    ) -> Prediction:
        link = sent * FRAMING * 8e-9 / link_gbps + messages * latency
        return Prediction(algorithm, bits, sent, chunks, link, codec * slowdown, nmse)

    n, others = world_size, world_size - 1
    cast = statistics.median(speeds[b].cast for b in codecs)
    found = [
        prediction("float32", 32, 1, ring_bytes(4 * numel, n), 2 * others, 0.0, 0.0),
        prediction("bf16", 16, 1, ring_bytes(2 * numel, n), 2 * others, cast * numel, 2.0**-18),
    ]
    for b, codec in codecs.items():
        speed, nmse = speeds[b], _vnmse(codec)
        lengths = [chunk.stop - chunk.start for chunk in split_into_chunks(numel, codec.block, 1)]
        sent = others * sum(map(codec.nbytes, lengths))
        mean_of_all = speed.decode + others * speed.decode_more
        seconds = (speed.encode + mean_of_all) * numel
        found.append(prediction("all_gather", b, len(lengths), sent, others, seconds, nmse))
        lengths = [chunk.stop - chunk.start for chunk in split_into_chunks(numel, codec.block, n)]
        shards = (split_into_shards(length, codec.block, n) for length in lengths)
        longest = (max(codec.nbytes(s.stop - s.start) for s in of_chunk) for of_chunk in shards)
        sent = 2 * others * sum(longest)
        seconds = (speed.encode + (mean_of_all + speed.encode) / n + speed.decode) * numel
        found.append(prediction("two_shot", b, len(lengths), sent, 2 * others, seconds, 2 * nmse))
    return tuple(found)


def _codec(quantizer: PlanQuantizer, bits: float) -> Codec:
    if quantizer == "ecdq":
        return Codec(ECDQ(bits))
    return Codec(QuicFL(int(bits)))


def _vnmse(codec: Codec) -> float:
    quantizer = codec.quantizer
    if isinstance(quantizer, ECDQ):
        return quantizer.vnmse
    assert isinstance(quantizer, QuicFL)
    return EXPECTED_VNMSE["quic_fl"][quantizer.bits]


def measure_codec(
    bits: float, numel: int = 1 << 20, repeats: int = 7, quantizer: PlanQuantizer = "quic_fl"
) -> CodecSpeed:
    """Speed of the codec on this CPU, with torch's threads: the fastest of a few calls.

    Args:
        bits: of the quantizer.
        numel: coordinates of the tensor that is encoded.
        repeats: calls of each kind, of which the fastest counts.
        quantizer: "quic_fl" or "ecdq".
    """
    codec, key = _codec(quantizer, bits), Key(seed=0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(numel, generator=generator, dtype=torch.float32, device="cpu")
    one, three = (
        torch.stack([codec.encode(x, key, rank, count) for rank in range(count)])
        for count in (1, 3)
    )
    out, half = torch.empty_like(x), x.bfloat16()

    def seconds(action: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return min(times) / numel  # other work on the machine only ever adds

    def decode(payloads: torch.Tensor) -> float:
        return seconds(lambda: codec.decode_mean(payloads, key, numel, out=out))

    of_one, of_three = decode(one), decode(three)
    return CodecSpeed(
        encode=seconds(lambda: codec.encode(x, key)),
        decode=of_one,
        decode_more=max(0.0, of_three - of_one) / 2,
        cast=seconds(lambda: (half.copy_(x), out.copy_(half))),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m rhtcomm plan`."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--numel", type=int, help="coordinates of a bucket")
    size.add_argument("--mebibytes", type=float, default=25, help="the same, as float32")
    parser.add_argument(
        "--world-size", type=int, required=True, help="ranks, each with its own link"
    )
    parser.add_argument("--link-gbps", type=float, required=True, help="Gbit/s each way")
    parser.add_argument("--latency", type=float, default=50e-6, help="seconds per message")
    parser.add_argument("--quantizer", choices=_BITS, default="quic_fl", help="default: quic_fl")
    parser.add_argument("--bits", type=float, nargs="+", help="default: all whole numbers")
    parser.add_argument(
        "--max-nmse",
        type=float,
        default=0.03,
        help="squared error allowed, relative to what is encoded",
    )
    parser.add_argument(
        "--slowdown",
        type=float,
        default=1.0,
        help="how much slower the codec runs in training: 2 over the cores per rank, if fewer",
    )
    parser.add_argument("--threads", type=int, help="threads per rank; default: torch's")


def run(args: argparse.Namespace) -> None:
    """Print the plan that the arguments ask for."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"rhtcomm.plan: threads={args.threads} must be positive")
        torch.set_num_threads(args.threads)
    numel = int(args.mebibytes * 2**18) if args.numel is None else args.numel
    kernels = getattr(
        kernel_for(torch.device("cpu"), _codec(args.quantizer, 4).quantizer), "variant", "reference"
    )
    print(
        f"{numel:,} coordinates, {args.world_size} ranks, {args.link_gbps:g} Gbit/s; "
        f"codec measured here with {torch.get_num_threads()} thread(s), kernels: {kernels}\n"
    )
    print(
        plan(
            numel,
            args.world_size,
            args.link_gbps,
            latency=args.latency,
            bits=args.bits,
            max_nmse=args.max_nmse,
            slowdown=args.slowdown,
            quantizer=args.quantizer,
        )
    )
    print("This is for the exchange alone: what the backward pass hides of it cannot be saved.")
