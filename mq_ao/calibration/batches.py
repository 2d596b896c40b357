"""Batches as people have them: tensors, tuples of positional inputs, mappings of keyword inputs, lists of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
from torch import Tensor

from mq_ao.arrays import as_tensor
from mq_ao.errors import MqAoError

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs."""

IDS = "input_ids"
"""The name by which models know token ids: (batch, length)."""
MASK = "attention_mask"
"""The name by which tokenizers and models know the mask: (batch, length), 0 at padding."""

FORMS = (
    "give a tensor, a tuple of the model's positional inputs, or a dictionary of its keyword inputs, as a tokenizer "
    "makes with return_tensors='pt'"
)
_TEXT = "this is text: tokenize it first, with mq_ao.text or the model's own tokenizer."


def sequences(batch: Any, takes: Callable[[str, Any], bool]) -> Iterator[Given]:
    """Positional and keyword inputs of a batch; of lists of tokens, those of one length together, the longest first.

    Args:
        batch: anything.
        takes: whether the model has an input of that name for that value; other columns of a mapping are left out.

    Raises:
        MqAoError: it is no batch.
    """
    if isinstance(batch, str) or (isinstance(batch, list | tuple) and batch and isinstance(batch[0], str)):
        raise MqAoError(_TEXT)
    if isinstance(batch, Mapping):
        yield from _named(batch, takes)
    elif isinstance(batch, list | tuple) and batch and all(map(_is_tokens, batch)):
        for rows in _by_length(batch):
            yield (_converted("it", [batch[row] for row in rows]),), {}
    elif isinstance(batch, list | tuple) and batch and _is_tokens(batch):
        yield (_converted("it", [batch]),), {}
    elif isinstance(batch, Tensor | numpy.ndarray):
        yield (batch,), {}
    elif isinstance(batch, list | tuple) and batch:
        yield tuple(batch), {}
    else:
        raise MqAoError(f"this is {described(batch)}: {FORMS}.")


def described(value: Any) -> str:
    """What something is, for messages."""
    if isinstance(value, list | tuple) and not value:
        return f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__}"


def _named(batch: Mapping[Any, Any], takes: Callable[[str, Any], bool]) -> Iterator[Given]:
    if unnamed := [key for key in batch if not isinstance(key, str)]:
        raise MqAoError(f"there is a key {unnamed[0]!r}: a dictionary's keys are the names of the model's inputs.")
    if is_text(batch.get(IDS)):
        raise MqAoError(_TEXT)
    kept = {name: value for name, value in batch.items() if takes(name, value)}
    if not kept:
        yield (), {}  # refused by who knows what the model takes
        return
    for part in _of_one_length(kept):
        yield (), _as_batch({name: _tensor(name, value) for name, value in part.items()})


def _of_one_length(columns: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A tokenizer's batch without padding, lists of different lengths, as batches of one length each."""
    ids = columns.get(IDS)
    if not (isinstance(ids, list | tuple) and ids and all(map(_is_sequence, ids))):
        yield columns
        return
    for rows in _by_length(ids):
        yield {
            name: _rows(name, value, rows) if _is_column(value, len(ids)) else value for name, value in columns.items()
        }


def _is_column(value: Any, count: int) -> bool:
    if isinstance(value, Tensor | numpy.ndarray):
        return value.ndim > 0 and len(value) == count
    return isinstance(value, list | tuple) and len(value) == count


def _rows(name: str, value: Any, rows: list[int]) -> Tensor:
    return value[rows] if isinstance(value, Tensor) else _converted(name, [value[row] for row in rows])


def _by_length(sequences: list[Any] | tuple[Any, ...]) -> Iterator[list[int]]:
    """Places of the sequences of one length, the longest first: the first of all is what a model is captured from."""
    lengths = [len(row) for row in sequences]
    if 0 in lengths:
        raise MqAoError(f"sequence {lengths.index(0)} is empty: leave it out.")
    for length in sorted(set(lengths), reverse=True):
        yield [row for row, own in enumerate(lengths) if own == length]


def _tensor(name: str, value: Any) -> Any:
    """A named input, with a tensor for an array or lists of numbers. Lists of tensors stay, but as ids and mask."""
    if isinstance(value, numpy.ndarray) or (isinstance(value, list | tuple) and (name in (IDS, MASK) or _holds(value))):
        value = _converted(name, value)
    return value


def _converted(name: str, value: Any) -> Tensor:
    tensor = as_tensor(value)
    if tensor is None:
        raise MqAoError(f"{name} is no rectangle of numbers: {FORMS}.")
    return tensor


def _holds(value: Any) -> bool:
    """Whether nested lists hold numbers and nothing else."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_holds, value))
    return isinstance(value, bool | int | float | numpy.generic)


def _as_batch(columns: dict[str, Any]) -> dict[str, Any]:
    """Named inputs, with an axis for the batch if they are one row of a data set."""
    tensors = [value for value in columns.values() if isinstance(value, Tensor)]
    ids = columns.get(IDS)
    if isinstance(ids, Tensor):
        is_row = ids.dim() == 1
    else:
        shapes = {value.shape for value in tensors}
        is_row = len(shapes) == 1 and all(value.dim() == 1 and not value.is_floating_point() for value in tensors)
    if not is_row:
        return columns
    return {name: value[None] if isinstance(value, Tensor) else value for name, value in columns.items()}


def _is_sequence(value: Any) -> bool:
    return _is_tokens(value) or (isinstance(value, Tensor | numpy.ndarray) and value.ndim == 1)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_whole, value))


def _is_whole(value: Any) -> bool:
    return type(value) is int or isinstance(value, numpy.integer)


def is_text(value: Any) -> bool:
    """Whether it is text, or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list | tuple) and bool(value) and isinstance(value[0], str))
