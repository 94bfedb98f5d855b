"""launch/examples/local_sgd.py trains on two ranks, and resumes with the same bits."""

import re
import subprocess
import sys
from pathlib import Path

from harness import ROOT, limit

EXAMPLE = ROOT / "launch/examples/local_sgd.py"


def run(folder: Path, *arguments: str) -> tuple[str, int, float]:
    """The loss, and how many outer steps sent how many kilobytes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(EXAMPLE), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"loss (\S+); (\d+) outer steps sent (\d+) kB\n", done.stdout)
    assert found, done.stdout
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
