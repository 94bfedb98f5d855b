"""Progress bars, on a terminal only."""

from collections.abc import Collection
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Collection[T], what: str | None = None, *, keep: bool = False, shown: bool = True
) -> "tqdm[T]":
    """The items, with a bar that goes when they end unless `keep`; only one rank should show it."""
    return tqdm(items, what, leave=keep, disable=None if shown else True)
