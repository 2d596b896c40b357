"""What a process does one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_TURN = threading.RLock()
P = ParamSpec("P")
T = TypeVar("T")


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """Lets one thread at a time run `function`, or any other that is marked so.

    It is for what captures, edits, quantizes and compiles graphs: torch traces with state that all threads share, and
    libraries' functions are replaced for everyone in the meantime.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with _TURN:
            return function(*args, **kwargs)

    return run
