"""Byte strings in order, where those that begin alike lie side by side."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

import numpy


class Beginnings:
    """Byte strings that are asked what a given one begins with, in the logarithm of their number."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []

    def add(self, key: bytes) -> None:
        """Takes a string in; it may be in already."""
        insort(self._keys, key)

    def remove(self, key: bytes) -> None:
        """Takes out a string that is in, once."""
        del self._keys[bisect_left(self._keys, key)]

    def longest(self, key: bytes) -> bytes | None:
        """The longest string that `key` begins with."""
        end = key
        while place := bisect_right(self._keys, end):
            found = self._keys[place - 1]
            if key.startswith(found):
                return found
            # No longer one can begin it; and those before `found` have no more in common with it than that has.
            end = key[: _common(key, found)]
        return None

    def shared(self, key: bytes) -> int:
        """Most bytes that any of them begins with as `key` does."""
        place = bisect_left(self._keys, key)
        return max((_common(key, other) for other in self._keys[max(0, place - 1) : place + 1]), default=0)


def _common(one: bytes, other: bytes) -> int:
    size = min(len(one), len(other))
    first, second = (numpy.frombuffer(key, numpy.uint8, size) for key in (one, other))
    different = first != second
    return int(different.argmax()) if different.any() else size
