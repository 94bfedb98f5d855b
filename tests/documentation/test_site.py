"""The site of the documentation builds, without a warning, and needs no other server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, limit


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    folder = tmp_path_factory.mktemp("site")
    # Not with --quiet, which hides warnings from --strict too.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=limit(120),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        if not page.name.endswith(".part.md"):
            path = page.relative_to(ROOT / "docs").with_suffix("")
            folder = path.parent if path.name == "index" else path
            assert (site / folder / "index.html").is_file()
    for results in (ROOT / "benchmarks/results").glob("*.md"):
        assert (site / "benchmarks/results" / results.stem / "index.html").is_file(), results


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    loads = r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//"""
    loads += r"""|<link(?![^>]*rel=["']?canonical)[^>]*\shref=["']?(?:https?:)?//"""
    loads += r"|(?:url\(|@import )[\"']?(?:https?:)?//"
    loads += r"|<(?:pre|div)[^>]*class=[\"']?mermaid"  # drawn by a script of another server
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = re.search(loads, file.read_text())
        assert found is None, f"{file.relative_to(site)}: {found}"


def test_links_lead_to_files_of_the_repository(site: Path) -> None:
    """What docs/repository.py adds: results, their images, and source code."""
    assert (site / "benchmarks/results/accuracy.png").is_file()
    assert "QUIC-FL" in (site / "benchmarks/results/quality/index.html").read_text()
    page = (site / "trainers/index.html").read_text()
    found = re.search(r'href="([^"]*/train_fsdp\.py/)"', page)
    assert found
    code = (site / "trainers" / found[1] / "index.html").resolve().read_text()
    assert "fully_shard" in code
