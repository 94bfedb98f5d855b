"""The limits of the tests themselves."""

import ast
import os

import harness
import pytest
from harness import ROOT, Ranks, limit


def test_limits_stretch_with_the_load_and_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_INHERITED", False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("RHTCOMM_TEST_PATIENCE", raising=False)
    monkeypatch.setenv("RHTCOMM_TEST_STRETCH", "1")
    for load, patience, expected in (
        (0.0, "", 10),
        (0.9, "", 10),
        (8.0, "", 80),
        (0.0, "", 80),  # what a rank took over as it was started must not be above it
        (16.0, "3", 480),
    ):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        monkeypatch.setenv("RHTCOMM_TEST_PATIENCE", patience)
        assert limit(10) == expected


def limit_of_ten(rank: int, world_size: int) -> float:
    return limit(10)


def test_ranks_have_limits_below_those_around_them(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the load becomes meanwhile.
    before = ranks.run(limit_of_ten, 2)
    monkeypatch.setenv("RHTCOMM_TEST_STRETCH", str(2 * limit(1)))
    assert ranks.run(limit_of_ten, 2) == before
    assert 10 <= max(before) < limit(10)


WAITS = {"communicate", "wait", "result", "join", "get", "run", "check_call", "check_output"}


def test_limits_come_from_one_place() -> None:
    """No test waits for a process, thread or future by a number of its own."""
    calls = [
        (file.name, call)
        for file in (ROOT / "tests").rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    ]
    assert [
        f"{name}:{call.lineno}: {ast.unparse(call.func)}"
        for name, call in calls
        if call.func.attr in WAITS
        and not ast.unparse(call.func).endswith("ranks.run")  # stretch their own
        for keyword in call.keywords
        if keyword.arg == "timeout" and isinstance(keyword.value, ast.Constant)
    ] == [], "write timeout=limit(...), of harness.py"
