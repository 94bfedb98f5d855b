"""The examples of the documentation run: Python blocks of each page, on 2 ranks over Gloo.

Blocks of a page run in order and share their names, after those of `given`. Comments in front of a
block, which readers do not see, say more:

    <!-- given: CODE -->         runs before it: what the reader's program has at this point
    <!-- not run: REASON -->     it is only compiled; names that it takes from rhtcomm must exist

Of a diff, the script is what is left when the lines with a minus are gone.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from harness import ROOT, Ranks, reserved_port
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rhtcomm
import rhtcomm.hooks
from rhtcomm.hooks import Handle, OuterAverager

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"(?P<marks>(?:^ *<!-- (?:given|not run):\s(?:(?!-->)[\s\S])*-->\n+)*)"
    r"^(?P<indent> *)```(?P<language>python|diff)\n(?P<code>(?:.*\n)*?)(?P=indent)```$",
    re.MULTILINE,
)
_REGISTERS = re.compile(r"\b(?:register|compress_fsdp)\(")
_MARK = re.compile(r"<!-- (given|not run):\s([\s\S]*?) *-->")


class Block(NamedTuple):
    line: int
    code: str
    given: str
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for block in _BLOCK.finditer(text):
        marks = dict(_MARK.findall(block["marks"]))
        code = textwrap.dedent(block["code"])
        if block["language"] == "diff":
            code = "".join(row[2:] for row in code.splitlines(True) if not row.startswith("-"))
        line = text.count("\n", 0, block.start("code")) + 1
        given = textwrap.dedent(marks.get("given", ""))
        found.append(Block(line, code, given, marks.get("not run")))
    return found


PAGES_WITH_BLOCKS = [page for page in PAGES if blocks(page)]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_found(page: Path) -> None:
    fences = re.findall(r"^ *```(?:python|diff)", page.read_text(), re.MULTILINE)
    assert len(fences) == len(blocks(page))


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, ids=name)
def test_names_exist_in_blocks_that_do_not_run(page: Path) -> None:
    for block in blocks(page):
        if block.not_run is not None:
            assert len(block.not_run.split()) >= 3, f"{name(page)}:{block.line}: give the reason"
            for module, imported in imports(block.code):
                assert imported in public(module), f"{module} has no {imported}"


def imports(code: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rhtcomm"):
            yield from ((str(node.module), alias.name) for alias in node.names)


def public(module: str) -> list[str]:
    """The `__all__` of a module, which is not imported: its trainer may be missing."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{file} has no __all__")


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, ids=name)
def test_blocks_run(page: Path, ranks: Ranks, tmp_path: Path) -> None:
    reasons = [block.not_run for block in blocks(page)]
    if None not in reasons:
        pytest.skip("; ".join(sorted({*map(str, reasons)})))
    with reserved_port() as port:
        first, second = ranks.run(run_blocks, 2, page, port, tmp_path)
    assert first == second, "the ranks end with other parameters"


def run_blocks(rank: int, world_size: int, page: Path, port: int, folder: Path) -> list[bytes]:
    """Returns the parameters after each block."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (place | {"MASTER_PORT": port}).items():
            patch.setenv(name, str(value))
        names = given(rank, folder)
        found = [run(block, page, names) for block in blocks(page) if block.not_run is None]
        for value in names.values():
            if isinstance(value, (Handle, OuterAverager)):
                assert value.stats().compression_ratio > 2
                value.close()
    return found


def run(block: Block, page: Path, names: dict[str, Any]) -> bytes:
    if "init_process_group(" in block.code:
        dist.destroy_process_group()
    # Lines in a traceback are those of the page. It shows CUDA where the ranks have CPUs.
    code = "\n" * (block.line - 1) + block.code.replace('"cuda"', '"cpu"')
    exec(block.given, names)
    exec(compile(code, str(page), "exec"), names)
    if _REGISTERS.search(block.given + code) and "backward()" not in code:
        names["loss"](names["model"], names["data"][0]).backward()
    # Sharded ones have the whole tensors too.
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in names["net"].parameters()]
    return torch.cat([x.detach().flatten() for x in whole]).numpy().tobytes()


def given(rank: int, folder: Path) -> dict[str, Any]:
    """What the reader's program has, under the names that the pages use."""
    torch.manual_seed(rank)
    names: dict[str, Any] = {
        "data": torch.randn(3, 8, 160).unbind(),
        "loss": lambda model, batch: (model(batch) - batch).square().mean(),
        "folder": str(folder / "checkpoint"),
        "torch": torch,
        "dist": dist,
        "rhtcomm": rhtcomm,
        "DistributedDataParallel": DistributedDataParallel,
    }

    def build_model() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 160))
        names.update(net=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
        return net

    names.update(build_model=build_model, model=build_model())
    return names
