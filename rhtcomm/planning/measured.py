"""What `python -m rhtcomm bench --json` wrote, as far as predictions need it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from rhtcomm.planning.probe import CodecSpeed, Link
from rhtcomm.versions import PACKAGE

__all__ = ["Measured"]

_FORMAT = 1
_REMEDY = "write it by `torchrun ... -m rhtcomm bench --json bench.json`"

Figures = TypeVar("Figures", CodecSpeed, Link)


@dataclass(frozen=True)
class Measured:
    """Of a link, the codec, and the machine that they were measured on."""

    path: Path
    world_size: int
    cores: float
    """Of a rank: those of a node over its ranks; infinite where the file does not tell."""
    threads: int
    link: Link
    speeds: Mapping[str, Mapping[float, CodecSpeed]]
    """By quantizer and bits."""
    version: str
    """Of the rhtcomm that measured."""

    @classmethod
    def read(cls, path: str | Path) -> "Measured":
        """
        Raises:
            ValueError: it cannot be read, is not what `bench --json` writes, or lacks what
                predictions need.
        """
        path = Path(path)
        facts = _content(path)
        ranks, nodes, cores = facts["world_size"], facts["nodes"], facts["cores"]
        return cls(
            path,
            world_size=ranks,
            cores=math.inf if cores is None else cores * nodes / ranks,
            threads=facts["threads"],
            link=_figures(Link, facts["link"], f"{path}: link"),
            speeds={
                quantizer: _by_bits(by_bits, f"{path}: speeds of {quantizer}")
                for quantizer, by_bits in facts["speeds"].items()
            },
            version=facts["rhtcomm"],
        )

    @property
    def remark(self) -> str | None:
        """What a reader of predictions should know about the file."""
        if self.version == PACKAGE:
            return None
        return f"{self.path} was measured with rhtcomm {self.version}; this is {PACKAGE}."


def _content(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON; {_REMEDY}") from None
    if not isinstance(facts, dict) or "format" not in facts:
        raise ValueError(f"{path} was not written by bench: it has no format; {_REMEDY}")
    if facts["format"] != _FORMAT:
        raise ValueError(
            f"{path} has format {facts['format']!r}, and this rhtcomm reads format {_FORMAT}; "
            f"{_REMEDY} with the rhtcomm that reads it"
        )
    expected: dict[str, type | tuple[type, ...]] = {
        "rhtcomm": str,
        "world_size": int,
        "nodes": int,
        "threads": int,
        "cores": (int, float, type(None)),
        "link": dict,
        "speeds": dict,
    }
    missing = [
        name
        for name, kind in expected.items()
        if name not in facts
        or not isinstance(facts[name], kind)
        or (isinstance(facts[name], int) and facts[name] < 1)
    ]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, or has no such value; {_REMEDY}")
    return facts


def _by_bits(found: object, where: str) -> dict[float, CodecSpeed]:
    speeds = {}
    for bits, speed in found.items() if isinstance(found, dict) else [("", None)]:
        try:
            number = float(bits)
        except ValueError:
            raise ValueError(f"{where}: {bits!r} is no number of bits; {_REMEDY}") from None
        speeds[number] = _figures(CodecSpeed, speed, where)
    return speeds


def _figures(kind: type[Figures], found: object, where: str) -> Figures:
    names = {field.name: field for field in fields(kind)}
    if not isinstance(found, dict) or set(found) != set(names):
        raise ValueError(f"{where} must have {', '.join(names)}; {_REMEDY}")
    for name, value in found.items():
        absent = value is None and "None" in str(names[name].type)
        if not absent and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"{where}: {name}={value!r} must be a number, not negative; {_REMEDY}")
    return kind(**found)
