"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_Item = TypeVar("_Item")


def with_bar(items: Iterable[_Item], what: str, shown: bool) -> Iterable[_Item]:
    """Yields the items, with a bar on stderr if it is to be shown."""
    return track(items, what, disable=not shown, console=Console(stderr=True), transient=True)
