"""launch/examples/local_sgd.py trains on two ranks, and resumes with the same bits."""

import re
from pathlib import Path

from harness import ROOT, run_program

EXAMPLE = ROOT / "launch/examples/local_sgd.py"


def run(folder: Path, *arguments: str) -> tuple[str, int, float]:
    """The loss, and how many outer steps sent how many kilobytes."""
    argv = [str(EXAMPLE), *arguments]
    program = f"""
import os, runpy, sys
os.chdir({str(folder)!r})
sys.argv = {argv!r}
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""
    done = run_program(program, 2)
    for one in done:
        assert one.returncode == 0, one.stderr
    found = re.fullmatch(r"loss (\S+); (\d+) outer steps sent (\d+) kB\n", done[0].stdout)
    assert found, done[0].stdout
    return found[1], int(found[2]), float(found[3])


def test_the_example_trains_and_resumes(tmp_path: Path) -> None:
    loss, steps, kilobytes = run(tmp_path)
    assert float(loss) < 0.5  # it begins at 1
    # 96 inner steps, the last of which is an outer one; 33088 parameters at 4 bits.
    assert steps == 12
    assert 12 * 33088 / 2 / 1e3 < kilobytes < 1.1 * 12 * 33088 / 2 / 1e3
    assert run(tmp_path, "local-sgd-2")[0] == loss
    source = EXAMPLE.read_text().splitlines()
    assert sum(line.endswith("# rhtcomm") for line in source) == 7
