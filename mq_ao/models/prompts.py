"""Prompts of different lengths in one batch, padded on the left, as if each were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mq_ao.arrays import as_tensor
from mq_ao.errors import MqAoError
from mq_ao.models.states import States

Step = Callable[..., tuple[Any, ...]]
"""`(input_ids, *states) -> (logits, *states)`; without states, the tokens are a prompt."""


def lengths(ids: Tensor, attention_mask: Any) -> list[int]:
    """How many tokens of each row are no padding.

    Args:
        ids: (batch, length).
        attention_mask: of that shape: 0 or False for padding, which comes first in a row, 1 or True for tokens. None:
            there is no padding.

    Raises:
        MqAoError: the mask is not that.
    """
    if attention_mask is None:
        return [ids.shape[1]] * len(ids)
    mask = as_tensor(attention_mask)
    if mask is None or mask.shape != ids.shape:
        got = f"a {type(attention_mask).__name__}" if mask is None else f"of shape {tuple(mask.shape)}"
        raise MqAoError(f"attention_mask must be of shape {tuple(ids.shape)} like the prompt, it is {got}.")
    kept = mask != 0
    if not torch.equal(kept, mask == 1):
        raise MqAoError("attention_mask holds other values than 0, for padding, and 1, for tokens.")
    counts: list[int] = kept.sum(1).tolist()
    for row, count in enumerate(counts):
        if not count:
            raise MqAoError(f"row {row} of the prompt is padding only: give at least one token.")
        if not kept[row, -count:].all():
            raise MqAoError(
                f"row {row} of attention_mask has padding behind a token: pad prompts on the left "
                "(tokenizer.padding_side = 'left')."
            )
    return counts


class Ragged:
    """A step whose rows begin at different places: those of one length run as one batch.

    Afterwards all rows go on together, where their states can be put into one batch. Keys and values of attention, of
    which each row has as many as it has tokens, cannot: then the rows of each length stay a batch of their own, and a
    token costs a call for each.

    Args:
        step: what runs rows of one length.
        counts: tokens of each row.
        states: what `step` carries; None: not known.
    """

    def __init__(self, step: Step, counts: Sequence[int], states: States | None) -> None:
        self._step = step
        self._states = states if states is not None and not any(item.grows for item in states.items) else None
        self._groups = [
            (count, torch.tensor([row for row, other in enumerate(counts) if other == count]))
            for count in sorted(set(counts))
        ]
        # Where each row is when the groups are put one behind the other.
        order = torch.cat([rows for _, rows in self._groups])
        self._places = order.argsort()

    def __call__(self, ids: Tensor, *states: Any) -> tuple[Any, ...]:
        """Logits of the last token (batch, 1, vocab_size), and what to give with the next tokens."""
        if states and self._states is not None:
            return self._step(ids, *states)
        given: Sequence[Any] = states or [()] * len(self._groups)
        results = [
            self._step(ids[rows.to(ids.device), -count:], *before)
            for (count, rows), before in zip(self._groups, given, strict=True)
        ]
        joined = torch.cat([logits[:, -1:] for logits, *_ in results])
        logits = joined[self._places.to(joined.device)]
        new = [tuple(after) for _, *after in results]
        if self._states is None:
            return logits, *new
        return logits, *self._states.taken(self._states.joined(new), self._places)
