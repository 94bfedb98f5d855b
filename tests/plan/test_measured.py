"""`plan --from`: what bench wrote comes back, is replaced by what is given, or is refused."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rhtcomm.__main__ import main
from rhtcomm.planning.measured import Measured
from rhtcomm.planning.plan import plan
from rhtcomm.planning.probe import CodecSpeed, Link
from rhtcomm.versions import PACKAGE

LINK = Link(
    latency=1.25e-4,
    posting=7e-5,
    gbps=8.5,
    transport=1.5e-9,
    all_reduce=1e-9,
    all_reduce_bf16=2e-9,
    handover=2e-4,
    acknowledged=True,
)
SPEEDS = {
    "quic_fl": {
        bits: CodecSpeed(1e-9 * bits, 2e-9, 3e-10, 4e-10, divide=1e-10, call=5e-5)
        for bits in (1.0, 4.0)
    },
    "ecdq": {2.5: CodecSpeed(2e-9, 2e-9, 3e-10, 4e-10)},
    "eden": {4.0: CodecSpeed(2e-9, 2e-9, 3e-10, 4e-10)},
}


def content(**changes: Any) -> dict[str, Any]:
    """Of a file that 8 ranks on 2 nodes of 16 cores wrote."""
    speeds = {
        quantizer: {f"{bits:g}": asdict(speed) for bits, speed in by_bits.items()}
        for quantizer, by_bits in SPEEDS.items()
    }
    facts: dict[str, Any] = {"format": 1, "rhtcomm": PACKAGE, "world_size": 8, "nodes": 2}
    facts |= {"threads": 2, "cores": 16, "link": asdict(LINK), "speeds": speeds, "rows": []}
    return facts | changes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(content()))
    return path


def printed(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[list[str]]:
    """The cells of each line of what `plan` prints; a line that is no table is one cell."""
    monkeypatch.setattr("sys.argv", ["rhtcomm", "plan", *given.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_file_comes_back_as_it_was_measured(file: Path) -> None:
    found = Measured.read(file)
    assert found.link == LINK
    assert found.speeds == SPEEDS
    assert (found.world_size, found.threads) == (8, 2)
    assert found.cores == 4  # 16 cores a node, 4 ranks a node
    assert found.remark is None


def test_it_may_lack_the_cores_and_the_sum_of_bfloat16(file: Path) -> None:
    link = asdict(LINK) | {"all_reduce_bf16": None}
    file.write_text(json.dumps(content(cores=None, link=link)))
    found = Measured.read(file)
    assert found.cores == math.inf
    assert found.link.all_reduce_bf16 is None


def test_what_was_measured_is_planned_with(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(f"--from {file} --mebibytes 1 25", monkeypatch, capsys)
    sources = {line[0]: line[1:] for line in lines if line[-1] in ("measured", "given", "assumed")}
    assert sources["ranks"] == ["8", "measured"]
    assert sources["cores per rank"] == ["4", "measured"]
    assert sources["rate of a link"] == ["8.5 Gbit/s", "measured"]
    assert sources["latency"] == ["125 us", "measured"]
    assert sources["posting a message"] == ["70 us", "measured"]
    assert sources["codec"] == ["quic_fl, 2 threads", "measured"]
    options: dict[str, Any] = {"speeds": SPEEDS["quic_fl"], "bits": (1, 4), "link": LINK}
    expected = [plan(m << 18, 8, cores=4, threads=2, **options) for m in (1, 25)]
    shown = [line[:2] for line in lines if len(line) == 9]
    assert [row for row in shown if row[0] and "--" not in row[0]] == [
        [p.name, f"{1e3 * p.seconds:.2f}"] for found in expected for p in found.predictions
    ]
    assert lines[-1] == [expected[1].verdict]
    assert "1 bit, two_shot" in {line[0] for line in lines}


def test_what_is_given_replaces_what_was_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--world-size 64 --link-gbps 1 --latency 0.002 --cores 0.5 --quantizer ecdq --bits 2.5"
    lines = printed(f"--from {file} {given} --slowdown 3", monkeypatch, capsys)
    sources = {line[0]: line[1:] for line in lines if line[-1] in ("measured", "given", "assumed")}
    assert sources["ranks"] == ["64", "given"]
    assert sources["cores per rank"] == ["0.5", "given"]
    assert sources["rate of a link"] == ["1 Gbit/s", "given"]
    assert sources["latency"] == ["2e+03 us", "given"]
    assert sources["posting a message"] == ["70 us", "measured"]
    assert sources["slowdown of the codec"] == ["3", "given"]
    expected = plan(
        25 << 18,
        64,
        1.0,
        latency=2e-3,
        cores=0.5,
        slowdown=3.0,
        quantizer="ecdq",
        bits=(2.5,),
        speeds=SPEEDS["ecdq"],
        link=LINK,
        threads=2,
    )
    assert lines[-1] == [expected.verdict]


def test_another_version_is_remarked(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(json.dumps(content(rhtcomm="0.0.9")))
    lines = printed(f"--from {file}", monkeypatch, capsys)
    assert [f"{file} was measured with rhtcomm 0.0.9; this is {PACKAGE}."] in lines


BAD_LINK = {
    "posting": None,
    "gbps": -1.0,
    "latency": "0.1",
    "transport": math.inf,
    "acknowledged": [],
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "has no format"),
        ("{}", "has no format"),
        (json.dumps({"format": 2}), "has format 2, and this rhtcomm reads format 1"),
        (json.dumps({"format": 1}), "lacks rhtcomm, world_size, nodes, threads, cores, link"),
        (json.dumps(content(world_size=0)), "lacks world_size"),
        (json.dumps(content(world_size="8")), "lacks world_size"),
        (json.dumps(content(link=None)), "lacks link"),
        (json.dumps(content(link={"gbps": 1})), "link must have latency, posting, gbps"),
        (json.dumps(content(speeds={"quic_fl": {"4": {}}})), "speeds of quic_fl must have encode"),
        (json.dumps(content(speeds={"quic_fl": {"x": {}}})), "speeds of quic_fl: 'x'"),
        (json.dumps(content(speeds={"quic_fl": 4})), "speeds of quic_fl"),
        *(
            (json.dumps(content(link=asdict(LINK) | {name: value})), f"link: {name}=")
            for name, value in BAD_LINK.items()
        ),
    ],
)
def test_a_bad_file_is_named_with_a_remedy(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Measured.read(file)
    assert str(file) in str(caught.value)
    assert "rhtcomm bench --json" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--threads 1", "--threads=1 does not go with --from"),
        ("--bits 2", "lacks the codec's speed for quic_fl at 2 bits; it has 1, 4"),
        ("--link-gbps 0", "link_gbps=0.0"),
    ],
)
def test_what_does_not_go_with_a_file(
    file: Path, given: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["rhtcomm", "plan", "--from", str(file), *given.split()])
    with pytest.raises(SystemExit, match=message):
        main()


def test_a_file_without_the_quantizer_says_which_it_has(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(json.dumps(content(speeds={"quic_fl": content()["speeds"]["quic_fl"]})))
    arguments = ["plan", "--from", str(file), "--quantizer", "ecdq"]
    monkeypatch.setattr("sys.argv", ["rhtcomm", *arguments])
    with pytest.raises(SystemExit, match="has no speeds of ecdq, only of quic_fl"):
        main()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bench\.json cannot be read: No such file"):
        Measured.read(tmp_path / "bench.json")
