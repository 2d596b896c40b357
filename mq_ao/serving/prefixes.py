"""The states behind beginnings that prompts have in common, so that a shared system prompt is read once.

A recurrent state stands for all that was read, whatever its length: what is kept of a beginning does not grow with it
(but for the keys and values of attention, where a model has some).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mq_ao.models.states import Value, tensors

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
        self._kept: OrderedDict[bytes, tuple[Tensor, tuple[Value, ...], int]] = OrderedDict()
        self._bytes = 0
        self._recent: deque[Tensor] = deque(maxlen=_RECENT)

    def longest(self, prompt: Tensor) -> Known:
        """The longest kept beginning of a prompt (length,) that leaves at least its last token to be read."""
        best: tuple[int, bytes] | None = None
        for key, (tokens, _, _) in self._kept.items():
            size = len(tokens)
            if size < len(prompt) and (best is None or size > best[0]) and torch.equal(tokens, prompt[:size]):
                best = (size, key)
        if best is None:
            return Known(0, ())
        self._kept.move_to_end(best[1])
        return Known(best[0], self._kept[best[1]][1])

    def shared(self, prompt: Tensor) -> int:
        """How many of a prompt's first tokens another prompt began with not long ago; it is one of them from now on."""
        most = 0
        for other in self._recent:
            size = min(len(other), len(prompt) - 1)
            equal = (other[:size] == prompt[:size]).cumprod(0)
            most = max(most, int(equal.sum()))
        self._recent.append(prompt)
        return most if most >= _SHORTEST else 0

    def keep(self, tokens: Tensor, states: Sequence[Any]) -> None:
        """Keeps the states after some tokens (length,), and forgets those that were not used for longest."""
        size = sum(tensor.nbytes for tensor in tensors(tuple(states)))
        if len(tokens) < _SHORTEST or size > self._most_bytes:
            return
        key = tokens.numpy().tobytes()
        if key not in self._kept:
            self._kept[key] = (tokens.clone(), tuple(states), size)
            self._bytes += size
        self._kept.move_to_end(key)
        while self._bytes > self._most_bytes:
            _, (_, _, freed) = self._kept.popitem(last=False)
            self._bytes -= freed
