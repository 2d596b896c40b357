"""How likely a language model takes continuations of a context, which is read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence

from mq_ao.errors import MqAoError
from mq_ao.models.prompts import Step
from mq_ao.models.states import States


@dataclass(frozen=True)
class Score:
    """A continuation under a model.

    Attributes:
        log_likelihood: sum of ln p over its tokens.
        greedy: whether each of them is the likeliest.
    """

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Scorer:
    """Scores continuations.

    Attributes:
        run: model or program, `(input_ids, *states) -> (logits of all tokens, *states)`.
        states: what it carries; None: nobody can tell, and a context is read again for every continuation.
        goes_on: whether it takes states at all; else each sequence is read whole.
        rows: continuations in one call.
    """

    run: Step
    states: States | None
    goes_on: bool = True
    rows: int = 16

    @torch.no_grad()
    def __call__(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Scores of continuations.

        Args:
            context: at least one token.
            continuations: each of at least one token.

        Raises:
            MqAoError: there is no token, or the model's logits hold NaN or Inf.
        """
        if not context or not all(continuations):
            raise MqAoError("a context and its continuations have at least one token each.")
        if not self.goes_on:
            return [self._whole(context, tokens) for tokens in continuations]
        rows = self.rows if self.states is not None else 1
        found: list[Score] = []
        # Those of one token cost nothing besides the context; a batch has about one length.
        order = sorted(range(len(continuations)), key=lambda index: len(continuations[index]))
        before: tuple[Any, ...] = ()
        for start in range(0, len(order), rows):
            batch = [continuations[index] for index in order[start : start + rows]]
            # A program computes one row of logits for a context, a model all of them.
            before = before or getattr(self.run, "prefill", self.run)(torch.tensor([context]))
            found += self._after(before, batch)
            if self.states is None and len(batch[-1]) > 1:
                before = ()  # nobody can tell what became of states that were gone on from
        return [score for _, score in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    def _after(self, before: tuple[Any, ...], batch: Sequence[Sequence[int]]) -> list[Score]:
        logits, *states = before
        first = logits[:1, -1:].expand(len(batch), -1, -1)
        longest = max(map(len, batch))
        if longest == 1:
            return _scores(first, batch)
        ids = pad_sequence([torch.tensor(tokens[:-1], dtype=torch.int64) for tokens in batch], batch_first=True)
        # What follows a row's end is not looked at, and a causal model does not look ahead.
        given = states if self.states is None else self.states.taken(states, torch.zeros(len(batch), dtype=torch.int64))
        rest, *_ = self.run(ids, *given)
        return _scores(torch.cat([first.to(rest.device), rest], dim=1), batch)

    def _whole(self, context: Sequence[int], tokens: Sequence[int]) -> Score:
        logits, *_ = self.run(torch.tensor([[*context, *tokens[:-1]]]))
        return _scores(logits[:, len(context) - 1 :], [tokens])[0]


def _scores(logits: Tensor, batch: Sequence[Sequence[int]]) -> list[Score]:
    """Of rows whose tokens the logits (rows, at least length, vocab_size) predict."""
    found = []
    for row, tokens in zip(logits, batch, strict=True):
        targets = torch.tensor(tokens, device=row.device)
        log_p = log_softmax(row[: len(tokens)].float(), dim=-1)
        total = log_p.gather(1, targets[:, None]).double().sum().item()
        if not torch.isfinite(log_p).all():
            raise MqAoError("the model's logits hold NaN or Inf on this text: it is broken.")
        found.append(Score(total, bool((log_p.argmax(-1) == targets).all())))
    return found
