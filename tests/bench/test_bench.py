"""`python -m rhtcomm bench`, run as users run it, on two ranks and for few seconds."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from harness import ROOT, limit

from rhtcomm import Codec, QuicFL
from rhtcomm.bench.results import Row

MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
LAUNCHED = ("RANK", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "MASTER_ADDR", "MASTER_PORT")
FEW = ("--mebibytes", "0.25", "--bits", "4", "1.5", "--algorithms", "all_gather")
# More than a busy machine needs for the most turns that there are, which takes a few seconds.
ENOUGH = ("--seconds", "600", "--quantizers", "quic_fl", "ecdq")


def bench(
    *arguments: str, launcher: tuple[str, ...] = (), folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "lib")}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run(
        [*launcher, sys.executable, "-m", "rhtcomm", "bench", *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit(120),
    )


def test_two_ranks_with_a_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "csv")]
    files.append(f"--plot={tmp_path / 'bench.png'}")
    done = bench("--ranks", "2", *ENOUGH, *FEW, *files, "--model", "bench_models:small")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal, no warnings
    content = json.loads((tmp_path / "json").read_text())
    rows = content["rows"]
    check_facts(content)
    check_rows(rows)
    with (tmp_path / "csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [*written[0]] == [column.name for column in fields(Row)]
    assert [one["contestant"] for one in written] == [one["contestant"] for one in rows]
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    steps = content["steps"]
    assert [one["contestant"] for one in steps[:3]] == ["no communication", "float32", "bf16"]
    ours = [(one["quantizer"], one["bits"]) for one in steps[3:]]
    assert ours == [("quic_fl", 4), ("ecdq", 4), ("ecdq", 1.5)]
    assert all(one["median"] > 0 and one["rounds"] > 0 for one in steps)
    assert steps[1]["exposed"] == pytest.approx(steps[1]["median"] - steps[0]["median"])
    lines = done.stdout.splitlines()
    assert lines[0].startswith("2 ranks on 1 node, gloo, cpu; 1 thread per rank")
    assert sum(line.startswith("| 0.25 ") for line in lines) == len(
        [row for row in rows if row["numel"] == 1 << 16]
    )
    assert lines[-1] == content["advice"]
    assert str(tmp_path) not in content["advice"]
    assert lines[-1].startswith(("Take ", "Do not compress: "))


def check_facts(content: dict[str, object]) -> None:
    assert content["format"] == 1
    expected = {"backend": "gloo", "device": "cpu", "world_size": 2, "nodes": 1, "threads": 1}
    assert {name: content[name] for name in expected} == expected
    for name in ("rhtcomm", "torch", "cores", "kernels", "processor", "link", "speeds"):
        assert content[name], name
    assert set(content["speeds"]["ecdq"]) == {"4", "1.5"}  # type: ignore[index]
    assert content["failed"] == content["dropped"] == []


def check_rows(rows: list[dict[str, object]]) -> None:
    by_name = {str(row["contestant"]): row for row in rows if row["numel"] == 1 << 16}
    assert {*by_name} == {
        *("float32", "bf16", "PowerSGD rank 1", "PowerSGD rank 4", "rht4 all_gather"),
        *("rht4 ecdq all_gather", "rht1.5 ecdq all_gather"),
    }
    for row in by_name.values():
        assert {*row} == {column.name for column in fields(Row)}
        assert 0 < row["low"] <= row["median"] <= row["high"]  # type: ignore[operator]
    ours = by_name["rht4 all_gather"]
    assert (ours["quantizer"], ours["algorithm"], ours["bits"]) == ("quic_fl", "all_gather", 4)
    # One bit for each row of its matrix says whether it is in use.
    assert ours["bytes_sent"] == Codec(QuicFL(4)).nbytes(1 << 16) + 64 / 8
    assert ours["nmse"] == pytest.approx(0.0116, rel=0.1)
    assert by_name["float32"]["bytes_sent"] == 1 << 18
    assert by_name["float32"]["encode"] is None


def test_a_killed_rank_ends_the_run_with_a_sentence() -> None:
    script = str(ROOT / "tests" / "lib" / "bench_models.py")
    done = bench("--ranks", "2", "--seconds", "3", *FEW, "--step", script)
    assert done.returncode == 128 + 9
    assert done.stderr == (
        "rhtcomm bench: rank 1 of 2 is gone (killed, or it crashed) while training steps were "
        "measured\n"
    )


def test_mpiexec_starts_it(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="the extra 'mpi' is not installed")
    if not MPIEXEC.is_file():
        pytest.skip("mpiexec does not lie beside the interpreter: the extra 'mpi' has it")
    launcher = (str(MPIEXEC), "-n", "2")
    few = ("--mebibytes", "0.0625", "--bits", "8", "--communicator", "mpi")
    done = bench(*ENOUGH, *few, f"--json={tmp_path / 'json'}", launcher=launcher)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "json").read_text())["rows"]
    found = {row["algorithm"] for row in rows if row["carrier"] == "mpi"}
    assert found == {None, "all_gather", "two_shot", "gather"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "it needs 2 or more ranks, so start it by a launcher, such as torchrun"),
        (("--ranks", "1"), "--ranks 1 must be at least 2"),
        (("--seconds", "0"), "--seconds 0 must be positive"),
        (("--bits", "9"), "--bits must be from 1 to 8"),
        (("--json", "nowhere/a.json"), "there is no folder nowhere"),
        (("--seconds", "inf"), "--seconds inf must be positive"),
        (("--mebibytes", "inf"), "--mebibytes must be positive"),
        (("--ranks-per-node", "-2"), "--ranks-per-node -2 must be at least 1"),
        (("--connections", "0"), "connections=0 must be from 1 to 64"),
        (("--connections", "2", "--communicator", "mpi"), "--connections is for --communicator"),
        (("--model", "a:b", "--step", "c"), "give --model or --step, not both"),
    ],
)
def test_refusals(arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from rhtcomm.bench import command

    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ValueError, match=said):
        command.run(parser.parse_args(arguments))
