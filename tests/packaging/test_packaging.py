"""What users install: the wheel, used from another directory, the sdist, an editable install."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from harness import ROOT, limit

import rhtcomm
import rhtcomm.hooks
from rhtcomm.versions import PACKAGE

PROGRAM = """
import torch, rhtcomm, rhtcomm.hooks
from rhtcomm.kernels import kernel_for

assert "installed" in rhtcomm.__file__ and "installed" in rhtcomm.hooks.__file__
assert not torch.cuda.is_initialized(), "importing must not touch a GPU"
for quantizer in (rhtcomm.QuicFL(4), rhtcomm.Eden(4)):
    x, codec, key = torch.randn(10_000), rhtcomm.Codec(quantizer), rhtcomm.Key(0)
    error = codec.decode_mean(codec.encode(x, key)[None], key, x.numel()) - x
    assert error.norm() < 0.2 * x.norm()
print(getattr(kernel_for(torch.device("cpu"), rhtcomm.QuicFL(4)), "variant", "reference"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (found,) = folder.glob("*.whl")
    return found


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *arguments],
        capture_output=True,
        text=True,
        timeout=limit(300),
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rhtcomm"}
    assert "rhtcomm/hooks/ddp.py" in names
    assert "rhtcomm/hooks/trainers/lightning.py" in names
    assert "rhtcomm/codebooks/quic_fl.npz" in names
    assert "rhtcomm/py.typed" in names
    assert not [name for name in names if name.endswith((".c", ".h"))]
    assert f"rhtcomm-{rhtcomm.__version__}.dist-info/licenses/LICENSE" in names


def test_the_version_stands_in_one_place(wheel: Path) -> None:
    """In rhtcomm/versions.py; the changelog begins with its entry."""
    archive, folder = zipfile.ZipFile(wheel), f"rhtcomm-{rhtcomm.__version__}.dist-info"
    facts = message_from_string(archive.read(f"{folder}/METADATA").decode())
    assert facts["Version"] == rhtcomm.__version__ == PACKAGE
    assert facts["Description-Content-Type"] == "text/markdown"
    assert facts.get_payload() == (ROOT / "README.md").read_text()
    entries = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0] == PACKAGE
    assert not re.search(r"^version *=", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_the_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--target", str(tmp_path / "installed"), str(wheel))
    # An editable install of the checkout would win over the path, so its finder is left out.
    program = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirect" not in type(f).__name__]
sys.path.insert(0, {str(tmp_path / "installed")!r})
{PROGRAM}"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode == 0, done.stderr
    if os.environ.get("RHTCOMM_REQUIRE_KERNELS"):
        assert done.stdout.strip() != "reference"


def test_the_public_names_are_there() -> None:
    for name in rhtcomm.__all__:
        assert getattr(rhtcomm, name).__doc__
    assert {"RHTState", "rht_hook"} <= set(rhtcomm.hooks.__all__)


# ---- Sources -----------------------------------------------------------------------------------

UNSHIPPED = {".ci/run", ".gitignore", ".pre-commit-config.yaml", "rhtcomm/hooks"}


def tracked() -> list[str]:
    """What git knows of the checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing says which files belong to it")
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=limit(60)
    )
    assert done.returncode == 0, done.stderr
    return [name for name in done.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of it as zip files and git for Windows make it: a link is a file that says where to.

    Among the files lies what a working tree holds besides. The path has a blank.
    """
    folder = tmp_path / "the checkout"
    strays = (".git/hooks/pre-commit", "build/hooks/a.py", "env/lib/rhtcomm/a.py")
    strays += ("hooks/a.so", "rhtcomm/kernels/rhtcomm_cpu.so", "rhtcomm/kernels/rhtcomm_cpu.dll")
    strays += ("hooks/__pycache__/a.pyc", "tests/.hypothesis/a", "dist/rhtcomm-0.tar.gz")
    for name in (*tracked(), *strays):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if name in strays:
            copy.write_text("stray")
        elif (ROOT / name).is_symlink():
            copy.write_text(os.readlink(ROOT / name))
        else:
            shutil.copy(ROOT / name, copy)
    return folder


def build(what: str, source: Path, to: Path) -> Path:
    """An "sdist", "wheel" or "editable" without the C kernels, which take long to compile."""
    pytest.importorskip("scikit_build_core", reason="the extra 'test' is not installed")
    program = f"""
import sys
from scikit_build_core.build import build_{what}
built = build_{what}(sys.argv[1], {{"wheel.cmake": "false"}})
print(built, end="", file=sys.stderr)"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(to)],
        cwd=source,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode == 0, done.stderr
    return to / done.stderr.splitlines()[-1]


def contents(archive: Path) -> dict[str, bytes]:
    """By path, in an sdist without the top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as zipped:
            return {name: zipped.read(name) for name in zipped.namelist()}
    with tarfile.open(archive) as tarred:
        files = {member.name: tarred.extractfile(member) for member in tarred}
        return {name.split("/", 1)[1]: file.read() for name, file in files.items() if file}


def test_the_sdist_holds_what_git_tracks_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    names = set(tracked()) - UNSHIPPED
    assert contents(build("sdist", checkout, tmp_path)).keys() == names | {"PKG-INFO"}


def test_every_source_gives_the_same_wheel(checkout: Path, tmp_path: Path) -> None:
    """With the link rhtcomm/hooks, without it, and from the sdist, which has none."""
    sdist = build("sdist", checkout, tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    linked = tmp_path / "linked"
    shutil.copytree(checkout, linked)
    (linked / "rhtcomm" / "hooks").unlink()
    (linked / "rhtcomm" / "hooks").symlink_to(Path("..", "hooks"), target_is_directory=True)
    wheels = [
        build("wheel", source, tmp_path / source.name) for source in (checkout, linked, unpacked)
    ]
    first = contents(wheels[0])
    assert first == contents(wheels[1]) == contents(wheels[2])
    assert len({wheel.read_bytes() for wheel in wheels}) == 1
    for name in ("__init__.py", "ddp.py"):
        assert first[f"rhtcomm/hooks/{name}"] == (ROOT / "hooks" / name).read_bytes()
    strays = [name for name in first if name.endswith((".so", ".dll", ".pyc", ".c", ".h"))]
    assert strays == []


def test_an_editable_install_needs_no_symbolic_link(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.unpack_archive(build("editable", checkout, tmp_path), site, format="zip")
    (checkout / "hooks" / "made_later.py").write_text("from . import ddp")
    program = f"""
import site, sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirect" not in type(f).__name__]
sys.modules.pop("_editable_skbc_rhtcomm", None)
sys.path.insert(0, {str(site)!r})
before = set(sys.path)
site.addsitedir({str(site)!r})
print(*set(sys.path) - before, sep="\\n")
from rhtcomm.hooks import made_later
print(made_later.ddp.__file__)"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode == 0, done.stderr
    # Nothing beside the checkout can be imported.
    assert done.stdout.splitlines() == [str(checkout), str(checkout / "hooks" / "ddp.py")]
