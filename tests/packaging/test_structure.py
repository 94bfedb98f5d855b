"""The shape that docs/architecture.md promises: small files, one direction of imports, no seams."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT

PACKAGE = sorted([*(ROOT / "rhtcomm").rglob("*.py"), *(ROOT / "hooks").rglob("*.py")])
PACKAGE = [path for path in PACKAGE if "rhtcomm/hooks" not in path.as_posix()]
SOURCES = [*PACKAGE, *sorted((ROOT / "rhtcomm/kernels").rglob("*.[ch]"))]
USERS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
# What each layer may import, in addition to itself and what serves all.
SERVES_ALL = {"arguments", "memory", "floating_point", "once", "versions"}
ABOVE_HOOKS = {"bench", "report"}  # tools, which measure what users register
LAYERS = {
    "randomness": set[str](),
    "bitpack": set[str](),
    "rans": set[str](),
    "segments": set[str](),
    "codebooks": set[str](),
    "rotation": {"randomness"},
    "quantizers": {"randomness", "rotation", "bitpack", "rans", "codebooks"},
    "moments": {"rotation"},
    "communicators": set[str](),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Modules that a file imports from, with the names that it takes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_fits_in_the_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1  # type: ignore[operator]
            if ast.get_docstring(node):
                told = node.body[0]
                lines -= told.end_lineno - told.lineno + 1  # type: ignore[operator]
            assert lines <= 60, f"{node.name} has {lines} lines without its docstring"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "hooks" or parts[1] in ABOVE_HOOKS:
        return
    layer = parts[1]
    for module, _ in imports(path):
        assert module.split(".")[0] != "hooks"
        assert not any(module.startswith(f"rhtcomm.{name}") for name in {"hooks", *ABOVE_HOOKS})
        if layer in LAYERS and module.startswith("rhtcomm."):
            allowed = LAYERS[layer] | SERVES_ALL | {layer}
            assert module.split(".")[1] in allowed, f"{layer} imports {module}"


@pytest.mark.parametrize("path", USERS, ids=name_of)
def test_nobody_outside_imports_an_underscore_name(path: Path) -> None:
    for module, names in imports(path):
        if module.split(".")[0] in ("rhtcomm", "hooks"):
            private = [name for name in names if name.startswith("_") and name != "__main__"]
            assert not private, f"from {module} import {private}"
            assert not any(part.startswith("_") for part in module.split(".")[:-1])
