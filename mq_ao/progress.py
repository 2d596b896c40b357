"""Progress of long runs, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")


def with_bar(items: Iterable[_Item], what: str, shown: bool) -> Iterable[_Item]:
    """Yields the items, with a bar on stderr if it is to be shown; without rich, of the extra `cli`, with a count."""
    if not shown:
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return _counted(items, what)
    return track(items, what, console=Console(stderr=True), transient=True)


def _counted(items: Iterable[_Item], what: str) -> Iterator[_Item]:
    counting = sys.stderr.isatty()
    count = 0
    for count, item in enumerate(items, start=1):
        yield item
        if counting:
            print(f"\r{what}: {count}", end="", file=sys.stderr, flush=True)
    print("" if counting else f"{what}: {count} done", file=sys.stderr)
