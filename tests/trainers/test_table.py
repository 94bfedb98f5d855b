"""docs/trainers.md against the tests and examples: no cell without one that shows it."""

import ast
import re
from typing import NamedTuple

import pytest
from harness import ROOT

TEXT = (ROOT / "docs/trainers.md").read_text()
# What a "yes" in a column needs: tests of these names.
NEEDED = {
    "works": (r"test_(same_bits|trains)_as_plain_\w+", "test_example"),
    "resume bit-identical": ("test_resume_is_bit_identical",),
    "logged": ("test_logs_each_step",),
}
ALWAYS = ("test_a_hook_that_was_never_called_warns",)
MARK = "  # rhtcomm"


class Row(NamedTuple):
    name: str
    """Of the example, launch/examples/train_NAME.py, and the tests, tests/trainers/test_NAME.py."""
    cells: dict[str, str]

    @property
    def added(self) -> list[str]:
        """The lines of the example that compression adds, without the mark."""
        lines = (ROOT / f"launch/examples/train_{self.name}.py").read_text().splitlines()
        return [line.removesuffix(MARK).strip() for line in lines if line.endswith(MARK)]

    @property
    def section(self) -> str:
        """What the page says of the trainer."""
        anchor = re.search(r"\(#([a-z0-9-]+)\)", self.cells["trainer"])
        assert anchor, self.cells
        for part in TEXT.split("\n## ")[1:]:
            if part.splitlines()[0].lower().replace(" ", "-") == anchor[1]:
                return part
        raise AssertionError(f"no section #{anchor[1]}")


def rows() -> list[Row]:
    (table,) = [block for block in TEXT.split("\n\n") if block.startswith("| trainer |")]
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    header, _, *others = ([cell.strip() for cell in line] for line in lines)
    found = []
    for other in others:
        cells = dict(zip(header, other, strict=True))
        name = re.search(r"train_([a-z0-9_]+)\.py", cells["lines to add"])
        assert name, f"{other}: the number of lines must link to the example"
        found.append(Row(name[1], cells))
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_each_cell(row: Row) -> None:
    tree = ast.parse((ROOT / f"tests/trainers/test_{row.name}.py").read_text())
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for column, needed in NEEDED.items():
        assert row.cells[column] in ("yes", "no")
        shown = all(any(re.fullmatch(name, test) for test in tests) for name in needed)
        assert shown == (row.cells[column] == "yes"), f"{column}: {needed} in {tests}"
    assert {*ALWAYS} <= {*tests}
    package, version = row.cells["version tried"].split()
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(rf"^{package}=={re.escape(version)}(;|$)", pins, re.MULTILINE)
    assert re.match(rf"\[{len(row.added)}\]", row.cells["lines to add"]), row.added


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_the_page_has_the_lines_of_the_example(row: Row) -> None:
    for line in row.added:
        assert line in row.section, line


def test_each_example_has_a_row() -> None:
    names = {path.stem for path in (ROOT / "launch/examples").glob("*.py")}
    # Outer steps have a page of their own.
    assert names - {"local_sgd"} == {f"train_{row.name}" for row in rows()}
    assert "(../launch/examples/local_sgd.py)" in (ROOT / "docs/local_sgd.md").read_text()


def test_each_example_says_how_to_run_it() -> None:
    for path in (ROOT / "launch/examples").glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert re.search(rf"^    (torchrun|python) .*launch/examples/{path.name}", text, re.M), path
