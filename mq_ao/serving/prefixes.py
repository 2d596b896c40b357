"""The states behind beginnings that prompts have in common, so that a shared system prompt is read once.

A recurrent state stands for all that was read, whatever its length: what is kept of a beginning does not grow with it
(but for the keys and values of attention, where a model has some).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mq_ao.models.states import Value, tensors
from mq_ao.serving.beginnings import Beginnings

_SHORTEST = 16
"""Tokens of a beginning that is kept: a shorter one is read in the time that it takes to find it."""
_RECENT = 64
"""Prompts that new ones are compared with."""


@dataclass(frozen=True)
class Known:
    """A beginning that was read.

    Attributes:
        length: tokens of it; 0: nothing is known.
        states: after them.
    """

    length: int
    states: tuple[Value, ...]


class Prefixes:
    """Beginnings by their tokens, those that were used last; not safe for several threads.

    Args:
        most_bytes: of all states together; 0: nothing is kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[bytes, tuple[tuple[Value, ...], int]] = OrderedDict()
        self._bytes = 0
        self._recent: deque[bytes] = deque()
        self._beginnings_kept, self._beginnings_seen = Beginnings(), Beginnings()

    def longest(self, prompt: Tensor) -> Known:
        """The longest kept beginning of a prompt (length,) that leaves at least its last token to be read."""
        key = self._beginnings_kept.longest(_bytes(prompt[:-1]))
        if key is None:
            return Known(0, ())
        self._kept.move_to_end(key)
        states, _ = self._kept[key]
        return Known(len(key) // prompt.itemsize, states)

    def shared(self, prompt: Tensor) -> int:
        """How many of a prompt's first tokens another prompt began with not long ago; it is one of them from now on."""
        most = self._beginnings_seen.shared(_bytes(prompt[:-1])) // prompt.itemsize
        self._recent.append(_bytes(prompt))
        self._beginnings_seen.add(self._recent[-1])
        if len(self._recent) > _RECENT:
            self._beginnings_seen.remove(self._recent.popleft())
        return most if most >= _SHORTEST else 0

    def keep(self, tokens: Tensor, states: Sequence[Any]) -> None:
        """Keeps the states after some tokens (length,), and forgets those that were not used for longest."""
        size = sum(tensor.nbytes for tensor in tensors(tuple(states)))
        if len(tokens) < _SHORTEST or size > self._most_bytes:
            return
        key = _bytes(tokens)
        if key not in self._kept:
            self._kept[key] = (tuple(states), size)
            self._beginnings_kept.add(key)
            self._bytes += size
        self._kept.move_to_end(key)
        while self._bytes > self._most_bytes:
            oldest, (_, freed) = self._kept.popitem(last=False)
            self._beginnings_kept.remove(oldest)
            self._bytes -= freed


def _bytes(tokens: Tensor) -> bytes:
    return tokens.numpy().tobytes()
