"""How long the exchange of a bucket takes, and whether compression pays: a cost model.

A bucket has N coordinates of float32. Each of n ranks has k cores, and a link of B bytes per second
in each direction. A rank sends S bytes and posts m messages: it sends one half of them and asks for
the other half. An exchange takes

    seconds = R + h L + max(X, Y) + min(X, Y) / c

    X = F S / B                               the link moves bytes
    Y = max(W, T, (t K + m Q + T) / k)        the processors of the rank work
    W = K + m Q                               one thread has the codec, and posts messages
    T = A S                                   another thread moves bytes

because a bucket travels in c chunks, each while others are encoded or decoded: the longer of link
and processors counts in full, the shorter by one c-th. With P the bytes of a payload of all N
coordinates, P_n those of the payload of a shard (about P / n; both summed over chunks),

                S              m                  h  K / s
    all_gather  (n - 1) P      (2 c + 2) (n - 1)  2  2 c G + (E + M) N
    two_shot    2 (n - 1) P_n  (4 c + 2) (n - 1)  3  4 c G + (E + (M + E) / n + D) N
    gather      (n - 1) P      (2 c + 2) (n - 1)  3  4 c G + (E + M + E + D) N

    R    handover: seconds until a worker thread has the bucket, and until its result is known
    L    latency: seconds until a small message has arrived
    h    messages that wait for each other, one after the other
    Q    posting: processor seconds of a rank for each message
    A    transport: processor seconds for each byte that a rank sends while another arrives
    F    1514 / 1448, what frames of Ethernet, IP and TCP add
    E    encode, D decode one payload, D_2 add one more payload: seconds per coordinate
    M    D + (n - 1) D_2, decode the mean of n payloads
    G    seconds of each call of the codec in addition
    t    threads of the codec
    s    slowdown: how much slower the codec runs in training than it was measured

In m and h, 2 (n - 1) messages and one L are the acknowledgements by which a step ends, over Gloo;
other transports have none. In gather, S and m are those of rank 0, and its link is busy in one
direction after the other, each while chunks travel in the other one: X = (1 + 1 / c) F S / B.

Without compression the transport adds up numbers in a ring, in 2 (n - 1) steps. In each of them a
rank sends one message and asks for one. Adding, posting and moving bytes overlap with the link:

    seconds = 2 (n - 1) L + V N + max(X, (m Q + T) max(1, 1 / k)),   m = 4 (n - 1)

    float32      S = 2 (n - 1) / n 4 N        V: divide by n
    bf16         S = 2 (n - 1) / n 2 N        V: cast to bfloat16, divide by n, cast back

Here A is that of such a sum. V N takes s times as long, and t / k times where k < t.

The model ignores what the backward pass hides, congestion, and links between machines that are
slower than the machines' own.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rhtcomm.codebooks import EXPECTED_VNMSE
from rhtcomm.codec import Codec
from rhtcomm.communicators import ring_bytes
from rhtcomm.planning.probe import FRAMING, CodecSpeed, Link
from rhtcomm.quantizers import ECDQ, QuicFL
from rhtcomm.reduce.split import split_into_chunks, split_into_shards

__all__ = ["TYPICAL", "Model", "Prediction"]

# The hook's sockets and Gloo's all-reduce on processors of today, where nothing was measured.
TYPICAL = Link(
    latency=50e-6,
    posting=20e-6,
    gbps=math.inf,
    transport=1e-9,
    all_reduce=5e-10,
    all_reduce_bf16=6e-10,
    handover=1e-4,
    acknowledged=False,
)


@dataclass(frozen=True)
class Prediction:
    """One way to exchange a bucket, as the busiest rank sees it."""

    algorithm: str  # "float32", "bf16", "all_gather", "two_shot" or "gather"
    bits: float
    bytes_sent: int  # S, without what frames add
    messages: int  # m
    chunks: int
    latency_seconds: float  # R + h L
    link_seconds: float  # X
    codec_seconds: float  # K; without compression V N
    posting_seconds: float  # m Q
    transport_seconds: float  # T
    processor_seconds: float  # Y; without compression (m Q + T) max(1, 1 / k)
    nmse: float  # summed over the hops: of one encoding, relative to what is encoded

    @property
    def seconds(self) -> float:
        shorter, longer = sorted((self.link_seconds, self.processor_seconds))
        if self.bits > 8:
            return self.latency_seconds + longer + self.codec_seconds
        return self.latency_seconds + longer + shorter / self.chunks

    @property
    def name(self) -> str:
        if self.bits > 8:
            return self.algorithm
        return f"{self.bits:g} bit{'s' * (self.bits != 1)}, {self.algorithm}"


@dataclass(frozen=True)
class Model:
    """The formula at the top."""

    numel: int
    world_size: int
    link: Link
    cores: float
    threads: int
    slowdown: float

    def uncompressed(self, speeds: Sequence[CodecSpeed]) -> list[Prediction]:
        """float32 and, where the transport can add it, bf16."""
        divide, cast = (
            statistics.median(getattr(speed, what) for speed in speeds) * self.numel
            for what in ("divide", "cast")
        )
        link = self.link
        ways = [("float32", 32, 4, link.all_reduce, divide, 0.0)]
        if link.all_reduce_bf16 is not None:
            ways.append(("bf16", 16, 2, link.all_reduce_bf16, cast, 2.0**-18))
        found = []
        for name, bits, itemsize, per_byte, passes, nmse in ways:
            sent = ring_bytes(itemsize * self.numel, self.world_size)
            messages = 4 * (self.world_size - 1)
            posting, transport = messages * link.posting, sent * per_byte
            prediction = Prediction(
                name,
                bits,
                bytes_sent=sent,
                messages=messages,
                chunks=1,
                latency_seconds=2 * (self.world_size - 1) * link.latency,
                link_seconds=self._on_the_link(sent),
                codec_seconds=passes * self.slowdown * max(1.0, self.threads / self.cores),
                posting_seconds=posting,
                transport_seconds=transport,
                processor_seconds=(posting + transport) * max(1.0, 1 / self.cores),
                nmse=nmse,
            )
            found.append(prediction)
        return found

    def compressed(self, bits: float, codec: Codec, speed: CodecSpeed) -> list[Prediction]:
        """By each algorithm."""
        n, others, nmse = self.world_size, self.world_size - 1, _vnmse(codec)
        mean_of_all = speed.decode + others * speed.decode_more
        encode, decode = speed.encode, speed.decode

        lengths = _lengths(split_into_chunks(self.numel, codec.block, 1))
        sent, chunks = others * sum(map(codec.nbytes, lengths)), len(lengths)
        messages, calls = 2 * others * chunks, 2 * chunks * speed.call
        codec_seconds = (encode + mean_of_all) * self.numel + calls
        all_gather = self._predict(
            "all_gather", bits, sent, chunks, messages, 1, codec_seconds, nmse
        )
        codec_seconds = (2 * encode + mean_of_all + decode) * self.numel + 2 * calls
        gather = self._predict("gather", bits, sent, chunks, messages, 2, codec_seconds, 2 * nmse)
        lengths = _lengths(split_into_chunks(self.numel, codec.block, n))
        shards = (_lengths(split_into_shards(length, codec.block, n)) for length in lengths)
        sent = 2 * others * sum(max(map(codec.nbytes, of_chunk)) for of_chunk in shards)
        messages, calls = 4 * others * len(lengths), 4 * len(lengths) * speed.call
        codec_seconds = (encode + (mean_of_all + encode) / n + decode) * self.numel + calls
        two_shot = self._predict(
            "two_shot", bits, sent, len(lengths), messages, 2, codec_seconds, 2 * nmse
        )
        return [all_gather, two_shot, gather]

    def _predict(
        self,
        algorithm: str,
        bits: float,
        sent: int,
        chunks: int,
        messages: int,
        hops: int,
        codec_seconds: float,
        nmse: float,
    ) -> Prediction:
        link = self.link
        if link.acknowledged:
            messages, hops = messages + 2 * (self.world_size - 1), hops + 1
        codec, posting = codec_seconds * self.slowdown, messages * link.posting
        transport = sent * link.transport
        together = self.threads * codec + posting + transport
        on_the_link = self._on_the_link(sent)
        if algorithm == "gather":
            on_the_link *= 1 + 1 / chunks
        return Prediction(
            algorithm,
            bits,
            bytes_sent=sent,
            messages=messages,
            chunks=chunks,
            latency_seconds=link.handover + hops * link.latency,
            link_seconds=on_the_link,
            codec_seconds=codec,
            posting_seconds=posting,
            transport_seconds=transport,
            processor_seconds=max(codec + posting, transport, together / self.cores),
            nmse=nmse,
        )

    def _on_the_link(self, sent: int) -> float:
        return sent * FRAMING * 8e-9 / self.link.gbps


def _lengths(slices: Sequence[slice]) -> list[int]:
    return [one.stop - one.start for one in slices]


def _vnmse(codec: Codec) -> float:
    quantizer = codec.quantizer
    if isinstance(quantizer, ECDQ):
        return quantizer.vnmse
    assert isinstance(quantizer, QuicFL)
    return EXPECTED_VNMSE["quic_fl"][quantizer.bits]
