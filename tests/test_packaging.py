"""What users install: the wheel, used from another directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

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
        [sys.executable, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rhtcomm"}
    assert "rhtcomm/hooks/ddp.py" in names
    assert "rhtcomm/codebooks/quic_fl.npz" in names
    assert "rhtcomm/py.typed" in names
    assert not [name for name in names if name.endswith(".c")]


def test_the_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--target", str(tmp_path / "installed"), str(wheel))
    # An editable install of the checkout would win over the path, so its finder is left out.
    program = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirect" not in type(f).__name__]
sys.path.insert(0, {str(tmp_path / "installed")!r})
{PROGRAM}"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if os.environ.get("RHTCOMM_REQUIRE_KERNELS"):
        assert done.stdout.strip() != "reference"


def test_the_version_is_that_of_the_project() -> None:
    import rhtcomm

    assert f'\nversion = "{rhtcomm.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_the_public_names_are_there() -> None:
    import rhtcomm
    import rhtcomm.hooks

    for name in rhtcomm.__all__:
        assert getattr(rhtcomm, name).__doc__
    assert {"RHTState", "rht_hook"} <= set(rhtcomm.hooks.__all__)
