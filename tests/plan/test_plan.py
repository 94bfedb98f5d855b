"""The cost model: its formula by hand, its bytes against real exchanges, what it recommends."""

import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from harness import Ranks, limit

import rhtcomm
from rhtcomm import ECDQ, Codec, Key, QuicFL, TorchCommunicator
from rhtcomm.__main__ import main
from rhtcomm.cost import CodecSpeed, Plan, Prediction, measure_codec, plan
from rhtcomm.reduce.split import split_into_chunks

SPEED = CodecSpeed(encode=2e-9, decode=3e-9, decode_more=5e-10, cast=1e-9)
SPEEDS = dict.fromkeys(range(1, 9), SPEED)


def find(found: Plan, algorithm: str, bits: float) -> Prediction:
    (match,) = (p for p in found.predictions if (p.algorithm, p.bits) == (algorithm, bits))
    return match


def test_the_formula_by_hand() -> None:
    numel, n = 4 * 480 * 4096, 4  # two_shot: chunks of 4 x 160, all_gather: of 192 blocks
    found = plan(numel, n, 2.0, latency=1e-4, speeds=SPEEDS, slowdown=2.0)
    per_byte = 1514 / 1448 * 8 / 2e9
    payload = 10 * 16 + 4 * 480 * (4 + 2048)  # headers; a scale and 4096 codes of 4 bits per block
    shards = 3 * 16 + 480 * (4 + 2048)
    link = {
        ("float32", 32): 6 * numel * per_byte + 6e-4,  # 2 * 3 / 4 * 4 bytes
        ("bf16", 16): 3 * numel * per_byte + 6e-4,
        ("all_gather", 4): 3 * payload * per_byte + 3e-4,
        ("two_shot", 4): 6 * shards * per_byte + 6e-4,
    }
    codec = {
        ("float32", 32): 0.0,
        ("bf16", 16): 2 * 1e-9 * numel,
        ("all_gather", 4): 2 * (2 + 3 + 1.5) * 1e-9 * numel,
        ("two_shot", 4): 2 * (2 + (3 + 1.5 + 2) / 4 + 3) * 1e-9 * numel,
    }
    for (algorithm, bits), seconds in link.items():
        prediction = find(found, algorithm, bits)
        assert prediction.link_seconds == pytest.approx(seconds, rel=1e-12)
        assert prediction.codec_seconds == pytest.approx(codec[algorithm, bits], rel=1e-12)
    for name in (("float32", 32), ("bf16", 16)):
        assert find(found, *name).seconds == pytest.approx(link[name] + codec[name], rel=1e-12)
    # Here the codec is the longer of the two, there the link is.
    name = ("two_shot", 4)
    assert find(found, *name).seconds == pytest.approx(codec[name] + link[name] / 3, rel=1e-12)
    slower = find(plan(numel, n, 0.1, latency=0, speeds=SPEEDS), *name)
    expected = 20 * (link[name] - 6e-4) + codec[name] / 2 / 3
    assert slower.seconds == pytest.approx(expected, rel=1e-12)
    assert find(found, "two_shot", 4).nmse == 2 * find(found, "all_gather", 4).nmse


def bytes_of_exchange(
    rank: int, world_size: int, numel: int, algorithm: str, bits: float, quantizer: str
) -> int:
    communicator = TorchCommunicator()
    x = torch.randn(numel, generator=torch.Generator().manual_seed(rank))
    key = Key(0)
    options = {"algorithm": algorithm, "check": False, "min_numel": 0}
    if bits == 32:
        communicator.all_reduce_(x)
    else:
        codec = Codec(ECDQ(bits) if quantizer == "ecdq" else QuicFL(int(bits)))
        rhtcomm.all_reduce(x, codec, key, communicator, **options)
    return communicator.bytes_sent


@pytest.mark.parametrize("numel", [100_000, 1_600_000])
@pytest.mark.parametrize(
    ("algorithm", "bits", "quantizer"),
    [
        ("float32", 32, "quic_fl"),
        ("all_gather", 4, "quic_fl"),
        ("two_shot", 4, "quic_fl"),
        ("two_shot", 1, "quic_fl"),
        ("all_gather", 2.5, "ecdq"),
        ("two_shot", 2.5, "ecdq"),
    ],
)
def test_bytes_are_those_that_an_exchange_sends(
    ranks: Ranks, numel: int, algorithm: str, bits: float, quantizer: str
) -> None:
    sent = ranks.run(bytes_of_exchange, 3, numel, algorithm, bits, quantizer)
    options: dict[str, Any] = {"speeds": SPEEDS | {2.5: SPEED}, "quantizer": quantizer}
    if quantizer == "ecdq":
        options["bits"] = (bits,)
    assert find(plan(numel, 3, 1.0, **options), algorithm, bits).bytes_sent == sent[0]


def test_it_recommends_the_fastest_within_the_error_allowed() -> None:
    slow_link = plan(1 << 22, 2, 0.1, speeds=SPEEDS)
    assert slow_link.pays
    assert (slow_link.recommended.algorithm, slow_link.recommended.bits) == ("all_gather", 4)
    assert "Take 4 bits, all_gather" in slow_link.verdict
    many = plan(1 << 22, 16, 0.1, speeds=SPEEDS)
    assert (many.recommended.algorithm, many.recommended.bits) == ("two_shot", 4)
    loose = plan(1 << 22, 2, 0.1, speeds=SPEEDS, max_nmse=0.5)
    assert loose.recommended.bits == 2
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
    assert "Compression will not pay: float32 takes" in str(fast_link)
    # Nor where no number of bits is exact enough.
    assert not plan(1 << 22, 2, 0.1, speeds=SPEEDS, max_nmse=1e-6).pays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 1}, "world_size=1 at least 2"),
        ({"link_gbps": 0.0}, "link_gbps=0.0"),
        ({"link_gbps": float("nan")}, "link_gbps=nan"),
        ({"numel": 0}, "numel=0"),
        ({"latency": -1.0}, "latency=-1.0"),
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
    """Its times per coordinate are positive, and hardly depend on the length that is measured."""
    speed = measure_codec(4, numel=1 << 16, repeats=3)
    assert speed.cast > 0
    assert speed.encode > 0
    assert speed.decode_more >= 0
    assert 0 < speed.decode < 1e-5


def test_the_command_prints_a_verdict() -> None:
    arguments = "plan --world-size 2 --link-gbps 0.001 --numel 100000 --bits 4 --threads 1"
    done = subprocess.run(
        [sys.executable, "-m", "rhtcomm", *arguments.split()],
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode == 0, done.stderr
    assert "100,000 coordinates, 2 ranks, 0.001 Gbit/s" in done.stdout
    assert "kernels: " in done.stdout.splitlines()[0]
    verdict, caution = done.stdout.splitlines()[-2:]
    assert "Take 4 bits, all_gather" in verdict
    assert "what the backward pass hides" in caution
    arguments = arguments.replace("--world-size 2", "--world-size 1")
    done = subprocess.run(
        [sys.executable, "-m", "rhtcomm", *arguments.split()],
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode == 1
    assert "world_size=1 at least 2" in done.stderr


@pytest.mark.parametrize("given", ["--numel 0", "--threads 0", "--threads -1"])
def test_nothing_to_count_is_refused(given: str) -> None:
    arguments = f"plan --world-size 2 --link-gbps 1 --bits 4 {given}"
    with (
        mock.patch("sys.argv", ["rhtcomm", *arguments.split()]),
        pytest.raises(SystemExit, match=given.removeprefix("--").replace(" ", "=")),
    ):
        main()


def test_ecdq_may_be_planned_with() -> None:
    speeds = dict.fromkeys(range(1, 7), SPEED) | {2.5: SPEED}
    found = plan(1 << 20, 2, 1.0, speeds=speeds, bits=(2, 2.5), quantizer="ecdq", max_nmse=0.06)
    (match,) = (p for p in found.predictions if (p.algorithm, p.bits) == ("all_gather", 2.5))
    assert match.nmse == ECDQ(2.5).vnmse
    chunks = split_into_chunks(1 << 20, 4096, 1)
    lengths = [Codec(ECDQ(2.5)).nbytes(chunk.stop - chunk.start) for chunk in chunks]
    assert match.bytes_sent == sum(lengths)
    assert found.recommended.name == "2.5 bits, all_gather"
    by_default = plan(5000, 2, 1.0, speeds=speeds, quantizer="ecdq")
    assert sorted({p.bits for p in by_default.predictions}) == [*range(1, 7), 16, 32]
