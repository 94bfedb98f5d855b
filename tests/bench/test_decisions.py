"""What the benchmark decides from times: none is measured here."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from rhtcomm.bench.advice import advise, crossover, of_steps
from rhtcomm.bench.budget import LEAST, MOST, TURN, admitted, allocate, schedule
from rhtcomm.bench.checks import Problem
from rhtcomm.bench.command import without_ranks
from rhtcomm.bench.contestants import (
    compressed_by,
    expected_error,
    interest,
    power_sgd,
    torchs,
)
from rhtcomm.bench.exchanges import expected_of, in_order
from rhtcomm.bench.failures import in_words, sentence_of
from rhtcomm.bench.ranks import first_failure
from rhtcomm.bench.report import printed
from rhtcomm.bench.results import Result, Row, Step, write_csv, write_json
from rhtcomm.bench.rounds import Entry

MIB = 1 << 18


def row(name: str, median: float, numel: int = 25 * MIB, **named: object) -> Row:
    """float32, bf16, or "4 quic_fl two_shot"; ranges are narrow unless told otherwise."""
    bits, quantizer, algorithm = name.split() if " " in name else (32, None, None)
    fields: dict[str, object] = {
        "contestant": f"rht{bits} {quantizer} {algorithm}" if quantizer else name,
        "carrier": "gloo",
        "quantizer": quantizer,
        "algorithm": algorithm,
        "bits": int(bits),
        "numel": numel,
        "rounds": 6,
        "median": median,
        "low": 0.98 * median,
        "high": 1.02 * median,
        "encode": math.nan,
        "exchange": math.nan,
        "decode": math.nan,
        "bytes_sent": 1e6,
        "nmse": 0.01,
    }
    return Row(**fields | named)  # type: ignore[arg-type]


# ---- Advice -------------------------------------------------------------------------------------


def test_advice_names_the_fastest_within_the_error_allowed() -> None:
    rows = [
        row("float32", 0.224),
        row("bf16", 0.121),
        row("4 quic_fl two_shot", 0.0417),
        row("8 quic_fl two_shot", 0.063),
        row("2 quic_fl two_shot", 0.030),  # its error is too large
        row("float32", 0.0009, MIB // 2),
        row("bf16", 0.001, MIB // 2),
        row("4 quic_fl two_shot", 0.0012, MIB // 2),
    ]
    text = advise(rows, expected_of)
    assert text.startswith("Take 4 bits, two_shot: 2.9 times as fast as bf16 here")
    # The ratio goes from 0.75 at 0.5 MiB to 2.9 at 25 MiB, and is 1 in between.
    part = -math.log(0.75) / math.log(0.121 / 0.0417 / 0.75)
    least = MIB / 2 * 50**part
    assert f"below {least / MIB:.3g} MiB send uncompressed (min_numel=300000)." in text
    assert advise(rows, expected_of, max_nmse=1.0).startswith("Take 2 bits, two_shot: 4.0 times")


def test_advice_prefers_the_smaller_error_among_equals() -> None:
    rows = [
        row("float32", 0.3),
        row("4 quic_fl all_gather", 0.100),
        row("4 ecdq all_gather", 0.104),
    ]
    assert advise(rows, expected_of).startswith("Take 4 bits, ecdq, all_gather: 2.9 times as fast")
    rows[2] = row("4 ecdq all_gather", 0.106)
    assert advise(rows, expected_of).startswith("Take 4 bits, all_gather: 3.0 times as fast")


def test_an_equal_that_does_not_pay_is_not_preferred() -> None:
    rows = [row("float32", 1.0), row("4 quic_fl all_gather", 0.88), row("8 ecdq all_gather", 0.92)]
    steps = [
        Step(one.contestant, one.quantizer, one.algorithm, one.bits, 9, one.median, 0.8, 1, 0.1)
        for one in rows
    ]
    for text in (advise(rows, error_of), of_steps(steps, error_of)):
        assert text.startswith("Take 4 bits, all_gather")
    rows[0] = replace(rows[0], median=0.9)  # neither pays, and the sentence names the fastest
    assert "compression within the error allowed (4 bits, all_gather) 880 ms" in advise(
        rows, error_of
    )


def error_of(one: Row | Step) -> float:
    return 2.0**-one.bits / 4


@pytest.mark.parametrize("world_size", [8, 128, 1024])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_rounding_of_uncompressed_sums_is_within_their_error(
    name: str, dtype: torch.dtype, world_size: int
) -> None:
    x = torch.randn(world_size, 2048, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(2048, dtype=dtype)
    for row in x:  # as a ring adds
        total += row.to(dtype) / world_size
    mean = x.double().mean(dim=0)
    nmse = (total - mean).square().sum() / mean.square().sum()
    (one,) = torchs("gloo", world_size, [name])
    assert nmse < 1.1 * one.error < one.slack * one.error


def test_advice_against_compression() -> None:
    rows = [row("float32", 0.0229), row("bf16", 0.0204), row("4 quic_fl all_gather", 0.019)]
    text = advise(rows, expected_of)
    assert text == (
        "Do not compress: bf16 takes 20.4 ms for 25 MiB, and the fastest compression within the "
        "error allowed (4 bits, all_gather) 19 ms."
    )
    rows = [row("float32", 0.02), row("1 quic_fl all_gather", 0.001)]
    assert "nothing within the error allowed was measured" in advise(rows, expected_of)


def test_advice_says_where_times_overlap() -> None:
    rows = [row("float32", 0.3, low=0.1), row("4 quic_fl all_gather", 0.1, high=0.2)]
    assert "these times overlap" in advise(rows, expected_of)


def test_advice_needs_both_kinds() -> None:
    assert advise([], expected_of).startswith("No advice")
    assert advise([row("float32", 1.0)], expected_of).startswith("No advice")


def test_advice_by_the_largest_size_that_has_both() -> None:
    rows = [row("float32", 0.1, MIB), row("4 quic_fl gather", 0.01, MIB), row("float32", 9.0)]
    text = advise(rows, expected_of)
    assert "100 ms for 1 MiB" in text
    assert "it is faster down to 1 MiB, the smallest size measured" in text


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([(100, 0.5), (400, 2.0)], 200.0),  # the middle on logarithms
        ([(400, 2.0), (100, 0.5)], 200.0),
        ([(100, 1.5), (400, 2.0)], 0.0),
        ([(100, 2.0), (400, 0.5)], None),
        ([(1, 2.0), (10, 0.5), (1000, 2.0)], 100.0),  # the last crossing
        ([], None),
    ],
)
def test_crossover(ratios: list[tuple[int, float]], expected: float | None) -> None:
    assert crossover(ratios) == (expected and pytest.approx(expected))


def step(name: str, median: float, exposed: float = 0.0) -> Step:
    bits, quantizer, algorithm = name.split() if " " in name else (32, None, None)
    label = f"rht{bits}" if quantizer else name
    return Step(label, quantizer, algorithm, int(bits), 6, median, median, median, exposed)


def test_advice_of_steps() -> None:
    def error(one: Step) -> float:
        return expected_error(str(one.quantizer), one.bits, str(one.algorithm))

    steps = [step("none", 0.1), step("float32", 0.16, 0.06), step("bf16", 0.13, 0.03)]
    steps += [step("4 quic_fl two_shot", 0.108), step("4 ecdq two_shot", 0.11, 0.01)]
    steps.append(step("1 quic_fl two_shot", 0.1))
    assert of_steps(steps, error) == (
        "Take 4 bits, ecdq, two_shot: a step takes 110 ms, 1.2 times as fast as with bf16 (130 ms, "
        "30 ms of it exposed communication)."
    )
    steps[2] = step("bf16", 0.118, 0.018)  # not 1.1 times 108 ms
    assert of_steps(steps, error) == (
        "Do not compress: a step with bf16 takes 118 ms, 18 ms of it exposed communication, and "
        "the fastest within the error allowed (4 bits, two_shot) 108 ms."
    )


# ---- Budget -------------------------------------------------------------------------------------


def test_quick_contestants_leave_time_to_slow_ones() -> None:
    turns = allocate([0.1, 4.0, 1.0], seconds=20.0)
    assert turns == [MOST, 2, 9]  # 20 / 3 > 1.2; then half of 18.8; then what is left, 9.8
    assert sum(t * c for t, c in zip(turns, [0.1, 4.0, 1.0], strict=True)) <= 20
    assert allocate([1.0, 1.0], seconds=0.1) == [LEAST, LEAST]
    assert allocate([], seconds=1.0) == []


def test_the_less_interesting_ones_are_dropped_when_time_runs_out() -> None:
    accepted: list[float] = []
    for _ in range(20):
        if admitted(1.0, accepted, spent=2.0 * len(accepted), seconds=100.0):
            accepted.append(1.0)
    assert len(accepted) == 9  # 2 k + 3 + 4 (k + 1) <= 60
    assert admitted(20.0, [], 0.0, 160.0)
    assert not admitted(20.0, [], 0.0, 139.0)  # 3 exchanges to check it, and 4 in its only turn


def test_everybody_has_the_first_turn_and_the_rest_is_spread() -> None:
    due = schedule([6, 1, 2, 3])
    assert due == [[0, 1, 2, 3], [0], [0, 3], [0, 2], [0, 3], [0]]
    assert schedule([]) == []


def test_order_of_interest() -> None:
    algorithms = ("all_gather", "two_shot", "gather")
    field = compressed_by("gloo", (1, 2, 4, 8), ("quic_fl", "ecdq", "eden", "vector"), algorithms)
    assert len(field) == 3 * (4 + 3 + 4 + 3)  # ecdq has no 8 bits, vectors neither
    for world_size, best in ((2, "all_gather"), (4, "two_shot")):
        ordered = sorted(field, key=lambda one: interest(world_size, one))
        assert ordered[0].name == f"rht4 {best}"


def test_what_advice_needs_comes_first() -> None:
    field = [*torchs("gloo", 2, ("float32", "bf16")), power_sgd("gloo", 2, 1)]
    field += compressed_by("gloo", (4, 2), ("quic_fl",), ("all_gather",))
    problems = [cast(Problem, SimpleNamespace(numel=numel)) for numel in (MIB, 25 * MIB)]
    ordered = in_order([Entry(one, problem) for one in field for problem in problems])
    assert len(ordered) == 10
    assert [(one.contestant.name, one.numel // MIB) for one in ordered[:7]] == [
        *(("float32", 1), ("bf16", 1), ("rht4 all_gather", 1)),
        *(("float32", 25), ("bf16", 25), ("rht4 all_gather", 25)),
        ("PowerSGD rank 1", 1),
    ]


# ---- Ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({0: "?closed"}, "rank 1 of 2 is gone (killed, or it crashed) while X"),
        ({0: "?Timed out waiting 120000ms"}, "rank 1 of 2 did not come in time (it hangs, or is"),
        (
            {0: "?closed", 1: "it raised ValueError: no"},
            "rank 1 of 2 ended the run while X: it rai",
        ),
        ({1: "", 0: "?closed by peer"}, "rank 0 of 2 failed while X: closed by peer"),
        ({1: "", 0: ""}, "all ranks were told to end (SIGTERM) while X"),
    ],
)
def test_sentence_about_a_lost_rank(known: dict[int, str], expected: str) -> None:
    assert sentence_of(known, 2, "X").startswith(expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mat1 and mat2 shapes cannot be multiplied (4x299 and 300x300)", True),
        ("torch.compile failed with success", True),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed", False),
        ("Application timeout caused pair closure", False),
        ("rht_hook: rank 0 of 2 could not exchange bucket 0 of step 3: another rank died", False),
        ("NCCL error in: ProcessGroupNCCL.cpp:94", False),
    ],
)
def test_an_error_of_the_model_is_a_reason_and_a_lost_connection_a_symptom(
    text: str, reason: bool
) -> None:
    """The others of a rank that fails alone wait, and say nothing: they are not gone."""
    said = in_words(RuntimeError(text))
    assert said == (f"it raised RuntimeError: {text}" if reason else f"?{text}")


def test_ranks_are_not_started_twice() -> None:
    words = ["--ranks", "2", "--seconds", "3", "--ranks=4", "--ranks-per-node", "2"]
    assert without_ranks(words) == ["--seconds", "3", "--ranks-per-node", "2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_rank_is_left_where_the_run_is_ended(number: signal.Signals) -> None:
    code = "import time; time.sleep(60)"
    rank = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    def end() -> None:
        if number == signal.SIGINT:  # of a terminal, which all processes get
            rank.send_signal(number)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.5, end)
    timer.start()
    try:
        if number == signal.SIGTERM:
            with pytest.raises(SystemExit) as told:
                first_failure([rank])
            assert told.value.code == 143
        else:
            assert first_failure([rank]) == 130
        assert rank.poll() is not None
    finally:
        timer.join()
        rank.kill()
        signal.signal(signal.SIGTERM, before)


def test_a_rank_that_is_killed_before_the_others_can_tell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rhtcomm.bench.ranks.LEAVE", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    code = "import time; time.sleep(60)"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    both[1].kill()
    try:
        assert first_failure(both) == 128 + 9
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "rhtcomm bench: rank 1 of 2 was killed by signal 9\n"
    assert None not in [one.poll() for one in both]


# ---- Output -------------------------------------------------------------------------------------


@pytest.fixture
def result() -> Result:
    facts = {"rhtcomm": "1", "torch": "2", "backend": "gloo", "device": "cpu", "world_size": 2}
    facts |= {"nodes": 1, "threads": 1, "cores": 2, "kernels": "x", "processor": "P"}
    rows = [row("float32", 0.2), row("1 quic_fl all_gather", 0.1, encode=0.01)]
    rows.append(row("1 quic_fl gather", 0.3))
    dropped = [{"contestant": "rht4", "carrier": "gloo", "numel": MIB}] * 4
    failed = [{"contestant": "rht2", "carrier": "gloo", "numel": MIB, "reason": "wrong"}]
    return Result(facts, rows, [], failed, dropped, {"exchanges": 1.0}, "Take 1 bit.")


def test_files(result: Result, tmp_path: Path) -> None:
    result.rows[2] = replace(result.rows[2], nmse=math.inf)
    write_json(result, tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["format"] == 1
    assert content["rows"][0]["encode"] is None  # and not NaN, which is no JSON
    assert content["rows"][2]["nmse"] is None  # infinite
    assert Row(**content["rows"][1] | {"exchange": math.nan}).encode == 0.01
    write_csv(result, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [float(one["median"]) for one in found] == [0.2, 0.1, 0.3]


def test_text(result: Result) -> None:
    lines = printed(result, 60.0).splitlines()
    assert lines[-1] == "Take 1 bit."
    assert "plan --from" not in printed(result, 60.0)
    result.advice = "Do not compress: bf16 is faster."
    *_, hint, _, advice = printed(result, 60.0, Path("/folder/a.json")).splitlines()
    assert "`python -m rhtcomm plan --from /folder/a.json --link-gbps 1`" in hint
    assert advice == result.advice  # which files keep, without the folder of this machine
    assert lines[0].startswith("2 ranks on 1 node, gloo, cpu; 1 thread per rank, 2 cores per node;")
    tables = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in tables}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables]
    assert [line[1] for line in cells[2:]] == [
        "quic_fl",
        "float32",
    ]  # the fastest first, and no gather
    assert cells[2][2:8] == ["1", "all_gather", "gloo", "100", "98.0 .. 102", "2.00"]
    assert "Failed, and so not timed: 2 bits, over gloo, 1 MiB: wrong." in lines
    assert any(
        line.startswith("Left out, since --seconds 60 does not hold all: 4 of 7") for line in lines
    )


def test_turns_are_enough_for_quantiles() -> None:
    assert MOST * TURN >= 10
