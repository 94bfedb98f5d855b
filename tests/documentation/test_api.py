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
    options: str

    @property
    def made_by_users(self) -> bool:
        return "merge_init_into_class: false" not in self.options

    @property
    def inherits(self) -> bool:
        return "inherited_members: true" in self.options

    def shows(self, method: str) -> bool:
        """Provided that it has a docstring."""
        members = re.search(r"members: \[(.*)\]", self.options)
        if members is not None:
            return method in re.findall(r"\w+", members[1])
        return not method.startswith("_") and f"!^{method}$" not in self.options


def entries() -> list[Entry]:
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    return [Entry(*each) for page in pages for each in _ENTRY.findall(page.read_text() + "\n")]


def trainers() -> Iterator[Path]:
    """The modules for trainers, which are only read: their packages may be missing."""
    yield from sorted((ROOT / "hooks/trainers").glob("[!_]*.py"))


def public_names() -> Iterator[str]:
    yield from (f"rhtcomm.{name}" for name in rhtcomm.__all__)
    for name in rhtcomm.hooks.__all__:
        public = getattr(rhtcomm.hooks, name)
        if inspect.ismodule(public):
            yield from (f"rhtcomm.hooks.{name}.{each}" for each in public.__all__)
        else:
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


def definition(path: str) -> tuple[ast.stmt, str | None]:
    """The code that defines a name, and its docstring."""
    parent, _, name = path.rpartition(".")
    if parent.startswith("rhtcomm.hooks.trainers."):
        file = ROOT / "hooks/trainers" / f"{parent.rpartition('.')[2]}.py"
    else:
        module = importlib.import_module(parent)
        defined = getattr(getattr(module, name), "__module__", parent)
        file = Path(str(importlib.import_module(defined).__file__))
    body = ast.parse(file.read_text()).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node, ast.get_docstring(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node, docstring_in(after)
    raise AssertionError(f"{file} has no {name}")


def bases(path: str) -> list[str]:
    """The classes of the package that a class inherits from."""
    parent, _, name = path.rpartition(".")
    if parent.startswith("rhtcomm.hooks.trainers."):
        return []
    classes = getattr(importlib.import_module(parent), name).__mro__[1:]
    found = [f"{each.__module__}.{each.__qualname__}" for each in classes]
    return [each for each in found if each.startswith("rhtcomm.")]


def methods(node: ast.stmt) -> dict[str, ast.FunctionDef]:
    assert isinstance(node, ast.ClassDef)
    return {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}


def docstring_in(statement: ast.stmt | None) -> str | None:
    """Of what is assigned in the statement before it."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return str(statement.value.value)
    return None


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
            found |= set() if docstring_in(after) else {ast.unparse(statement.target)}
    return found


def check(path: str, docstring: str, takes: set[str], raises: set[str]) -> None:
    named = documented(docstring, "Args")
    # "x (m,) uint8 -> ..." and "Length of `numel` coordinates" say enough.
    summed_up = {*re.findall(r"`?(\w+)(?: \(|`)", docstring.splitlines()[0])}
    assert named <= takes, f"{path} has no argument {named - takes}"
    assert takes <= named | summed_up, f"{path} says nothing of {takes - named}"
    assert raises <= documented(docstring, "Raises"), f"{path} raises {raises}"


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.path)
def test_a_docstring_has_all_arguments_and_exceptions(entry: Entry) -> None:
    node, docstring = definition(entry.path)
    assert docstring, f"{entry.path} has no docstring"
    if isinstance(node, ast.FunctionDef):
        check(entry.path, docstring, arguments([node]), raised([node]))
    if not isinstance(node, ast.ClassDef):
        return
    own = methods(node)
    inherited: dict[str, ast.FunctionDef] = {}
    for base in reversed(bases(entry.path)):
        inherited |= methods(definition(base)[0])
    everything = inherited | own
    makes = [everything[name] for name in ("__init__", "__post_init__") if name in everything]
    takes = (arguments(makes) if entry.made_by_users else set()) | fields(node)
    check(entry.path, docstring, takes, raised(makes) if entry.made_by_users else set())
    for name, function in (everything if entry.inherits else own).items():
        told = ast.get_docstring(function)
        if told and entry.shows(name):
            check(f"{entry.path}.{name}", told, arguments([function]), raised([function]))
