"""`from_pretrained` of models that do not know how files are read: what reads them imports them, and enters itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn

_P = ParamSpec("_P")
_Model = TypeVar("_Model", bound=nn.Module)
_readers: dict[type[nn.Module], Callable[..., Any]] = {}


def reads(kind: type[_Model]) -> Callable[[Callable[_P, _Model]], Callable[_P, _Model]]:
    """Enters a function as what `kind.from_pretrained` calls."""

    def enter(reader: Callable[_P, _Model]) -> Callable[_P, _Model]:
        _readers[kind] = reader
        return reader

    return enter


def read(kind: type[_Model], *args: Any, **kwargs: Any) -> _Model:
    """Calls what was entered for `kind`."""
    return _readers[kind](*args, **kwargs)
