"""Batches that a tokenizer padded: every sequence is taken without its padding, so that nothing counts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError

MASK = "attention_mask"
"""The name by which tokenizers and models know the mask: (batch, length), 0 at padding."""


def unpadded(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a batch's sequences without their padding, those of one length together.

    A model that respects its mask gives a token the same output either way, and one without a mask gives what it would
    for the sequence alone. What has the mask's shape in its first two axes is cut with it.

    Args:
        inputs: a batch by parameter; without `attention_mask` it is yielded as it is.

    Raises:
        MqAoError: no token is left, or there are gaps in the middle of a sequence.
    """
    mask = inputs.get(MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        yield dict(inputs)
        return
    kept = mask != 0
    if not kept.any():
        raise MqAoError("attention_mask is 0 everywhere: give at least one token.")
    starts, counts = kept.int().argmax(1), kept.sum(1)
    places = torch.arange(mask.shape[1])
    runs = (places >= starts[:, None]) & (places < (starts + counts)[:, None])
    if not torch.equal(runs, kept):
        raise MqAoError(
            "attention_mask is 0 between tokens of one sequence: only padding at its start and end can be left out."
        )
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().flatten().tolist() if count else []
        if rows:
            yield {name: _cut(value, mask.shape, rows, starts, count) for name, value in inputs.items()}


def _cut(value: Any, padded: torch.Size, rows: list[int], starts: Tensor, count: int) -> Any:
    if not isinstance(value, Tensor) or value.shape[:1] != padded[:1]:
        return value
    if value.shape[:2] != padded:
        return value[rows]
    return torch.stack([value[row, int(starts[row]) : int(starts[row]) + count] for row in rows])
