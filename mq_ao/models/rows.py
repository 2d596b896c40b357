"""Tensors that grow by rows, such as the keys of attention, without moving what they hold."""

from __future__ import annotations

from torch import Tensor


class Rows:
    """Some rows at the beginning of a memory that has room for more.

    What `append` gives shares the memory. The rows themselves never change: who appends to the same rows a second time
    gets a memory of its own.

    Args:
        values: (count, ...), contiguous. It is not written to.
    """

    def __init__(self, values: Tensor) -> None:
        self._memory = _Memory(values, len(values))
        self._count = len(values)

    @property
    def values(self) -> Tensor:
        """The rows, (count, ...), contiguous; where they lie."""
        return self._memory.values[: self._count]

    def __len__(self) -> int:
        return self._count

    def append(self, new: Tensor) -> Rows:
        """These rows and new ones (some, ...) after them."""
        memory, count = self._memory, self._count + len(new)
        if memory.taken != self._count or count > len(memory.values):
            # Twice the room each time: a row is moved once or twice in all.
            values = new.new_empty(max(64, 2 * count), *new.shape[1:])
            values[: self._count] = self.values
            memory = _Memory(values, self._count)
        memory.values[self._count : count] = new
        memory.taken = count
        rows = Rows.__new__(Rows)
        rows._memory, rows._count = memory, count
        return rows


class _Memory:
    def __init__(self, values: Tensor, taken: int) -> None:
        self.values = values
        self.taken = taken
        """How many rows anyone has appended."""
