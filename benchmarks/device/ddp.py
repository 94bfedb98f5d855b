"""(d) DDP models trained on one device with delays wherever something might be forgotten to wait.

What the hook got and gave back is compared with what the CPU makes of it, and replicas with each
other. `tests/hooks/test_cuda_ddp.py` takes a few steps of each case, the benchmark many.
"""

import hashlib
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from device.devices import Device
from device.hook import codec_of
from lib.twin import Bucket, Twin, mean_of_twins
from rhtcomm import Codec, Key, TorchCommunicator
from rhtcomm.hooks import RHTState, rht_hook
from rhtcomm.reduce.split import split_into_chunks
from rhtcomm.segments import rows_of

__all__ = ["CASES", "Case", "Outcome", "check", "train"]

KEPT = 8  # steps whose buckets are compared with the CPU's


@dataclass(frozen=True)
class Case:
    name: str
    backend: str  # of DDP's group: "gloo" with two ranks, "nccl" with one
    model: str
    twin: str | None = None
    """Between which engine and DDP a second rank is played; None: the ranks of the group."""
    options: tuple[tuple[str, Any], ...] = ()  # of RHTState

    @property
    def ranks(self) -> int:
        return 2 if self.backend == "gloo" else 1


CASES = (
    Case("Gloo, 2 ranks: ThreadEngine", "gloo", "plain"),
    Case("Gloo, 2 ranks: find_unused_parameters", "gloo", "branches"),
    Case("Gloo, 2 ranks: SyncBatchNorm", "gloo", "normalized"),
    Case("Gloo, 2 ranks: EDEN", "gloo", "plain", options=(("quantizer", "eden"),)),
    Case("NCCL, 1 rank and its twin: StreamEngine", "nccl", "plain", "StreamEngine"),
    Case("NCCL, 1 rank and its twin: ThreadEngine", "nccl", "plain", "ThreadEngine"),
    Case("NCCL, twin: find_unused_parameters", "nccl", "branches", "StreamEngine"),
    Case("NCCL, twin: SyncBatchNorm", "nccl", "normalized", "StreamEngine"),
    Case("NCCL, 1 rank, nothing to compress", "nccl", "plain"),
)


class Branches(nn.Module):
    """Two ways to go, of which every step takes one, another one on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(256, 1024), nn.Linear(256, 8)
        self.ways = nn.ModuleList([nn.Linear(1024, 256), nn.Linear(1024, 256)])
        self.way = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.ways[self.way](self.first(x).relu())
        out: torch.Tensor = self.last(hidden.relu())
        return out


def make_model(name: str, group: dist.ProcessGroup, cuda: bool) -> nn.Module:
    """More than one bucket of DDP's; takes (batch, 256) to (batch, 8)."""
    torch.manual_seed(0)
    if name == "branches":
        return Branches()
    layers: list[nn.Module] = [nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)]
    if name == "normalized":
        layers.insert(1, nn.BatchNorm1d(1024))
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(256, 8))
    if name == "normalized" and cuda:  # torch has none for CPU tensors
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    return model


Record = tuple[int, int, torch.Tensor, torch.Tensor, list[int]]


@dataclass
class Outcome:
    """Of one rank."""

    replica: str  # a digest of the parameters
    records: list[Record]
    """Step, bucket, what the hook got and gave back, and the lengths of the parameters."""
    seconds: float  # of a step
    compressed: bool  # fewer bytes were sent than without the hook, where ranks exchange anything
    loss: tuple[float, float]  # first and last


class Delays:
    """Random ones: on the stream of the backward pass, on that of the exchange, on the host."""

    def __init__(self, device: Device, seed: int) -> None:
        self._device, self._random = device, random.Random(seed)

    def on_stream(self) -> None:
        if self._random.random() < 0.4:
            self._device.delay(self._random.uniform(0.1, 3))

    def on_host(self) -> None:
        if self._random.random() < 0.2:
            time.sleep(self._random.uniform(0, 2e-3))

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        """As a hook of a tensor, before its gradient goes on."""
        self.on_host()
        self.on_stream()
        return gradient

    @contextmanager
    def of_exchanges(self, communicator: type[Any]) -> Iterator[None]:
        """Within it all-gathers begin and end late, on whatever thread and stream they are."""
        start = communicator.start_all_gather

        def late(*args: Any) -> Callable[[], Any]:
            self.on_host()
            self.on_stream()
            finish = start(*args)
            self.on_stream()
            return finish  # type: ignore[no-any-return]

        communicator.start_all_gather = late
        try:
            yield
        finally:
            communicator.start_all_gather = start


class Recorder:
    """The hook, which also keeps what goes in and comes out."""

    def __init__(self, state: RHTState, steps: int, twin: Twin | None, delays: Delays) -> None:
        self.state, self.records = state, list[Record]()
        self._twin, self._delays = twin, delays
        self._step, self._kept = 0, {*range(0, steps, max(1, steps // KEPT)), steps - 1}

    def hook(
        self,
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        step, index, buffer = self._step, bucket.index(), bucket.buffer()
        sent = buffer.clone() if step in self._kept else None
        lengths = []  # of the segments that become zero together
        for parameter in bucket.parameters():
            rows = rows_of(parameter.shape, parameter.numel())
            lengths += [parameter.numel() // rows] * rows
        self._step += bucket.is_last()
        self._delays(buffer)
        if self._twin is None:
            future = rht_hook(self.state, bucket)
        else:
            self._twin.expect(Key(0, step, index), buffer.numel())
            future = self.state.submit(Bucket.of(buffer, index, bucket.is_last()))
            lengths = [buffer.numel()]
        if sent is None:
            return future

        def keep(done: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            result = done.value()
            self.records.append((step, index, sent, result.clone(), lengths))
            return result

        return future.then(keep)


def train(group: dist.ProcessGroup, case: Case, device: Device, steps: int) -> Outcome:
    """Train a rank's replica; `group` is of the case's backend (in a dry run: of Gloo)."""
    warnings.simplefilter("default")  # those of torch are not what is looked for
    rank, cuda = dist.get_rank(group), device.torch.type == "cuda"
    options = dict(case.options)
    codec = codec_of(**options)
    delays, twin = Delays(device, rank), None
    if case.twin is not None:
        enqueues = case.twin == "StreamEngine"
        twin = Twin(codec, enqueues, group if enqueues and cuda else None)
    model = make_model(case.model, group, cuda).to(device.torch)
    ddp = DistributedDataParallel(
        model,
        process_group=group,
        bucket_cap_mb=0.5,
        find_unused_parameters=case.model == "branches",
        gradient_as_bucket_view=True,
    )
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(17 + rank)
    inputs = torch.randn(steps, 16, 256, generator=generator).to(device.torch)
    losses, began = [], time.perf_counter()
    slowed = Twin if twin else TorchCommunicator
    options |= {"communicator": twin, "min_numel": 0, "warmup_steps": 0}
    with delays.of_exchanges(slowed), RHTState(**options) as state:
        recorder = Recorder(state, steps, twin, delays)
        # A model that has the twin's state would tell it that there is one rank.
        ddp.register_comm_hook(None if twin else state, recorder.hook)
        for step in range(steps):
            if isinstance(model, Branches):
                model.way = (step + rank) // 2 % 2
            x = inputs[step]
            out = ddp(x)
            out.register_hook(delays)
            loss = (out - x[:, :8]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        device.synchronize()
        seconds, stats = time.perf_counter() - began, state.stats()
    return Outcome(
        hashlib.sha256(b"".join(_bytes_of(p) for p in model.parameters())).hexdigest(),
        [(*record[:2], record[2].cpu(), record[3].cpu(), record[4]) for record in recorder.records],
        seconds / steps,
        stats.bytes_sent < 0.2 * max(1, stats.bytes_sent + stats.bytes_saved),
        (float(losses[0]), float(losses[-1])),
    )


def _bytes_of(x: torch.Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def check(case: Case, outcomes: list[Outcome], steps: int) -> int:
    """Raise AssertionError unless replicas agree and buckets have the bits of the CPU.

    Returns the number of buckets that were compared.
    """
    assert len({outcome.replica for outcome in outcomes}) == 1, "replicas differ"
    codec = codec_of(**dict(case.options))
    by_rank = [sorted(o.records, key=lambda record: record[:2]) for o in outcomes]
    assert {len(records) for records in by_rank} == {len(by_rank[0])}
    assert len({record[0] for record in by_rank[0]}) >= min(KEPT, steps)
    if steps > 2:
        assert max(record[1] for record in by_rank[0]) > 0, "there was one bucket only"
    for of_ranks in zip(*by_rank, strict=True):
        (place,) = {record[:2] for record in of_ranks}
        sent, lengths = [record[2] for record in of_ranks], of_ranks[0][4]
        expected = _expected(case, codec, sent, Key(0, *place), lengths)
        for rank, record in enumerate(of_ranks):
            assert torch.equal(record[3], expected), f"step and bucket {place}, rank {rank}"
    first, last = outcomes[0].loss
    assert last < first or steps < 20, f"the loss went from {first} to {last}"
    if case.twin is None and case.ranks > 1:
        assert all(outcome.compressed for outcome in outcomes), "nothing was compressed"
    return len(by_rank[0])


def _expected(
    case: Case, codec: Codec, sent: list[torch.Tensor], key: Key, lengths: list[int]
) -> torch.Tensor:
    if case.twin is not None:
        return mean_of_twins(codec, sent[0], key)
    if len(sent) == 1:
        return sent[0]
    mean, numel = torch.empty_like(sent[0]), sent[0].numel()
    for chunk in split_into_chunks(numel, codec.block, 1):
        payloads = torch.stack(
            [codec.encode(x[chunk], key, i, 2, offset=chunk.start) for i, x in enumerate(sent)]
        )
        part = mean[chunk]
        codec.decode_mean(payloads, key, part.numel(), offset=chunk.start, out=part)
    for part, *own in zip(mean.split(lengths), *(x.split(lengths) for x in sent), strict=True):
        if not any(x.any() for x in own):
            part.zero_()  # what no rank used
    return mean
