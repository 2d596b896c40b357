"""What a process does one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

_TURN = threading.RLock()
_HELD = threading.local()
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
            _HELD.times = _times() + 1
            try:
                return function(*args, **kwargs)
            finally:
                _HELD.times -= 1

    return run


def yielding_turns(items: Iterable[T]) -> Generator[T]:
    """The items of a user's iterable; while it makes one, other threads have their turn.

    It may wait for a thread that waits for its turn. A generator is closed in the end, also if not all is read.
    """
    iterator = iter(items)
    try:
        while True:
            with _given_up():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


def _times() -> int:
    """How many times over this thread has the turn."""
    return getattr(_HELD, "times", 0)


@contextmanager
def _given_up() -> Iterator[None]:
    times = _times()
    for _ in range(times):
        _TURN.release()
    _HELD.times = 0
    try:
        yield
    finally:
        for _ in range(times):
            _TURN.acquire()
        _HELD.times = times
