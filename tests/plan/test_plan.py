"""The cost model: its formula by hand, its counts against real exchanges, what it recommends."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from harness import Ranks

import rhtcomm
from rhtcomm import ECDQ, Codec, Key, QuicFL, TorchCommunicator
from rhtcomm.__main__ import main
from rhtcomm.planning.cost import TYPICAL, Prediction
from rhtcomm.planning.plan import Plan, plan
from rhtcomm.planning.probe import CodecSpeed, Link, measure_codec, measure_link
from rhtcomm.reduce.split import split_into_chunks

SPEED = CodecSpeed(encode=2e-9, decode=3e-9, decode_more=5e-10, cast=1e-9, divide=4e-10, call=6e-5)
SPEEDS = dict.fromkeys(range(1, 9), SPEED)
LINK = Link(
    latency=1e-4,
    posting=7e-5,
    gbps=2.0,
    transport=1.5e-9,
    all_reduce=1e-9,
    all_reduce_bf16=2e-9,
    handover=2e-4,
    acknowledged=True,
)


def find(found: Plan, algorithm: str, bits: float) -> Prediction:
    (match,) = (p for p in found.predictions if (p.algorithm, p.bits) == (algorithm, bits))
    return match


# 3 chunks: of 192 blocks; where each has 4 shards, of 4 x 160, 4 x 160 and 4 x 160 blocks.
NUMEL, N = 4 * 480 * 4096, 4
PER_BYTE = 1514 / 1448 * 8 / 2e9
PAYLOAD = 10 * 16 + 4 * 480 * (4 + 2048)  # headers; a scale and 4096 codes of 4 bits per block
SHARDS = 3 * 16 + 480 * (4 + 2048)
SENT = {"all_gather": 3 * PAYLOAD, "two_shot": 6 * SHARDS, "gather": 3 * PAYLOAD}
CHUNKS = {"all_gather": 10, "two_shot": 3, "gather": 10}
MESSAGES = {"all_gather": 6 * 10 + 6, "two_shot": 12 * 3 + 6, "gather": 6 * 10 + 6}
HOPS = {"all_gather": 2, "two_shot": 3, "gather": 3}
CODEC = {  # without slowdown
    "all_gather": (2 + 3 + 1.5) * 1e-9 * NUMEL + 2 * 10 * 6e-5,
    "two_shot": (2 + (3 + 1.5 + 2) / 4 + 3) * 1e-9 * NUMEL + 4 * 3 * 6e-5,
    "gather": (2 + 3 + 1.5 + 2 + 3) * 1e-9 * NUMEL + 4 * 10 * 6e-5,
}


@pytest.mark.parametrize("algorithm", SENT)
@pytest.mark.parametrize("cores", [math.inf, 1.5, 0.25])
@pytest.mark.parametrize("gbps", [0.5, 400.0])
def test_the_formula_by_hand(algorithm: str, cores: float, gbps: float) -> None:
    found = plan(
        NUMEL, N, gbps, speeds=SPEEDS, slowdown=2.0, link=LINK, cores=cores, threads=3, bits=(4,)
    )
    prediction = find(found, algorithm, 4)
    chunks = CHUNKS[algorithm]
    link = SENT[algorithm] * 1514 / 1448 * 8 / (1e9 * gbps)
    link *= 1 + 1 / chunks if algorithm == "gather" else 1
    codec, posting = 2 * CODEC[algorithm], MESSAGES[algorithm] * 7e-5
    transport = SENT[algorithm] * 1.5e-9
    processors = max(codec + posting, transport, (3 * codec + posting + transport) / cores)
    assert prediction.chunks == chunks
    assert prediction.link_seconds == pytest.approx(link, rel=1e-12)
    assert prediction.codec_seconds == pytest.approx(codec, rel=1e-12)
    assert prediction.posting_seconds == pytest.approx(posting, rel=1e-12)
    assert prediction.transport_seconds == pytest.approx(transport, rel=1e-12)
    seconds = 2e-4 + HOPS[algorithm] * 1e-4 + max(link, processors) + min(link, processors) / chunks
    assert prediction.seconds == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("cores", [4.0, 0.5])
@pytest.mark.parametrize("gbps", [2.0, 1e6])
def test_uncompressed_by_hand(cores: float, gbps: float) -> None:
    found = plan(NUMEL, N, gbps, speeds=SPEEDS, slowdown=2.0, link=LINK, cores=cores)
    per_byte, crowded = 1514 / 1448 * 8 / (1e9 * gbps), max(1, 1 / cores)
    sent, posting = 6 * NUMEL, 12 * 7e-5  # 2 * 3 / 4 * 4 bytes; 6 steps of 2 messages
    expected = max(sent * per_byte, (1e-9 * sent + posting) * crowded)
    expected += 2 * 4e-10 * NUMEL * crowded
    assert find(found, "float32", 32).seconds == pytest.approx(6e-4 + expected, rel=1e-12)
    expected = max(sent / 2 * per_byte, (2e-9 * sent / 2 + posting) * crowded)
    expected += 2 * 1e-9 * NUMEL * crowded
    assert find(found, "bf16", 16).seconds == pytest.approx(6e-4 + expected, rel=1e-12)


def test_without_a_sum_of_bfloat16_there_is_no_such_row() -> None:
    link = dataclasses.replace(LINK, all_reduce_bf16=None)
    found = plan(NUMEL, N, speeds=SPEEDS, link=link)
    assert [p.algorithm for p in found.predictions if p.bits > 8] == ["float32"]


def test_a_transport_without_acknowledgements_posts_none() -> None:
    link = dataclasses.replace(LINK, acknowledged=False)
    for algorithm, messages in MESSAGES.items():
        prediction = find(plan(NUMEL, N, speeds=SPEEDS, link=link), algorithm, 4)
        assert prediction.messages == messages - 6
        hops = HOPS[algorithm] - 1
        assert prediction.latency_seconds == pytest.approx(2e-4 + hops * 1e-4, rel=1e-12)


class Counting(TorchCommunicator):
    """Counts the messages that it sends and asks for."""

    messages = 0

    def _receive(self, rows: Any, ranks: Any, *tag: int) -> Any:
        self.messages += len(ranks)
        return super()._receive(rows, ranks, *tag)

    def _send(self, rows: Any, ranks: Any, *tag: int) -> None:
        self.messages += len(ranks)
        super()._send(rows, ranks, *tag)


QUANTIZERS = {"quic_fl": (QuicFL(4), 4), "ecdq": (ECDQ(2.5), 2.5)}
CASES = [
    (numel, algorithm, quantizer)
    for numel in (20_000, 100_000, 1_600_000)
    for algorithm in ("all_gather", "two_shot", "gather")
    for quantizer in QUANTIZERS
]


def exchanges(rank: int, world_size: int) -> tuple[list[tuple[int, int]], int]:
    """Bytes and messages of all cases, and bytes of an uncompressed sum."""
    communicator, counts = Counting(), []
    for numel, algorithm, quantizer in CASES:
        x = torch.randn(numel, generator=torch.Generator().manual_seed(rank))
        start = communicator.bytes_sent, communicator.messages
        options: dict[str, Any] = {"algorithm": algorithm, "check": False, "min_numel": 0}
        codec = Codec(QUANTIZERS[quantizer][0])
        rhtcomm.all_reduce(x, codec, Key(0), communicator, **options)
        counts.append((communicator.bytes_sent - start[0], communicator.messages - start[1]))
    before = communicator.bytes_sent
    communicator.all_reduce_(torch.ones(100_000))
    return counts, communicator.bytes_sent - before


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_and_messages_are_those_of_real_exchanges(ranks: Ranks, world_size: int) -> None:
    counts = ranks.run(exchanges, world_size)
    for case, (numel, algorithm, quantizer) in enumerate(CASES):
        bits = QUANTIZERS[quantizer][1]
        options: dict[str, Any] = {"speeds": {bits: SPEED}, "bits": (bits,), "link": LINK}
        prediction = find(plan(numel, world_size, quantizer=quantizer, **options), algorithm, bits)
        # Of all ranks the one with the most to do: in gather, the one that the others send to.
        busiest = tuple(map(max, *(of_rank[case] for of_rank, _ in counts)))
        assert (prediction.bytes_sent, prediction.messages) == busiest, CASES[case]
    plain = find(plan(100_000, world_size, link=LINK, speeds=SPEEDS), "float32", 32)
    assert counts[0][1] == plain.bytes_sent


def test_more_of_what_costs_never_takes_less_time() -> None:
    """By the model alone, and for each way to exchange the bucket."""
    base: dict[str, Any] = {"world_size": 4, "link_gbps": 2.0, "latency": 1e-4, "cores": 1.0}
    base |= {"slowdown": 1.0, "posting": 5e-5, "transport": 1e-9, "threads": 1}
    more: list[tuple[str, tuple[float, ...]]] = [
        ("link_gbps", (100.0, 2.0, 0.1, 1e-3)),
        ("latency", (0.0, 1e-4, 1e-1)),
        ("cores", (math.inf, 4.0, 1.0, 0.1)),
        ("slowdown", (1.0, 3.0)),
        ("posting", (0.0, 5e-5, 1e-2)),
        ("transport", (0.0, 1e-9, 1e-6)),
        ("threads", (1, 8)),
    ]
    for name, values in more:
        times = []
        for value in values:
            options = base | {name: value}
            link = dataclasses.replace(
                LINK, posting=options.pop("posting"), transport=options.pop("transport")
            )
            found = plan(NUMEL, **options, speeds=SPEEDS, link=link, bits=(2, 8))
            times.append([p.seconds for p in found.predictions])
        for before, after in itertools.pairwise(times):
            assert all(a >= b for b, a in zip(before, after, strict=True)), name
        assert sum(times[-1]) > sum(times[0]), name


def test_with_many_ranks_posting_is_the_work_of_the_rank() -> None:
    """It adds to the codec's time, and a faster link does not take it away."""
    few, many = (
        find(plan(25 << 18, n, 400.0, speeds=SPEEDS, link=LINK), "two_shot", 4) for n in (4, 64)
    )
    assert (few.messages, few.chunks) == (2 * 3 * (2 * 3 + 1), 3)
    assert (many.messages, many.chunks) == (2 * 63 * (2 * 1 + 1), 1)
    assert many.processor_seconds == many.codec_seconds + many.posting_seconds
    assert many.seconds > many.posting_seconds > 100 * many.link_seconds


def test_it_recommends_the_fastest_within_the_error_allowed() -> None:
    slow_link = plan(1 << 22, 2, 0.1, speeds=SPEEDS)
    assert slow_link.pays
    assert (slow_link.recommended.algorithm, slow_link.recommended.bits) == ("all_gather", 4)
    assert "Take 4 bits, all_gather" in slow_link.verdict
    many = plan(1 << 22, 16, 0.1, speeds=SPEEDS)
    assert (many.recommended.algorithm, many.recommended.bits) == ("two_shot", 4)
    loose = plan(1 << 22, 2, 0.1, speeds=SPEEDS, max_nmse=2)
    assert loose.recommended.name == "1 bit, all_gather"
    strict = plan(1 << 22, 2, 0.1, speeds=SPEEDS, max_nmse=1e-4)
    assert strict.recommended.bits == 8
    assert all(
        p.seconds >= strict.recommended.seconds
        for p in strict.predictions
        if p.bits <= 8 and p.nmse <= 1e-4
    )


def test_it_says_when_compression_will_not_pay() -> None:
    fast_link = plan(1 << 22, 2, 400.0, speeds=SPEEDS)
    assert not fast_link.pays
    assert fast_link.recommended.bits > 8
    assert "Compression will not pay: bf16 takes" in str(fast_link)
    # Nor where no number of bits is exact enough.
    assert not plan(1 << 22, 2, 0.1, speeds=SPEEDS, max_nmse=1e-6).pays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 1}, "world_size=1 at least 2"),
        ({"link_gbps": 0.0}, "link_gbps=0.0"),
        ({"link_gbps": float("nan")}, "link_gbps=nan"),
        ({"link_gbps": None}, "give link_gbps"),
        ({"numel": 0}, "numel=0"),
        ({"latency": -1.0}, "latency=-1.0"),
        ({"slowdown": float("inf")}, "slowdown=inf"),
        ({"cores": 0.0}, "cores=0.0"),
        ({"threads": 0}, "threads=0"),
        ({"bits": [4, 9]}, r"bits=\(4, 9\) must be some of 1 to 8"),
        ({"bits": []}, r"bits=\(\) must be some of 1 to 8"),
        ({"speeds": {2: SPEED}, "bits": [2, 4]}, r"speeds lack \[4\]"),
        ({"quantizer": "ecdq", "bits": [6.5]}, r"bits=\(6\.5,\) must be some of 1, 1\.25"),
        ({"quantizer": "eden"}, r"quantizer='eden' must be"),
    ],
)
def test_arguments_out_of_range_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"numel": 100, "world_size": 2, "link_gbps": 1.0, "speeds": SPEEDS} | change
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


def test_the_codec_is_measured() -> None:
    speed = measure_codec(4, numel=1 << 16, repeats=3)
    assert speed.cast > speed.divide > 0
    assert speed.encode > 0
    assert speed.decode_more >= 0
    assert 0 < speed.decode < 1e-5


def test_waiting_for_cores_does_not_count_as_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP's threads wait actively, which is processor time, where a core is missing."""
    now, ticks = 0.0, itertools.count()

    def clock() -> float:
        nonlocal now
        now += 1e-4 if next(ticks) % 8 < 2 else 1.0
        return now

    monkeypatch.setattr("rhtcomm.planning.probe.time.thread_time", clock)
    assert measure_codec(4, numel=1 << 12, repeats=4).call == pytest.approx(1e-4)


def probe(rank: int, world_size: int) -> tuple[Link, bool]:
    plain = TorchCommunicator()
    communicator = plain.apart("cpu")
    found = measure_link(communicator, seconds=0.2, uncompressed=plain)
    assert plain.bytes_sent, "another transport was measured without compression"
    communicator.close()
    try:
        measure_link(Alone())
    except ValueError as error:
        return found, "1 rank" in str(error)
    return found, False


class Alone(TorchCommunicator):
    world_size = 1


def test_the_link_is_measured_alike_on_all_ranks(ranks: Ranks) -> None:
    (found, refuses), (other, _) = ranks.run(probe, 2)
    assert refuses
    assert found == other
    assert not found.acknowledged
    figures = dataclasses.asdict(found)
    del figures["acknowledged"]
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    # Within two orders of magnitude of what is assumed, on the most crowded machine.
    for name in ("posting", "transport", "all_reduce"):
        assert abs(math.log10(figures[name] / getattr(TYPICAL, name))) < 2


def test_the_command_prints_a_verdict_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "plan --world-size 2 --link-gbps 0.001 --numel 100000 --bits 4 --threads 1"
    monkeypatch.setattr("sys.argv", ["rhtcomm", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    printed = capsys.readouterr().out
    assert "100,000 coordinates" in printed
    assert "kernels: " in printed
    assert "1 thread," in printed
    assert printed.splitlines()[-1].startswith("Take 4 bits, all_gather: ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--world-size 2 --link-gbps 1 --numel 0", "numel=0"),
        ("--world-size 2 --link-gbps 1 --threads 0", "threads=0"),
        ("--world-size 2 --link-gbps 1 --threads -1", "threads=-1"),
        ("--world-size 1 --link-gbps 1", "world_size=1 at least 2"),
        ("--world-size 2", "--link-gbps must be given, or --from"),
        ("--numel 100", "--world-size and --link-gbps must be given, or --from"),
        ("--world-size 2 --link-gbps 1 --mebibytes inf", r"mebibytes=\[inf\] must be positive"),
        ("--world-size 2 --link-gbps 1 --bits 9", r"bits=\(9.0,\) must be some of 1 to 8"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    given: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given += "" if "--bits" in given else " --bits 4"
    monkeypatch.setattr("sys.argv", ["rhtcomm", "plan", *given.split()])
    with pytest.raises(SystemExit, match=message):
        main()


def test_ecdq_may_be_planned_with() -> None:
    speeds = dict.fromkeys(range(1, 7), SPEED) | {2.5: SPEED}
    found = plan(1 << 20, 2, 1.0, speeds=speeds, bits=(2, 2.5), quantizer="ecdq", max_nmse=0.06)
    match = find(found, "all_gather", 2.5)
    assert match.nmse == ECDQ(2.5).vnmse
    chunks = split_into_chunks(1 << 20, 4096, 1)
    lengths = [Codec(ECDQ(2.5)).nbytes(chunk.stop - chunk.start) for chunk in chunks]
    assert match.bytes_sent == sum(lengths)
    assert found.recommended.name == "2.5 bits, all_gather"
    by_default = plan(5000, 2, 1.0, speeds=speeds, quantizer="ecdq")
    assert sorted({p.bits for p in by_default.predictions}) == [*range(1, 7), 16, 32]
