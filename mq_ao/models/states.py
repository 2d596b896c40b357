"""The states that a language model carries from call to call: what they are, and what is given as such."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.models.rows import Rows
from mq_ao.models.token_inputs import is_plain

Value = Tensor | Rows
"""What a state is between calls: rows where it grows."""


@dataclass(frozen=True)
class State:
    """One state of a program.

    Attributes:
        name: of the graph's input.
        sizes: of its axes but the batch, and but the rows of one that grows.
        batch_axis: which axis is the batch.
        dtype: of its values.
        grows: whether the first axis are the tokens so far, and a call gives those to append.
    """

    name: str
    sizes: tuple[int, ...]
    batch_axis: int
    dtype: torch.dtype = torch.float32
    grows: bool = False

    def shape(self, batch: int, rows: int) -> tuple[int, ...]:
        """Its shape for so many sequences, after so many tokens."""
        axis = self.batch_axis - self.grows
        one = (*self.sizes[:axis], batch, *self.sizes[axis:])
        return (rows, *one) if self.grows else one

    def zeros(self, batch: int, device: torch.device | None = None) -> Value:
        """That of new sequences."""
        tensor = self.example(batch, 0, device)
        return Rows(tensor) if self.grows else tensor

    def example(self, batch: int, rows: int, device: torch.device | None = None) -> Tensor:
        """Zeros of the shape that it has after so many tokens."""
        return torch.zeros(self.shape(batch, rows), dtype=self.dtype, device=device)

    def after(self, before: Value, given: Tensor) -> Value:
        """The state after a call that gave this for it."""
        if not self.grows:
            return given
        return (before if isinstance(before, Rows) else Rows(before)).append(given)

    def check(self, state: Any, batch: int, order: str) -> None:
        """Raises MqAoError if this is no state of so many sequences; `order` says in which states are given."""
        tensor = state.values if isinstance(state, Rows) and self.grows else state
        if not isinstance(tensor, Tensor) or not is_plain(tensor):
            raise MqAoError(self._no_tensor(state))
        shape = tuple(tensor.shape)
        wanted = self.shape(batch, shape[0] if shape else 0)
        if shape != wanted:
            raise MqAoError(self._other_shape(shape, wanted, batch, order))
        if tensor.dtype != self.dtype:
            raise MqAoError(
                f"{self.name} is {tensor.dtype}, but this program carries {self.dtype}: give what it returned."
            )

    def _no_tensor(self, state: Any) -> str:
        if state is None:
            return (
                f"{self.name} is missing: give all states as the last call returned them; a new sequence starts with "
                "prefill, without states."
            )
        return f"{self.name} is no tensor of values but a {type(state).__name__}: give what the last call returned."

    def _other_shape(self, shape: tuple[int, ...], wanted: tuple[int, ...], batch: int, order: str) -> str:
        axis = self.batch_axis
        if len(shape) == len(wanted) and all(
            one == other for place, (one, other) in enumerate(zip(shape, wanted, strict=True)) if place != axis
        ):
            return (
                f"{self.name} is of a batch of {shape[axis]}, and input_ids of a batch of {batch}: give the states of "
                "the same sequences."
            )
        return (
            f"{self.name} has shape {shape}, but {wanted} is needed for a batch of {batch}: give what the last call "
            f"returned, {order}."
        )


@dataclass(frozen=True)
class States:
    """All states of a program, in the order in which it takes and gives them.

    Attributes:
        items: at least one.
    """

    items: tuple[State, ...]

    @classmethod
    def read(cls, described: Iterable[Mapping[str, Any]]) -> States:
        """From what `described` gave."""
        return cls(
            tuple(
                State(**{**item, "sizes": tuple(item["sizes"]), "dtype": getattr(torch, item["dtype"])})
                for item in described
            )
        )

    @property
    def described(self) -> list[dict[str, Any]]:
        """The same as JSON can hold it."""
        return [{**vars(item), "sizes": list(item.sizes), "dtype": str(item.dtype)[6:]} for item in self.items]

    def zeros(self, batch: int, device: torch.device | None = None) -> tuple[Value, ...]:
        """Those of new sequences."""
        return tuple(item.zeros(batch, device) for item in self.items)

    def examples(self, batch: int, rows: int) -> tuple[Tensor, ...]:
        """Zeros of the shapes that they have after so many tokens."""
        return tuple(item.example(batch, rows) for item in self.items)

    def given(self, batch: int, states: Sequence[Any], device: torch.device | None = None) -> tuple[Value, ...]:
        """States of so many sequences: zeros if there are none, else as `check` has them."""
        if all(state is None for state in states):
            return self.zeros(batch, device)
        return self.check(batch, states)

    def check(self, batch: int, states: Sequence[Any]) -> tuple[Value, ...]:
        """States that are given with so many sequences; those that grow as rows.

        Raises:
            MqAoError: one is missing, of other sequences, of another shape or dtype, or they were swapped.
        """
        names = [item.name for item in self.items]
        if len(states) > len(self.items):
            raise MqAoError(f"{len(states)} states are given: this program carries {', '.join(names)}.")
        padded = [*states, *[None] * (len(self.items) - len(states))]
        order = " before ".join(names) if len(names) == 2 else "in its order"
        rows: set[int] = set()
        for item, state in zip(self.items, padded, strict=True):
            item.check(state, batch, order)
            if item.grows:
                rows.add(len(state))
        if len(rows) > 1:
            raise MqAoError(f"states of {', '.join(map(str, sorted(rows)))} tokens are given: they are of one call.")
        return tuple(
            Rows(state) if item.grows and isinstance(state, Tensor) else state
            for item, state in zip(self.items, padded, strict=True)
        )

    def after(self, before: Sequence[Value], given: Sequence[Tensor]) -> tuple[Value, ...]:
        """The states after a call that gave these for them."""
        triples = zip(self.items, before, given, strict=True)
        return tuple(item.after(old, new) for item, old, new in triples)

    def taken(self, states: Sequence[Value], places: Tensor) -> tuple[Tensor, ...]:
        """Those of some sequences of a batch, by their places in it; a place may come several times."""
        return tuple(
            tensor.index_select(item.batch_axis, places.to(tensor.device))
            for item, tensor in zip(self.items, tensors(states), strict=True)
        )

    def joined(self, parts: Sequence[Sequence[Value]]) -> tuple[Tensor, ...]:
        """States of several batches as those of one, one behind the other; none may grow."""
        given = zip(self.items, zip(*map(tensors, parts), strict=True), strict=True)
        return tuple(torch.cat(pieces, dim=item.batch_axis) for item, pieces in given)


def tensors(states: Sequence[Value]) -> list[Tensor]:
    """States as tensors."""
    return [state.values if isinstance(state, Rows) else state for state in states]
