"""Puts our operators in the place of a library's functions for the time of a capture."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Replacement:
    """An attribute that has another value during a capture.

    Attributes:
        owner: Python module, class, `nn.Module` or configuration that has the attribute.
        name: attribute.
        value: what it is during the capture.
    """

    owner: Any
    name: str
    value: Any


@contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Sets the attributes, and sets them back at the end, after an error too; nested use undoes its own part."""
    with ExitStack() as stack:
        for item in replacements:
            before = vars(item.owner).get(item.name, _ABSENT)
            setattr(item.owner, item.name, item.value)
            stack.callback(_restore, item, before)
        yield


def _restore(item: Replacement, before: Any) -> None:
    if before is _ABSENT:
        delattr(item.owner, item.name)
    else:
        setattr(item.owner, item.name, before)


def imported(prefix: str = "") -> list[ModuleType]:
    """The imported modules whose name starts with `prefix`."""
    modules = list(sys.modules.items())
    return [module for name, module in modules if name.startswith(prefix) and isinstance(module, ModuleType)]
