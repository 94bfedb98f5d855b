"""The C kernels by every compiler at hand, and what keeps them from being built wrongly."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT, load_module
from libraries import choose

from rhtcomm import ECDQ, Codec, Eden, Key, QuicFL, VectorQuantizer
from rhtcomm.kernels import Kernel, cpu, reference

SOURCE = ROOT / "rhtcomm/kernels/cpu.c"
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
COMPILERS = [name for name in ("gcc", "clang", "clang-14", "gcc-11") if shutil.which(name)]
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="neither gcc nor clang can be found")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="cmake cannot be found")


def configure(folder: Path, compiler: str, flags: str = "") -> subprocess.CompletedProcess[str]:
    assert CMAKE is not None
    return subprocess.run(
        [CMAKE, "-S", str(ROOT), "-B", str(folder), f"-DCMAKE_C_COMPILER={compiler}"],
        env={**os.environ, "CFLAGS": flags},
        capture_output=True,
        text=True,
    )


@needs_compiler
@needs_cmake
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_compiler_builds_all_variants_and_the_same_bits(
    compiler: str, tmp_path: Path
) -> None:
    assert CMAKE is not None
    assert configure(tmp_path, compiler).returncode == 0
    done = subprocess.run([CMAKE, "--build", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr
    (library,) = tmp_path.glob("rhtcomm_cpu.*")
    usable = cpu_variants(library)
    installed = cpu.library_path()
    if installed is not None:  # where gcc finds an instruction set, no other compiler may lack it
        assert usable.keys() == cpu_variants(installed).keys()
    for quantizer in (QuicFL(4), QuicFL(7, 1 / 512), Eden(3), VectorQuantizer(2), ECDQ(2)):
        codec, key = Codec(quantizer, 3, 1024), Key(1)
        x = torch.randn(3 * 1024, generator=torch.Generator().manual_seed(0)) * 1e-38
        expected, mean = run(reference, codec, key, x)
        for name, kernel in usable.items():
            payload, out = run(kernel, codec, key, x)
            assert torch.equal(payload, expected), (name, quantizer)
            assert torch.equal(out, mean), (name, quantizer)


def run(
    kernel: Kernel, codec: Codec, key: Key, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rank 1 of 3 sends, and what it decodes to."""
    payload, out = torch.zeros(1, codec.nbytes(len(x)), dtype=torch.uint8), torch.empty(len(x))
    task = codec.task(len(x))
    kernel.encode(task, key, 0, 1, 3, x, payload)
    kernel.decode(task, key, 0, 1, 3, payload[:, None], out)
    return payload, out


def cpu_variants(library: Path) -> dict[str, cpu.Library]:
    found = {}
    for name in ("avx512vbmi", "avx512", "avx2", "baseline"):
        try:
            found[name] = cpu.Library(library, name)
        except RuntimeError:
            continue
    return found


@needs_compiler
@needs_cmake
@pytest.mark.parametrize(
    "flag",
    [
        *("-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only"),
        *("-fassociative-math", "-freciprocal-math", "-fno-signed-zeros"),
    ],
)
def test_flags_that_change_arithmetic_are_refused(flag: str, tmp_path: Path) -> None:
    done = configure(tmp_path, COMPILERS[0], f"-g -O2 {flag}")
    assert done.returncode != 0
    assert f"rhtcomm: {flag} changes payloads" in " ".join(done.stderr.split())


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    ("flag", "fact"),
    [
        ("-ffast-math", "-ffast-math and its parts"),
        ("-Ofast", "-ffast-math and its parts"),
        ("-ffinite-math-only", "-ffast-math and its parts"),
        ("-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__", "big-endian"),
        ("-D__arm__", "32-bit ARM flushes subnormal numbers"),
        ("-D__FLT_EVAL_METHOD__=2", "in a wider format"),
    ],
)
def test_the_source_refuses_where_results_would_differ(compiler: str, flag: str, fact: str) -> None:
    command = [compiler, "-std=gnu11", "-w", "-fsyntax-only", "-DVARIANT=baseline", str(SOURCE)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    done = subprocess.run([*command, flag], capture_output=True, text=True)
    assert done.returncode != 0
    assert fact in done.stderr


def test_a_big_endian_processor_is_refused_at_import() -> None:
    program = "import sys, torch; sys.byteorder = 'big'; import rhtcomm"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: rhtcomm: this processor is big-endian" in done.stderr


# An install without kernels ----------------------------------------------------------------------

MISSING = """
import importlib.metadata
facts = {facts!r}
class Distribution:
    version = "0.1.0"
    def read_text(self, name): return facts
if facts != "absent":
    importlib.metadata.distribution = lambda name: Distribution()
else:
    def distribution(name): raise importlib.metadata.PackageNotFoundError(name)
    importlib.metadata.distribution = distribution
cpu.library_path = lambda: None
"""


@pytest.mark.parametrize(
    ("facts", "source"),
    [
        (None, "--no-binary rhtcomm rhtcomm==0.1.0"),
        ('{"url": "file:///a%20b", "dir_info": {}}', "file:///a%20b"),
        (
            '{"url": "file:///a", "dir_info": {"editable": true}}',
            "--editable file:///a",
        ),
        (
            '{"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "0f"}}',
            "git+https://host/x.git@0f",
        ),
        ('{"url": "https://host/x.tar.gz?a&b", "archive_info": {}}', "'https://host/x.tar.gz?a&b'"),
        (
            '{"url": "file:///a/rhtcomm-0.1.0-py3-none-any.whl", "archive_info": {}}',
            "--no-binary rhtcomm rhtcomm==0.1.0",
        ),
        (
            '{"url": "https://host/x-none-any.whl?a#sha256=0f", "archive_info": {}}',
            "--no-binary rhtcomm rhtcomm==0.1.0",
        ),
        ("absent", str(ROOT)),
    ],
)
def test_the_first_use_prints_the_command_that_builds_them(facts: str | None, source: str) -> None:
    quiet = choose({}, MISSING.format(facts=facts))
    pip = f"{sys.executable} -m pip"
    assert (
        f"\n    {pip} cache remove rhtcomm; RHTCOMM_REQUIRE_KERNELS=1 {pip} install "
        f"--no-cache-dir --force-reinstall --no-deps -v {source}\n"
    ) in quiet.stderr
    assert quiet.stdout.split() == ["reference"]
    forced = choose({"RHTCOMM_KERNELS": "cpu"}, MISSING.format(facts=facts))
    assert forced.returncode != 0
    assert f"-v {source}\n" in forced.stderr


def test_where_pip_is_missing_the_command_brings_it() -> None:
    without_pip = (
        MISSING.format(facts=None)
        + "import rhtcomm.kernels; rhtcomm.kernels.find_spec = lambda name: None\n"
    )
    found = choose({}, without_pip)
    assert f"\n    {sys.executable} -m ensurepip; {sys.executable} -m pip cache" in found.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc cannot be found")
def test_what_make_cross_runs_elsewhere_agrees_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The driver's cases, with the known answers of golden/, in every floating-point mode."""
    cross = load_module(str(ROOT / "tests/kernels/cross/run.py"))
    subprocess.run(
        [sys.executable, str(ROOT / "tests/kernels/cross/cases.py"), str(tmp_path / "cases")],
        check=True,
    )
    assert cross.check(cross.TARGETS[0], tmp_path / "cases", tmp_path), capfd.readouterr().out
    assert " 0 differ" in capfd.readouterr().out
