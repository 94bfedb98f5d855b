"""What the cost model needs to know, measured: the link and its transport, and the codec.

`rhtcomm/planning/cost.py` predicts exchanges from these figures; its docstring has the equations.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from rhtcomm.codec import Codec
from rhtcomm.communicators import (
    Communicator,
    MPICommunicator,
    TorchCommunicator,
    ring_bytes,
)
from rhtcomm.quantizers import ECDQ, QuicFL
from rhtcomm.randomness import Key

__all__ = [
    "FRAMING",
    "CodecSpeed",
    "Link",
    "PlanQuantizer",
    "codec_of",
    "measure_codec",
    "measure_link",
]

PlanQuantizer = Literal["quic_fl", "ecdq"]

# What the frames of Ethernet, IP and TCP add to the bytes that they carry, as a factor.
FRAMING = 1514 / 1448

_SMALL = 64  # bytes of a small message
_CODEC = Codec(QuicFL(4))
_CHUNK, _CHUNKS = 3 << 18, 3  # coordinates of a chunk, and how many travel at a time
_RECEIVED = 1 << 24  # the most bytes that a rank receives at a time
_SUMMED = 1 << 18  # numbers in a large all-reduce at least, ...
_GROWTH = 16  # ... and how many times as many at most
_FEWEST, _MOST = 3, 40  # turns of a measurement


@dataclass(frozen=True)
class Link:
    """What an exchange costs besides the codec.

    Seconds are wall-clock time, processor seconds those of all threads of one rank. Where exchanges
    are queued on the stream of a device, no processor moves their bytes: there `transport`,
    `all_reduce` and `all_reduce_bf16` are 0.
    """

    latency: float
    """Seconds until a small message has arrived: of each of the 2 (n - 1) steps in which the
    transport adds up a single number over n ranks."""
    posting: float
    """Processor seconds of the calling thread for each message that it sends or receives."""
    gbps: float
    """Gbit/s in each direction, frames included: of the link, or what processors move over it."""
    transport: float
    """Processor seconds for each byte that a rank sends while another one arrives."""
    all_reduce: float
    """The same in an uncompressed all-reduce of float32, which adds the numbers as well."""
    all_reduce_bf16: float | None
    """The same of bfloat16; None where the transport cannot add these."""
    handover: float
    """Seconds until a worker thread has begun with a bucket and until its result is known."""
    acknowledged: bool
    """Whether the ranks tell each other at the end of a step that its messages arrived."""


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds per coordinate, at some number of bits, of a rank that need not wait for a core."""

    encode: float  # E
    decode: float  # D: of one payload
    decode_more: float  # D_2: of each further payload of the same mean
    cast: float  # V of bf16: to bfloat16, divided there, and back
    divide: float = (
        0.0  # V of float32: by the number of ranks, which comes before the sum of float32
    )
    call: float = 0.0  # G: seconds of each call in addition, however short its tensor


def codec_of(quantizer: PlanQuantizer, bits: float) -> Codec:
    """The codec that a plan is for."""
    return Codec(ECDQ(bits) if quantizer == "ecdq" else QuicFL(int(bits)))


def measure_codec(
    bits: float,
    numel: int = 1 << 22,
    repeats: int = 7,
    quantizer: PlanQuantizer = "quic_fl",
    device: str | torch.device = "cpu",
) -> CodecSpeed:
    """Speed of the codec here, with torch's threads: the fastest of a few calls.

    On a CPU it is the processor time of the calling thread, which other programs hardly change.
    Ranks that share a machine share its memory: let them all measure at once.

    Args:
        bits: of the quantizer.
        numel: coordinates of the tensor that is encoded.
        repeats: calls of each kind, of which the fastest counts.
        quantizer: "quic_fl" or "ecdq".
        device: where the tensor is.
    """
    codec, key, device = codec_of(quantizer, bits), Key(seed=0), torch.device(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(numel, generator=generator, dtype=torch.float32, device="cpu").to(device)
    one, three = (
        torch.stack([codec.encode(x, key, rank, count) for rank in range(count)])
        for count in (1, 3)
    )
    out = torch.empty_like(x)
    clock = time.thread_time if device.type == "cpu" else time.perf_counter

    def seconds(action: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            _wait_for(device)
            start = clock()
            action()
            _wait_for(device)
            times.append(clock() - start)
        return min(times) / numel  # what comes between only ever adds

    def decode(payloads: torch.Tensor) -> float:
        return seconds(lambda: codec.decode_mean(payloads, key, numel, out=out))

    of_one, of_three = decode(one), decode(three)
    short, calls = x[: codec.block], []
    for _ in range(4 * repeats):
        out[:_CHUNK].copy_(x[:_CHUNK])  # in training too, other things are in the caches
        start = clock()
        codec.encode(short, key)
        _wait_for(device)
        calls.append(clock() - start)
    return CodecSpeed(
        encode=seconds(lambda: codec.encode(x, key)),
        decode=of_one,
        decode_more=max(0.0, of_three - of_one) / 2,
        cast=seconds(lambda: out.copy_(x.bfloat16().div_(2))),
        divide=seconds(lambda: out.div_(2)),
        call=min(calls),
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_link(
    communicator: Communicator,
    device: str | torch.device = "cpu",
    seconds: float = 3.0,
    uncompressed: Communicator | None = None,
) -> Link:
    """Measure the link between the ranks of a communicator; all of them call it.

    Every rank gets the same figures, which are means over the ranks.

    Args:
        communicator: at least 2 ranks. To see what the hook will see, give what it exchanges over,
            which is `communicator.apart("cpu")`.
        device: where the tensors are.
        seconds: about how long it may take. It takes longer on a link that needs more than
            0.2 seconds for an exchange of 4 MiB.
        uncompressed: what adds up tensors if there is no hook, by default `communicator`.

    Raises:
        ValueError: the communicator has one rank.
    """
    if communicator.world_size < 2:
        raise ValueError("measure_link: the communicator has 1 rank; a link has at least 2")
    uncompressed = uncompressed or communicator
    probe = _Probe(communicator, uncompressed, torch.device(device), seconds / 5)
    posting = probe.small_messages()
    transport = probe.chunks(posting)
    latency, _, _ = probe.all_reduce(1, torch.float32)
    numel = probe.large_enough()
    _, all_reduce, gbps = probe.all_reduce(numel, torch.float32)
    bf16 = None
    if not isinstance(uncompressed, MPICommunicator):  # MPI has no such type
        _, bf16, _ = probe.all_reduce(numel, torch.bfloat16)
    queued = communicator.enqueues(probe.device.type)
    if queued:
        transport, all_reduce, bf16 = 0.0, 0.0, bf16 and 0.0
    acknowledged = isinstance(communicator, TorchCommunicator) and probe.device.type == "cpu"
    handover = probe.handover()
    return Link(latency, posting, gbps, transport, all_reduce, bf16, handover, acknowledged)


@dataclass(frozen=True)
class _Turn:
    seconds: float
    thread: float  # processor seconds of the calling thread
    process: float  # of all threads


class _Probe:
    def __init__(
        self,
        communicator: Communicator,
        uncompressed: Communicator,
        device: torch.device,
        budget: float,
    ) -> None:
        self.communicator, self.uncompressed = communicator, uncompressed
        self.device, self.budget = device, budget
        self.others = communicator.world_size - 1
        self._other = torch.zeros(_CHUNK, dtype=torch.float32)

    def small_messages(self) -> float:
        """Processor seconds per message."""
        x = torch.zeros(_SMALL, dtype=torch.uint8, device=self.device)

        def exchange() -> None:
            self.communicator.start_all_gather(x)()
            self.communicator.settle(wait=False)

        thread = statistics.median(turn.thread for turn in self._turns(exchange, cold=True))
        return self._means([thread / (2 * self.others)])[0]

    def chunks(self, posting: float) -> float:
        """Processor seconds per byte, while chunks are encoded and decoded as in training.

        A thread that moves bytes works more while others work too: it waits for connections that
        they are using, and for its turn.
        """
        nbytes = min(_RECEIVED // (_CHUNKS * self.others), _CODEC.nbytes(_CHUNK))
        x = torch.linspace(-1, 1, _CHUNK, dtype=torch.float32, device=self.device)
        out, key, spent = torch.empty_like(x), Key(seed=0), [0.0]

        def codec(action: Callable[[], torch.Tensor]) -> torch.Tensor:
            start = time.thread_time()
            result = action()
            spent[-1] += time.thread_time() - start
            return result

        def exchange() -> None:
            spent.append(0.0)
            flying = []
            for _ in range(_CHUNKS):
                payload = codec(partial(_CODEC.encode, x, key))
                flying.append((payload, self.communicator.start_all_gather(payload[:nbytes])))
            for payload, finish in flying:
                finish()
                codec(partial(_CODEC.decode_mean, payload[None], key, _CHUNK, out=out))
            self.communicator.settle(wait=False)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # others would count as transport
        try:
            turns = self._turns(exchange)
        finally:
            torch.set_num_threads(threads)
        own = [
            turn.process - codec for turn, codec in zip(turns, spent[-len(turns) :], strict=True)
        ]
        messages = 2 * self.others * _CHUNKS
        seconds = statistics.median(own) - messages * posting
        return self._means([max(0.0, seconds) / (_CHUNKS * self.others * nbytes)])[0]

    def handover(self) -> float:
        """Seconds to a worker thread and back."""
        with ThreadPoolExecutor(1) as worker:
            times = []
            for _ in range(_MOST):
                self._fill_caches()
                start = time.perf_counter()
                worker.submit(int).result()
                times.append(time.perf_counter() - start)
        return self._means([statistics.median(times)])[0]

    def large_enough(self) -> int:
        """How many numbers an all-reduce has which is long, but within the budget."""
        x = torch.zeros(_SUMMED, dtype=torch.float32, device=self.device)
        self.uncompressed.all_reduce_(x)
        turn = self._time(lambda: self.uncompressed.all_reduce_(x))
        (mean,) = self._means([turn.seconds])
        return _SUMMED * min(_GROWTH, max(1, int(self.budget / (_FEWEST * mean))))

    def all_reduce(self, numel: int, dtype: torch.dtype) -> tuple[float, float, float]:
        """Seconds per step, processor seconds per byte, and Gbit/s at best."""
        x = torch.zeros(numel, dtype=dtype, device=self.device)
        turns = self._turns(lambda: self.uncompressed.all_reduce_(x))
        sent = ring_bytes(x.nbytes, self.others + 1)
        step = statistics.median(turn.seconds for turn in turns) / (2 * self.others)
        process = statistics.median(turn.process for turn in turns) / sent
        best = min(turn.seconds for turn in turns)
        step, process, gbps = self._means([step, process, 8e-9 * sent * FRAMING / best])
        return step, process, gbps

    def _fill_caches(self) -> None:
        """With other things, as training does."""
        self._other.add_(1)

    def _turns(self, exchange: Callable[[], None], cold: bool = False) -> list[_Turn]:
        """Times of an exchange that the ranks begin together, as many as the budget allows."""
        first = self._time(exchange)  # connections that were idle are slow
        (mean,) = self._means([first.seconds])
        count = round(min(_MOST, max(_FEWEST, self.budget / mean)))
        turns = []
        for _ in range(count):
            self._means([0.0])
            if cold:
                self._fill_caches()
            turns.append(self._time(exchange))
        return turns

    def _time(self, exchange: Callable[[], None]) -> _Turn:
        process, thread, start = time.process_time(), time.thread_time(), time.perf_counter()
        exchange()
        _wait_for(self.device)
        return _Turn(
            time.perf_counter() - start, time.thread_time() - thread, time.process_time() - process
        )

    def _means(self, figures: list[float]) -> list[float]:
        """Over the ranks."""
        total = torch.tensor(figures, dtype=torch.float64, device=self.device)
        self.communicator.all_reduce_(total)
        means: list[float] = (total / (self.others + 1)).tolist()
        return means
