"""What the observers of rhtcomm.hooks.telemetry write, read back by what reads it."""

import csv
import importlib.util
import json
import logging
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from states import logged

from rhtcomm.hooks import BucketReport, telemetry

BUCKETS = 2


def report_of(step: int, bucket: int, **others: Any) -> BucketReport:
    """One whose figures depend on the step."""
    fields: dict[str, Any] = {
        "rank": 0,
        "numel": 1000,
        "bits": 4,
        "bytes_sent": 100 + step,
        "bytes_uncompressed": 8 * (100 + step),
        "encode_seconds": 0.001 * (1 + step),
        "exchange_seconds": 0.002,
        "decode_seconds": 0.003,
        "rotations": 2,
        "exposed_seconds": 0.0005,
    }
    return BucketReport(step=step, bucket=bucket, last=bucket == BUCKETS - 1, **fields | others)


def feed(observer: Any, steps: range, **others: Any) -> None:
    for step in steps:
        for bucket in range(BUCKETS):
            observer(report_of(step, bucket, **others))


def means(steps: range) -> dict[str, Any]:
    """Of a step, over some steps, as the observers write them."""
    middle = sum(steps) / len(steps)
    values = {
        "bytes_sent": BUCKETS * (100 + middle),
        "compression_ratio": 8,
        "encode_seconds": BUCKETS * 0.001 * (1 + middle),
        "exchange_seconds": BUCKETS * 0.002,
        "decode_seconds": BUCKETS * 0.003,
        "exposed_seconds": BUCKETS * 0.0005,
    }
    return {f"rhtcomm/{name}": pytest.approx(value, rel=1e-5) for name, value in values.items()}


# CSV ----------------------------------------------------------------------------------------------


def steps_in(path: Path) -> list[int]:
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def twice(steps: range) -> list[int]:
    return [step for step in steps for _ in range(BUCKETS)]


def test_a_csv_file_goes_on_where_a_run_resumes_and_begins_anew_with_step_0(tmp_path: Path) -> None:
    path, previous = tmp_path / "logs" / "run.csv", tmp_path / "logs" / "run.csv.previous"
    first = telemetry.csv(path)
    feed(first, range(6))
    first.close()  # type: ignore[attr-defined]
    assert steps_in(path) == twice(range(6))
    feed(first, range(6, 7))  # of another model, whose handle goes on
    first.close()  # type: ignore[attr-defined]
    assert steps_in(path) == twice(range(7))
    path.write_text(path.read_text()[:-9])  # a killed run was writing it
    assert steps_in(path) == twice(range(7))
    resumed = telemetry.csv(path)
    feed(resumed, range(4, 9))
    resumed.close()  # type: ignore[attr-defined]
    assert steps_in(path) == twice(range(9))
    anew = telemetry.csv(path)
    feed(anew, range(2))
    anew.close()  # type: ignore[attr-defined]
    assert (steps_in(path), steps_in(previous)) == (twice(range(2)), twice(range(9)))
    assert len([*path.parent.iterdir()]) == 2
    again = telemetry.csv(path)
    feed(again, range(1))
    again.close()  # type: ignore[attr-defined]
    assert steps_in(previous) == twice(range(9))  # the long run is not lost to a short one
    assert steps_in(previous.with_name("run.csv.previous.2")) == twice(range(2))


def test_a_csv_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("step,loss\n0,1.5\n")
    with pytest.raises(ValueError, match=r"run\.csv has other columns, 'step,loss'; move it away"):
        feed(telemetry.csv(path), range(1))
    assert path.read_text() == "step,loss\n0,1.5\n"


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    """As root, a rename would replace /dev/null on the whole machine."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="pipe is no regular file"):
        feed(telemetry.csv(path), range(1))
    assert path.is_fifo()


def test_rows_have_what_was_measured(tmp_path: Path) -> None:
    observer = telemetry.csv(tmp_path / "run.csv")
    feed(observer, range(1), exposed_seconds=None, rotations=None)
    feed(observer, range(1, 2), squared_error=0.25, squared_norm=10.0)
    observer.close()  # type: ignore[attr-defined]
    _, *rows = (tmp_path / "run.csv").read_text().splitlines()
    assert rows[0] == "0,0,1000,4,100,800,0.0010000,0.0020000,0.0030000,,,,"
    assert rows[3] == "1,1,1000,4,101,808,0.0020000,0.0020000,0.0030000,0.0005000,2,0.025,10"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with logged() as lines:
        for observer in (telemetry.csv(tmp_path / "run.csv"), telemetry.log(every=1)):
            feed(observer, range(3), rank=1)
            observer.close()  # type: ignore[attr-defined]
    assert (lines, [*tmp_path.iterdir()]) == ([], [])


# Loggers ------------------------------------------------------------------------------------------


def test_log() -> None:
    observer = telemetry.log(every=3)
    with logged(logging.INFO) as lines:
        feed(observer, range(3, 7))
        assert len(lines) == 1
        feed(observer, range(7, 8), squared_error=1.0, squared_norm=8.0)
        observer.close()  # type: ignore[attr-defined]
    assert lines == [
        "rhtcomm: steps 3 to 5, per step: 0.000 MB sent (8.0 times fewer), encode 10.00 ms, "
        "exchange 4.00 ms, decode 6.00 ms, training waited 1.00 ms",
        "rhtcomm: steps 6 to 7, per step: 0.000 MB sent (8.0 times fewer), encode 15.00 ms, "
        "exchange 4.00 ms, decode 6.00 ms, training waited 1.00 ms, nmse 0.125",
    ]


@pytest.mark.parametrize("make", [telemetry.log, lambda **o: telemetry.tensorboard("x", **o)])
def test_every_is_a_number_of_steps(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    with pytest.raises(ValueError, match="every=0 must be at least 1, in steps"):
        make(every=0)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    match = f"{name} is not installed; pip install {name}"
    with pytest.raises(ModuleNotFoundError, match=match):
        getattr(telemetry, name)("runs/one")


@pytest.mark.filterwarnings("default")  # of the package
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    def scalars() -> dict[str, dict[int, float]]:
        events = EventAccumulator(str(tmp_path)).Reload()
        return {
            tag: {event.step: event.value for event in events.Scalars(tag)}
            for tag in events.Tags()["scalars"]
        }

    observer = telemetry.tensorboard(tmp_path, every=2)
    feed(observer, range(5))
    assert {*scalars()} == {*means(range(1))}  # though it is not closed
    observer.close()  # type: ignore[attr-defined]
    resumed = telemetry.tensorboard(str(tmp_path), every=2)
    feed(resumed, range(3, 7))
    resumed.close()  # type: ignore[attr-defined]
    found = scalars()
    assert all([*values] == [1, 4, 6] for values in found.values())  # step 3 was of the first run
    # Step 4, which was done again, has the mean of steps 3 and 4.
    for last, steps in {1: range(2), 4: range(3, 5), 6: range(5, 7)}.items():
        assert {tag: values[last] for tag, values in found.items()} == means(steps)
    with SummaryWriter(str(tmp_path / "own")) as writer:
        own = telemetry.tensorboard(writer, every=1)
        feed(own, range(1))
        own.close()  # type: ignore[attr-defined]
        writer.add_scalar("loss", 1.0, 0)  # it is open


@pytest.mark.filterwarnings("default")  # of the package
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(RuntimeError, match=r"there is no run; call wandb\.init"):
        feed(telemetry.wandb(every=1), range(1))
    with wandb.init(mode="offline", dir=tmp_path, project="rhtcomm") as run:
        observer = telemetry.wandb(every=2)
        feed(observer, range(2))
        run.log({"loss": 1.5})  # the figures go into its row
        feed(observer, range(2, 3))
        observer.close()  # type: ignore[attr-defined]
    wandb.teardown()  # its process, which may still be writing
    rows = rows_of(next(tmp_path.rglob("*.wandb")))
    assert [row.pop("_step") for row in rows] == [0, 1]
    expected = [{**means(range(2)), "loss": 1.5}, means(range(2, 3))]
    for row, figures, last in zip(rows, expected, (1, 2), strict=True):
        assert {k: v for k, v in row.items() if k[0] != "_"} == figures | {"rhtcomm/step": last}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What a run logged, as its file has it: behind 7 bytes, a log as LevelDB writes it."""
    from wandb.proto.wandb_internal_pb2 import Record

    octets, at, rows, text = path.read_bytes(), 7, [], b""
    while at + 7 <= len(octets):
        if -at % 32768 < 7:  # a block has no room for a piece
            at += -at % 32768
        _, length, kind = struct.unpack_from("<IHB", octets, at)
        text += octets[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # whole, or the last piece
            continue
        record = Record()
        record.ParseFromString(text)
        text = b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows
