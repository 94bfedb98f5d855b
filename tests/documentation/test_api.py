"""The API pages against the code: every public name is there, and its docstring is complete."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import ROOT

import rhtcomm
import rhtcomm.hooks

_ENTRY = re.compile(r"^::: (\S+)\n((?: {4}.*\n)*)", re.MULTILINE)
_SECTION = r"^%s:\n((?:(?: {4}.*)?\n)+)"
_ITEM = re.compile(r"^ {4}(\w+(?:, \w+)*):", re.MULTILINE)


class Entry(NamedTuple):
    """What a page shows."""

    path: str
    made_by_users: bool
    members: list[str] | None
    """Of a class; None: those that are public and have a docstring."""


def entries() -> Iterator[Entry]:
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        for path, options in _ENTRY.findall(page.read_text() + "\n"):
            members = re.search(r"members: \[(.*)\]", options)
            yield Entry(
                path,
                "merge_init_into_class: false" not in options,
                re.findall(r"\w+", members[1]) if members else None,
            )


def trainers() -> Iterator[Path]:
    """The modules for trainers, which are only read: their packages may be missing."""
    yield from sorted((ROOT / "hooks/trainers").glob("[!_]*.py"))


def public_names() -> Iterator[str]:
    yield from (f"rhtcomm.{name}" for name in rhtcomm.__all__)
    for name in rhtcomm.hooks.__all__:
        # A page takes the name for the module that is called so, unless it has the whole path.
        module = f"{name}." if (ROOT / f"hooks/{name}.py").exists() else ""
        yield f"rhtcomm.hooks.{module}{name}"
    for file in trainers():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    yield f"rhtcomm.hooks.trainers.{file.stem}.{name}"


def test_every_public_name_is_on_a_page_once() -> None:
    paths = [entry.path for entry in entries()]
    assert len(paths) == len({*paths})
    assert {*public_names()} <= {*paths}


def definition(path: str) -> ast.FunctionDef | ast.ClassDef:
    """The code that defines a name."""
    parent, _, name = path.rpartition(".")
    if parent.startswith("rhtcomm.hooks.trainers."):
        file = ROOT / "hooks/trainers" / f"{parent.rpartition('.')[2]}.py"
    else:
        source = inspect.getsourcefile(getattr(importlib.import_module(parent), name))
        assert source is not None
        file = Path(source)
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise AssertionError(f"{file} has no {name}")


def documented(docstring: str, section: str) -> set[str]:
    """The names in a section of a docstring: of arguments, or of exceptions."""
    body = re.search(_SECTION % section, docstring + "\n", re.MULTILINE)
    lines = _ITEM.findall(body[1]) if body else []
    return {name for line in lines for name in line.split(", ")}


def arguments(functions: Iterable[ast.FunctionDef]) -> set[str]:
    found = set()
    for function in functions:
        given = function.args
        rest = [each for each in (given.vararg, given.kwarg) if each]
        found |= {x.arg for x in [*given.posonlyargs, *given.args, *given.kwonlyargs, *rest]}
    return found - {"self", "cls"}


def raised(functions: Iterable[ast.FunctionDef]) -> set[str]:
    """Exceptions that the functions themselves raise."""
    statements = [node for function in functions for node in ast.walk(function)]
    calls = [x.exc for x in statements if isinstance(x, ast.Raise) and isinstance(x.exc, ast.Call)]
    return {ast.unparse(call.func) for call in calls}


def fields(node: ast.ClassDef) -> set[str]:
    """Of a dataclass, without those that have a docstring of their own."""
    found = set()
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found |= set() if told else {ast.unparse(statement.target)}
    return found


def check(path: str, docstring: str, takes: set[str], raises: set[str]) -> None:
    named = documented(docstring, "Args")
    # "x (m,) uint8 -> ..." and "Length of `numel` coordinates" say enough.
    summed_up = {*re.findall(r"`?(\w+)(?: \(|`)", docstring.splitlines()[0])}
    assert named <= takes, f"{path} has no argument {named - takes}"
    assert takes <= named | summed_up, f"{path} says nothing of {takes - named}"
    assert raises <= documented(docstring, "Raises"), f"{path} raises {raises}"


@pytest.mark.parametrize("entry", [*entries()], ids=lambda entry: entry.path)
def test_a_docstring_has_all_arguments_and_exceptions(entry: Entry) -> None:
    node = definition(entry.path)
    docstring = ast.get_docstring(node)
    assert docstring, f"{entry.path} has no docstring"
    if isinstance(node, ast.FunctionDef):
        check(entry.path, docstring, arguments([node]), raised([node]))
        return
    methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
    makes = [methods[name] for name in ("__init__", "__post_init__") if name in methods]
    if entry.made_by_users:
        check(entry.path, docstring, arguments(makes) | fields(node), raised(makes))
    shown = methods if entry.members is None else entry.members
    for name in {*shown} & {*methods}:
        told = ast.get_docstring(methods[name])
        if told and not name.startswith("_"):
            function = [methods[name]]
            check(f"{entry.path}.{name}", told, arguments(function), raised(function))
