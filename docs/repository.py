"""Links from the pages to files of the repository that lie outside docs/, for MkDocs.

Pages link as GitHub needs it, `../benchmarks/results/quality.md`. Each file that a page links to
joins the site: Markdown as a page, whose own links are followed; source code as a page that shows
it; images and tables as they are. A link to the README leads to index.md.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash"}
# The path in [text](path#anchor) and ![text](path).
_LINK = re.compile(r"(?<=\]\()[^()\s:#]+(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the navigation names and pages link to, and what that links to."""
    pages = [file for file in files.documentation_pages() if file.inclusion.is_included()]
    targets = [*_named(config.nav), *(target for page in pages for target in _targets(page))]
    for target in targets:  # which grows
        if files.get_file_from_path(_uri(target)) is None:
            added = _file(target, config)
            files.append(added)
            targets += _targets(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn each link to a file of the repository into one to where the site has it."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = _target(page.file, link[0])
        return posixpath.relpath(_uri(target), here) if target else link[0]

    return _LINK.sub(moved, markdown)


def _named(nav: Any) -> Iterator[str]:
    """The files outside docs/ that the navigation names."""
    if isinstance(nav, str):
        if (ROOT / nav).is_file():
            yield nav
        return
    for entry in nav.values() if isinstance(nav, dict) else nav:
        yield from _named(entry)


def _targets(file: File) -> Iterator[str]:
    if file.abs_src_path is None or not file.is_documentation_page():
        return
    for link in _LINK.findall(file.content_string):
        target = _target(file, link)
        if target is not None:
            yield target


def _target(file: File, link: str) -> str | None:
    """The path in the repository that a link leads to; MkDocs warns of those that lead nowhere."""
    if file.abs_src_path is None:
        return None  # source code
    path = Path(file.abs_src_path).parent.joinpath(link).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_file() else None


def _uri(target: str) -> str:
    """Where the site has a file, as MkDocs names sources."""
    if target == "README.md":
        return "index.md"
    is_source = posixpath.splitext(target)[1] in LANGUAGES
    return target.removeprefix("docs/") + (".md" if is_source else "")


def _file(target: str, config: MkDocsConfig) -> File:
    path, uri = ROOT / target, _uri(target)
    language = LANGUAGES.get(path.suffix)
    if language is None:
        return File.generated(config, uri, abs_src_path=str(path))
    code = f"# {path.name}\n\n`{target}`\n\n````{language}\n{path.read_text()}````\n"
    return File.generated(config, uri, content=code)
