"""The commands in the documentation: their programs, files, targets and options exist."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT
from torch.distributed.run import get_args_parser

from rhtcomm.__main__ import COMMANDS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "benchmarks").rglob("*.md"))
_SHELL = re.compile(r"^ *```(?:sh|bash)\n([\s\S]*?)^ *```$", re.MULTILINE)
_CONSOLE = re.compile(r"^ *```console\n([\s\S]*?)^ *```$", re.MULTILINE)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}\S.*\n)+")
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_ASSIGNMENTS = re.compile(r"(?:[A-Z_]+=\S+ +)*")
_MISSING = re.compile(r"expected (?:one|at least one) argument|arguments are required")
_PROGRAM = re.compile(r"(make|torchrun|mpiexec|srun|python3?|pip|(launch|benchmarks)/.*)$")
THEIRS = {"your_script.py"}  # what readers have, and the repository has not


def commands(page: Path) -> Iterator[str]:
    text = page.read_text()
    for block in _SHELL.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    for block in _CONSOLE.findall(text):  # behind a prompt, between what they print
        yield from re.findall(r"^ *\$ (.*)$", block.replace("\\\n", " "), re.MULTILINE)
    for block in _INDENTED.findall(text):
        yield from map(str.strip, block.splitlines())


def mentions(page: Path) -> Iterator[str]:
    """Commands within sentences."""
    text = _CONSOLE.sub("", _SHELL.sub("", page.read_text()))
    for words in map(str.split, _INLINE.findall(text)):
        # A program's name alone is no command, nor is a folder's.
        if len(words) > 1 or Path(words[0]).suffix:
            yield " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands(page: Path) -> None:
    wrong = [problem for command in commands(page) for problem in check(command)]
    for mention in mentions(page):  # which leaves out what the sentence is not about
        wrong += [problem for problem in check(mention) if not _MISSING.search(problem)]
    assert not wrong, "\n".join(wrong)


def check(command: str) -> list[str]:
    """What is wrong with it."""
    # Without the environment, what the page leaves out, and remarks.
    words = shlex.split(_ASSIGNMENTS.sub("", command, count=1), comments=True)
    words = [word for word in words if word != "..."]
    if not words or not _PROGRAM.match(words[0]):
        return []
    return [f"{command}: {problem}" for problem in problems(words)]


def problems(words: list[str]) -> Iterator[str]:
    program, *rest = words
    if program == "make":
        yield from _of_make(rest)
    elif program == "pip":
        yield from _of_pip(rest)
    elif program in ("mpiexec", "srun"):  # whose own options differ between versions
        if "python" in rest:
            yield from problems(rest[rest.index("python") :])
    elif program == "torchrun":
        yield from _of_torchrun(rest)
    elif program in ("python", "python3"):
        if rest[0] != "-m":
            yield from _of_script(rest[0], rest[1:])
        elif rest[1] == "rhtcomm":
            yield from _of_tool(rest[2:])
    else:
        yield from _of_script(program, rest)


def _of_make(targets: list[str]) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        name, is_variable, _ = target.partition("=")
        rule = rf"^{name} \?=" if is_variable else rf"^{name}:"
        if not re.search(rule, makefile, re.MULTILINE):
            yield f"the Makefile has no {name}"


def _of_pip(words: list[str]) -> Iterator[str]:
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for word in words:
        wanted = re.match(r"(?:\.|rhtcomm)\[(.*)\]$", word)
        for extra in wanted[1].split(",") if wanted else []:
            if not re.search(rf"^{extra} = \[", extras, re.MULTILINE):
                yield f"pyproject.toml has no extra {extra}"
        if word.endswith(".txt") and not (ROOT / word).exists():
            yield f"there is no {word}"


def _of_torchrun(words: list[str]) -> Iterator[str]:
    arguments, problem = _parsed(get_args_parser(), words)
    if arguments is None:
        yield problem
    elif not arguments.module:
        yield from _of_script(arguments.training_script, arguments.training_script_args)
    elif arguments.training_script == "rhtcomm":
        yield from _of_tool(arguments.training_script_args)


def _of_tool(words: list[str]) -> Iterator[str]:
    command, *rest = words
    if command not in COMMANDS:
        yield f"python -m rhtcomm has no {command}"
    elif rest:  # without arguments it is a name, such as that of a tool that requires some
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
        yield from filter(None, [_parsed(parser, rest)[1]])


def _of_script(file: str, words: list[str]) -> Iterator[str]:
    path = ROOT / file
    if file in THEIRS:
        return
    if not path.exists():
        yield f"there is no {file}"
        return
    if "--" in words:  # then follows a command that the script starts
        end = words.index("--")
        yield from problems(words[end + 1 :])
        words = words[:end]
    # The parser of a script may be in a module beside it.
    shared = [*path.parent.glob("*.py"), *path.parent.glob("lib/*.py")]
    source = "".join(other.read_text() for other in (path, *shared))
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        if not re.search(rf"{option}\b", source):
            yield f"{file} has no {option}"


def _parsed(
    parser: argparse.ArgumentParser, words: list[str]
) -> tuple[argparse.Namespace | None, str]:
    """The arguments, or what is wrong with them."""

    def fail(message: str) -> None:
        raise ValueError(message)

    parser.error = fail  # type: ignore[assignment,method-assign]
    try:
        return parser.parse_args(words), ""
    except ValueError as error:
        return None, str(error)
