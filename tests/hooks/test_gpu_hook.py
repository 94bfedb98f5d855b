"""What the hook does differently on CUDA: checks that come later, and a stream of its own.

The logic of the checks runs on CPU tensors too; what needs a GPU is skipped without one.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cuda import needs_cuda
from harness import Ranks, limit
from streams import in_place_of_cuda
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

from lib.twin import Bucket, Twin, mean_of_twins
from lib.waits import no_host_waits
from rhtcomm import Codec, Eden, Key, QuicFL, TorchCommunicator
from rhtcomm.deferred import DeferredChecks
from rhtcomm.hooks import RHTState, rht_hook
from rhtcomm.wire import PayloadError

NUMEL, KEY = 1000, Key(3, step=4)
TIMEOUT = timedelta(seconds=limit(50))
BOTH = pytest.mark.parametrize("enqueues", [True, False], ids=["stream", "thread"])


class Arrival:
    """Of a copy to the host: what the checks use of an event."""

    def __init__(self, here: bool) -> None:
        self.here, self.waits = here, 0

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.here = True
        self.waits += 1


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> list[Arrival]:
    """Of the headers whose checks were deferred, as if CPU tensors were far away."""
    made: list[Arrival] = []

    def to_host(x: torch.Tensor) -> tuple[Arrival, torch.Tensor]:
        made.append(Arrival(False))
        return made[-1], x.clone()

    monkeypatch.setattr(DeferredChecks, "to_host", staticmethod(to_host))
    monkeypatch.setattr(DeferredChecks, "devices", ("cpu",))
    return made


def x_of(rank: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank))


def payloads_of(codec: Codec, *keys: Key) -> torch.Tensor:
    return torch.stack([codec.encode(x_of(i), key, i, len(keys)) for i, key in enumerate(keys)])


def test_a_deferred_check_raises_once_its_headers_have_arrived(arrivals: list[Arrival]) -> None:
    codec, checks = Codec(QuicFL(4)), DeferredChecks()
    good, bad = payloads_of(codec, KEY, KEY), payloads_of(codec, KEY, Key(3, step=5))
    expected = codec.decode_mean(good, KEY, NUMEL)
    with checks.deferring():
        assert torch.equal(codec.decode_mean(good, KEY, NUMEL), expected)
        codec.decode_mean(bad, KEY, NUMEL)
        codec.decode_mean(good, KEY, NUMEL)
        bad.zero_()  # the copy counts
    checks.raise_failed()
    arrivals[1].here = True
    checks.raise_failed()  # the first is not here yet
    arrivals[0].here = True
    with pytest.raises(PayloadError, match=r"the payload of rank 1 was made for another key.*step"):
        checks.raise_failed()
    checks.raise_failed(wait=True)
    assert [arrival.waits for arrival in arrivals] == [0, 0, 0], "the third check was forgotten"
    with pytest.raises(PayloadError, match="does not begin with the mark"):
        codec.decode_mean(bad, KEY, NUMEL)  # at once, as it was before


def test_all_pending_checks_can_be_waited_for_and_their_number_is_bounded(
    arrivals: list[Arrival], monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, checks = Codec(QuicFL(4)), DeferredChecks()
    payloads = payloads_of(codec, KEY, KEY)
    monkeypatch.setattr(DeferredChecks, "most", 2)
    with checks.deferring():
        for _ in range(5):
            codec.decode_mean(payloads, KEY, NUMEL)
    checks.raise_failed()
    assert [arrival.waits for arrival in arrivals] == [1, 1, 1, 0, 0]
    checks.raise_failed(wait=True)
    assert [arrival.waits for arrival in arrivals] == [1, 1, 1, 1, 1]


def test_headers_that_say_how_to_decode_are_read_at_once(arrivals: list[Arrival]) -> None:
    codec, checks = Codec(QuicFL(4), "auto"), DeferredChecks()
    with checks.deferring(), pytest.raises(PayloadError, match="another key"):
        codec.decode_mean(payloads_of(codec, KEY, Key(4)), KEY, NUMEL)
    assert not arrivals


class Tampering(TorchCommunicator):
    """Hands out a payload of another step when told to."""

    tamper = queues = False

    def enqueues(self, device: str) -> bool:
        return self.queues

    def start_all_gather(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        finish = super().start_all_gather(x)

        def tampered() -> torch.Tensor:
            gathered = finish()
            if self.tamper:
                gathered[1, 4] ^= 1
            return gathered

        return tampered


def send(state: RHTState, x: torch.Tensor) -> Any:
    """What comes of one bucket, or the error."""
    try:
        return state.submit(Bucket.of(x.clone())).wait()
    except (RuntimeError, PayloadError) as error:
        return str(error)


def late_errors(rank: int, world_size: int, when: str, enqueues: bool) -> list[Any]:
    """Buckets 0 and 1, and what ends the run; the payload of rank 1 is wrong in bucket 1."""
    with in_place_of_cuda() as streams:
        streams.host_may_wait = True
        communicator = Tampering()
        communicator.queues = enqueues
        state = RHTState(warmup_steps=0, communicator=communicator, min_numel=0)
        results = []
        for step in range(2):
            communicator.tamper = step == 1
            results.append(send(state, x_of(10 * step + rank)))
        communicator.tamper = False
        end: dict[str, Callable[[], Any]] = {
            "bucket": lambda: send(state, x_of(20 + rank)),
            "state_dict": state.state_dict,
            "close": state.close,
        }
        try:
            results.append(end[when]())
        except PayloadError as error:
            results.append(str(error))
        if when == "bucket":
            results.append(send(state, x_of(30 + rank)))
            state.close()
    return results


@BOTH
@pytest.mark.parametrize("when", ["bucket", "state_dict", "close"])
def test_the_hook_finds_a_wrong_payload_out_later(when: str, enqueues: bool, ranks: Ranks) -> None:
    by_rank = ranks.run(late_errors, 2, when, enqueues)
    for first, second, ended, *refused in by_rank:
        assert torch.equal(first, by_rank[0][0])
        assert torch.equal(second, by_rank[0][1]), "the run went on"
        assert "the payload of rank 1 was made for another key" in ended
        assert all("earlier bucket failed" in text for text in refused)


def profiled(rank: int, world_size: int) -> set[str]:
    everything = _ExperimentalConfig(profile_all_threads=True)
    with RHTState(warmup_steps=0, min_numel=0, timeout=TIMEOUT) as state:
        send(state, x_of(rank))
        # Without acc_events torch 2.11 warns that it keeps the events of one cycle, which suffices.
        with profile(
            activities=[ProfilerActivity.CPU], experimental_config=everything, acc_events=True
        ) as seen:
            send(state, x_of(rank))
    return {event.key for event in seen.key_averages()}


def test_a_profile_has_named_ranges(ranks: Ranks) -> None:
    for names in ranks.run(profiled, 2):
        assert {"rhtcomm::encode", "rhtcomm::exchange", "rhtcomm::decode"} <= names


# On a GPU ----------------------------------------------------------------------------------------


@needs_cuda
@BOTH
@pytest.mark.parametrize("quantizer", ["quic_fl", "eden"])
@pytest.mark.parametrize("parameters", [1, 40])
def test_nothing_makes_the_host_wait(quantizer: Any, parameters: int, enqueues: bool) -> None:
    codec = Codec(Eden(4) if quantizer == "eden" else QuicFL(4))
    twin, numel = Twin(codec, enqueues), 1 << 20  # more than one chunk
    xs = torch.randn(8, numel, generator=torch.Generator().manual_seed(1))
    with RHTState(warmup_steps=0, quantizer=quantizer, communicator=twin) as state:
        buckets = [Bucket.of(x.clone().to("cuda"), parameters=parameters) for x in xs]

        def submit(step: int) -> torch.futures.Future[torch.Tensor]:
            twin.expect(Key(0, step), numel, parameters)
            return state.submit(buckets[step])

        for step in range(3):  # compiles, makes streams, pins memory
            submit(step).wait()
        torch.cuda.synchronize()
        with no_host_waits():
            futures = [submit(step) for step in range(3, 8)]
            means = [future.wait() for future in futures]
        for step, mean in enumerate(means, 3):
            assert torch.equal(mean.to("cpu"), mean_of_twins(codec, xs[step], Key(0, step)))


@needs_cuda
@BOTH
def test_the_hook_waits_for_gradients_and_results_wait_for_the_hook(enqueues: bool) -> None:
    codec, numel = Codec(QuicFL(4)), 1 << 20
    twin = Twin(codec, enqueues)
    with RHTState(warmup_steps=0, communicator=twin) as state:
        for step in range(10):
            x = torch.randn(numel, generator=torch.Generator().manual_seed(step))
            late, pinned = torch.zeros(numel, device="cuda"), x.pin_memory()
            twin.expect(Key(0, step), numel)
            torch.cuda._sleep(10_000_000)
            late.copy_(pinned, non_blocking=True)
            found = state.submit(Bucket.of(late)).wait().clone()
            assert torch.equal(found.to("cpu"), mean_of_twins(codec, x, Key(0, step)))


@needs_cuda
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_little_memory(enqueues: bool, dtype: torch.dtype) -> None:
    """At most 0.6 of the bucket and 32 MiB, in addition to the gradients and the tables."""
    codec, numel = Codec(QuicFL(4)), (100 << 20) // dtype.itemsize
    twin, x = Twin(codec, enqueues), torch.randn(numel, device="cuda").to(dtype)
    with RHTState(warmup_steps=0, communicator=twin) as state:

        def step(number: int) -> None:
            twin.expect(Key(0, number), numel, 12)
            state.submit(Bucket.of(x, parameters=12)).wait()
            torch.cuda.synchronize()

        step(0)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(1)
        extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 0.6 * x.nbytes + (32 << 20), f"{extra / 2**20:.0f} MiB for a bucket of 100"


def train(rank: int, world_size: int, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).to(device)
    ddp = DistributedDataParallel(model)
    received = []
    with RHTState(warmup_steps=0, block=1024, min_numel=0, timeout=TIMEOUT) as state:

        def hook(state: RHTState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
            with torch.no_grad():  # the same gradients, whatever the device
                numbers = torch.Generator().manual_seed(100 * state.stats().steps + rank)
                bucket.buffer().copy_(torch.randn(bucket.buffer().shape, generator=numbers))
            return rht_hook(state, bucket)

        ddp.register_comm_hook(state, hook)
        for _ in range(3):
            ddp(torch.randn(4, 64, device=device)).sum().backward()
            received += [parameter.grad.cpu().clone() for parameter in model.parameters()]
            ddp.zero_grad()
    return received


@needs_cuda
def test_two_ranks_on_one_gpu_over_gloo_have_the_bits_of_the_cpu(ranks: Ranks) -> None:
    on_cpu, on_gpu = ranks.run(train, 2, "cpu"), ranks.run(train, 2, "cuda")
    for found in on_gpu:
        for tensor, expected in zip(found, on_cpu[0], strict=True):
            assert torch.equal(tensor, expected)
