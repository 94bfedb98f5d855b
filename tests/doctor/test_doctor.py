"""The whole of `python -m rhtcomm doctor`: alone, on ranks, and where things are broken."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import forks
import pytest
from harness import ROOT, limit, reserved_port, run_program

DOCTOR = """
import runpy, sys
sys.argv = ["rhtcomm", "doctor", *{arguments!r}]
runpy.run_module("rhtcomm", run_name="__main__")
"""
# What would start ranks, or choose kernels, in the environment of the tests.
PREFIXES = ("RHTCOMM_", "OMPI_", "PMI", "SLURM_", "GLOO_", "MASTER_", "TORCHELASTIC_")


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES)}
    return kept | variables


def program(*arguments: str, before: str = "") -> str:
    return before + DOCTOR.format(arguments=("--json", *arguments))


def of_topic(report: dict[str, Any], topic: str) -> list[dict[str, Any]]:
    return [one for one in report["findings"] if one["topic"] == topic]


def start(source: str, **variables: str) -> forks.Process:
    return forks.start(source, environment(**variables))


def test_a_process_alone_on_one_core_and_with_one_thread() -> None:
    """Forks have OMP_NUM_THREADS=1."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("binding to a core needs Linux and two cores")
    core = min(os.sched_getaffinity(0))
    bind = f"import os; os.sched_setaffinity(0, {{{core}}})\n"
    free, bound = start(program()), start(program(before=bind), RHTCOMM_CPU="baseline")
    done = free.wait(limit(120))
    report = json.loads(done.stdout)
    assert (report["launcher"], report["world_size"]) == ("none", 1)
    (threads,) = of_topic(report, "threads")
    assert threads["grade"] == "remark"
    assert "1 thread, though each rank has" in threads["fact"]
    assert of_topic(report, "cores")[0]["grade"] == "ok"
    for topic in ("versions", "kernels", "tables", "known answers"):
        assert of_topic(report, topic)[0]["grade"] == "ok", done.stdout
    assert done.returncode == report["counts"]["problem"] == 0, done.stdout
    done = bound.wait(limit(120))
    report = json.loads(done.stdout)
    assert done.returncode == 1
    (cores,) = of_topic(report, "cores")
    assert cores["grade"] == "problem"
    assert "each rank may run on 1 of" in cores["fact"]
    assert "do not bind" in cores["remedy"]
    (kernels,) = of_topic(report, "kernels")
    assert kernels["fact"].startswith("C kernels, baseline: forced by RHTCOMM_CPU=baseline")


def test_where_everything_is_damaged(tmp_path: Path) -> None:
    """A copy of the package with damaged tables, and a library that ends whoever loads it."""
    package = tmp_path / "rhtcomm"
    shutil.copytree(ROOT / "rhtcomm", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "codebooks/vector.npz").write_bytes(b"PK")
    (package / "codebooks/lloyd_max.npz").unlink()
    kernels = package / "kernels"
    kill = "#include <signal.h>\n__attribute__((constructor)) static void end(void) {raise(11);}"
    compiler = shutil.which("cc")
    if compiler:
        (kernels / "kill.c").write_text(kill)
        library = kernels / "rhtcomm_cpu.so"
        command = [compiler, "-shared", "-fPIC", "-o", str(library), str(kernels / "kill.c")]
        subprocess.run(command, check=True)
    else:
        (kernels / "rhtcomm_cpu.so").write_bytes(b"junk")
    # An editable install of the checkout would win over the path, so its finder is left out.
    before = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirect" not in type(f).__name__]
sys.path.insert(0, {str(tmp_path)!r})
"""
    done = start(program(before=before)).wait(limit(120))
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    problems = [one["fact"] for one in report["findings"] if one["grade"] == "problem"]
    assert any(f"{package}/codebooks/vector.npz is damaged" in fact for fact in problems)
    assert any(f"{package}/codebooks/lloyd_max.npz is missing" in fact for fact in problems)
    (found,) = of_topic(report, "kernels")
    assert f"{library if compiler else kernels}" in found["fact"]
    if compiler:
        assert "loading it ends the process by signal 11" in found["fact"]
        assert of_topic(report, "known answers")[0]["fact"].startswith("not tried")
    else:
        assert "cannot be loaded" in found["fact"]


def test_two_ranks_of_which_one_differs() -> None:
    before = """
import os
if os.environ["RANK"] == "1":
    os.environ["RHTCOMM_CPU"] = "baseline"
"""
    first, second = run_program(program(before=before), 2)
    assert second.stdout == "", second.stdout
    report = json.loads(first.stdout)
    assert report["world_size"] == 2
    assert {tuple(one["ranks"]) for one in of_topic(report, "kernels")} == {(0,), (1,)}
    (forced,) = (one for one in of_topic(report, "kernels") if one["grade"] == "remark")
    assert forced["ranks"] == [1]
    (exchange,) = of_topic(report, "exchange")
    assert exchange["grade"] == "ok", exchange
    assert exchange["ranks"] == [0, 1]
    assert "has the same bits on all" in exchange["fact"]
    assert first.returncode == second.returncode == (report["counts"]["problem"] > 0), report


def test_ranks_that_do_not_come_or_cannot_exchange() -> None:
    another_version = """
import os
if os.environ["RANK"] == "1":
    import rhtcomm.versions
    rhtcomm.versions.VERSIONS["package version"] = "9.9"
"""
    other_bits = """
import os, rhtcomm
exact = rhtcomm.all_reduce
def all_reduce(x, *arguments, **options):
    exact(x, *arguments, **options)
    x[7] += int(os.environ["RANK"])
rhtcomm.all_reduce = all_reduce
"""
    no_interface = """
import os
if os.environ["RANK"] == "1":
    os.environ["GLOO_SOCKET_IFNAME"] = "none"
"""
    with reserved_port() as port, reserved_port() as nobody:
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        waiting = program("--seconds", "1")
        first = start(waiting, **variables, RANK="0", MASTER_PORT=str(port))
        second = start(waiting, **variables, RANK="1", MASTER_PORT=str(nobody))
        differing = run_program(program(before=another_version), 2)
        odd = run_program(program(before=other_bits), 2)
        parted = run_program(program("--seconds", "3", before=no_interface), 2)
        done, reached_nobody = (one.wait(limit(120)) for one in (first, second))

    # Rank 0 holds the store, and says who did not come.
    report = json.loads(done.stdout)
    (silent,) = of_topic(report, "ranks")
    assert (silent["grade"], silent["ranks"]) == ("problem", [1])
    assert of_topic(report, "exchange") == []
    # Another rank that does not reach it speaks for itself.
    (found,) = of_topic(json.loads(reached_nobody.stdout), "ranks")
    assert (found["grade"], found["ranks"]) == ("problem", [1])
    assert f"rank 1 could not reach 127.0.0.1:{nobody}" in found["fact"]
    assert [done.returncode, reached_nobody.returncode] == [1, 1]

    (exchange,) = of_topic(json.loads(differing[0].stdout), "exchange")
    assert exchange["grade"] == "problem"
    assert "package version (0.1.0 on rank 0; 9.9 on rank 1)" in exchange["fact"]
    assert [one.returncode for one in differing] == [1, 1]

    (exchange,) = of_topic(json.loads(odd[0].stdout), "exchange")
    assert exchange["grade"] == "problem"
    assert "has other bits on ranks 1 than on rank 0" in exchange["fact"]

    report = json.loads(parted[0].stdout)
    assert {tuple(one["ranks"]) for one in of_topic(report, "Gloo")} == {(0,), (1,)}
    (exchange,) = of_topic(report, "exchange")
    assert exchange["grade"] == "problem"
    assert "Gloo does not connect rank" in exchange["fact"]
    assert exchange["ranks"] == [0, 1]
    assert [one.returncode for one in parted] == [1, 1]
