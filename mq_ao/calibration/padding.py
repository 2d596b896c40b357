"""Batches that a tokenizer padded: every sequence is taken without its padding, so that nothing counts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mq_ao.calibration.batches import IDS, MASK
from mq_ao.compat.trees import tree_leaves, tree_map_only
from mq_ao.errors import MqAoError

_PER_TOKEN = frozenset({IDS, MASK, "inputs_embeds", "token_type_ids", "position_ids"})


def unpadded(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a batch's sequences without their padding, those of one length together, the longest first.

    A model that respects its mask gives a token the same output either way, and one without a mask gives what it would
    for the sequence alone. Cut with the mask are inputs of its shape if they are integers or known by their name, and
    those with further axes; of other inputs with the mask's batch, a sequence's rows are taken.

    Args:
        inputs: a batch by parameter; without `attention_mask`, or with one of more axes, it is yielded as it is.

    Raises:
        MqAoError: the mask is none of the other inputs', no token is left, there are gaps in the middle of a sequence,
            or an input may as well have a value a token as another axis of that size.
    """
    mask = inputs.get(MASK)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() > 2):
        yield dict(inputs)  # what a model of its own makes of such a mask is not known
        return
    _check(mask, inputs)
    kept = mask != 0
    if kept.all():
        yield dict(inputs)
        return
    if not kept.any():
        raise MqAoError("attention_mask is 0 everywhere: give at least one token.")
    starts, counts = kept.int().argmax(1), kept.sum(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    runs = (places >= starts[:, None]) & (places < (starts + counts)[:, None])
    if not torch.equal(runs, kept):
        raise MqAoError(
            "attention_mask is 0 between tokens of one sequence: only padding at its start and end can be left out."
        )
    ranges = list(zip(starts.tolist(), counts.tolist(), strict=True))
    for start, count in sorted({item for item in ranges if item[1]}, key=lambda item: -item[1]):
        rows = [row for row, item in enumerate(ranges) if item == (start, count)]
        cut = _Cut(mask.shape[0], mask.shape[1], rows, slice(start, start + count))
        yield {name: tree_map_only(Tensor, partial(cut, name), value) for name, value in inputs.items()}


class _Cut:
    """Takes some sequences of a batch, and a range of their tokens.

    Args:
        batch: number of sequences.
        length: of each, with padding.
        rows: sequences to take.
        tokens: to take of each.
    """

    def __init__(self, batch: int, length: int, rows: list[int], tokens: slice) -> None:
        self._batch, self._length, self._rows, self._tokens = batch, length, rows, tokens

    def __call__(self, name: str, value: Tensor) -> Tensor:
        shape = value.shape[:2]
        named = name in _PER_TOKEN
        if named and shape == (1, self._length):
            return value[:, self._tokens]  # the same for all sequences
        if shape == (self._batch, self._length):
            if named or value.dim() > 2 or not value.is_floating_point():
                return value[self._rows, self._tokens]
            raise self._unclear(name, value)
        if shape[1:] == (self._batch,) and self._batch > 1:
            raise self._unclear(name, value)
        return value[self._rows] if shape[:1] == (self._batch,) else value

    def _unclear(self, name: str, value: Tensor) -> MqAoError:
        return MqAoError(
            f"{name} of shape {tuple(value.shape)} does not tell which of its axes are those of the padded batch, "
            f"{self._batch} sequences of {self._length} tokens: give sequences without padding, one a batch."
        )


def _check(mask: Any, inputs: Mapping[str, Any]) -> None:
    wanted = "it is (batch, length), 1 at tokens and 0 at padding."
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        found = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise MqAoError(f"attention_mask is {found}: {wanted}")
    if not ((mask == 0) | (mask == 1)).all():
        raise MqAoError(f"attention_mask holds other values than 0 and 1: {wanted}")
    others = [value for name, value in inputs.items() if name != MASK]
    sequences = [inputs[IDS]] if IDS in inputs else tree_leaves(others)
    if not any(isinstance(value, Tensor) and value.shape[:2] == mask.shape for value in sequences):
        shapes = ", ".join(str(tuple(value.shape)) for value in sequences if isinstance(value, Tensor))
        raise MqAoError(f"attention_mask is of shape {tuple(mask.shape)} beside inputs of {shapes}: {wanted}")
