"""What the API pages make of docstrings, for mkdocstrings.

Names that share a line of a section, such as `rank, world_size: as given to encode`, become a line
each. Names of the public API in backticks become links, and so do files such as docs/format.md.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Raises):$")
SHARED = re.compile(r"^    (\w+(?:, \w+)+):")
FILE = re.compile(r"\bdocs/(\w+\.md)")
CODE = re.compile(r"(?<!`)`([\w.]+)`(?!`)")


class Docstrings(griffe.Extension):
    def __init__(self) -> None:
        self._paths = dict(public_names())

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = "\n".join(one_name_a_line(obj.docstring.value))
            text = CODE.sub(lambda code: self._link(code, obj), text)
            obj.docstring.value = FILE.sub(r"[\g<0>](../\1)", text)

    def _link(self, code: re.Match[str], obj: griffe.Object) -> str:
        name = code[1]
        path = self._paths.get(name) or self._paths.get(name.removeprefix("rhtcomm.hooks."))
        # Links from a page to itself say nothing new.
        if path is None or obj.canonical_path.endswith(name):
            return code[0]
        return f'<autoref identifier="{path}" optional>{code[0]}</autoref>'


def public_names() -> Iterator[tuple[str, str]]:
    """The names that the API pages show, short and in full, and their paths."""
    for page in (Path(__file__).parent / "api").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            yield path, path
            if ".trainers." not in path:
                yield path.rpartition(".")[2], path


def one_name_a_line(docstring: str) -> Iterator[str]:
    """The lines of a docstring, where each argument and each exception has its own."""
    section, shared = False, list[str]()
    names: list[str] = []
    for line in [*docstring.splitlines(), ""]:
        if shared and not line.startswith("     "):  # the end of what they share
            for name in names:
                yield f"    {name}:{shared[0]}"
                yield from shared[1:]
            shared = []
        if line and not line.startswith(" "):
            section = SECTION.match(line) is not None
        several = SHARED.match(line) if section else None
        if several:
            names, shared = several[1].split(", "), [line[several.end() :]]
        elif shared:
            shared.append(line)
        else:
            yield line
