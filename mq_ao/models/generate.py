"""Token-by-token generation for anything with a Mamba language model's forward."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mq_ao import checks
from mq_ao.errors import MqAoError
from mq_ao.models.prompts import Ragged, Step, lengths
from mq_ao.models.states import States
from mq_ao.models.token_inputs import token_ids


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where a sequence ends. The default is greedy, and has no end.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens (0: all).
        top_p: keep the smallest set of tokens whose probability reaches p (1.0: all).
        seed: seed of the draw; None draws a fresh one.
        known_tokens: only ids below it are chosen; None: any that there is a logit for. Vocabularies are padded to
            sizes that hardware likes, and a tokenizer does not know the ids beyond its own.
        eos_token_id: a sequence ends with this token, or one of these; None: none ends.
        pad_token_id: what follows in a batch whose other sequences have not ended; None: the first `eos_token_id`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = 0
    known_tokens: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        checks.number(self.temperature, "temperature", 0, sys.float_info.max)
        checks.whole(self.top_k, "top_k", 0)
        if checks.number(self.top_p, "top_p", 0, 1) == 0:
            raise MqAoError("top_p is 0: give a number above 0, which keeps at least the likeliest token.")
        if self.seed is not None:
            checks.whole(self.seed, "seed", -(2**63), 2**64 - 1)  # what torch takes
        if self.known_tokens is not None:
            checks.whole(self.known_tokens, "known_tokens", 1)
        for token in self.ends:
            checks.whole(token, "eos_token_id", 0)
        if self.pad_token_id is not None:
            checks.whole(self.pad_token_id, "pad_token_id", 0)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens with which a sequence ends."""
        if self.eos_token_id is None:
            return ()
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, Iterable) else (self.eos_token_id,)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is chosen, and nothing is drawn."""
        return self.temperature == 0

    def within(self, known_tokens: int | None) -> Sampling:
        """The same, that keeps to so many tokens too; None: to none more."""
        if known_tokens is None or (self.known_tokens is not None and self.known_tokens <= known_tokens):
            return self
        return replace(self, known_tokens=known_tokens)

    def ending(self, token: int | None) -> Sampling:
        """The same, whose sequences end with this token; None: with none."""
        return replace(self, eos_token_id=token)

    def generator(self, device: torch.device) -> torch.Generator:
        """A random generator with this seed."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Next token for each row: logits (batch, vocab_size) -> (batch, 1) int64. Greedy draws nothing."""
        logits = logits[..., : self.known_tokens]
        if self.greedy:
            return logits.argmax(-1, keepdim=True)
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            logits = _keep_nucleus(logits, self.top_p)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    ordered, index = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    # A token stays when the tokens before it do not reach top_p yet: the likeliest one always stays.
    outside = probability.cumsum(-1) - probability >= top_p
    return logits.masked_fill(outside.scatter(-1, index, outside), -torch.inf)


@torch.no_grad()
def stream(
    step: Step,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    attention_mask: Any = None,
    states: States | None = None,
) -> Iterator[Tensor]:
    """Yields the next tokens one by one, each (batch, 1) int64, until every sequence has ended.

    Args:
        step: the model or lowered program.
        input_ids: prompt, (batch, length) integers, length at least 1; see `token_inputs.token_ids`.
        max_new_tokens: how many tokens to yield at most.
        sampling: greedy if None.
        attention_mask: of the prompt's shape, 0 for padding on the left; each row goes on as it would alone. None:
            there is no padding.
        states: what `step` carries, so that rows of different lengths can go on as one batch.

    Raises:
        MqAoError: the prompt is empty or not (batch, length) integers, max_new_tokens is negative, or the mask is not
            as above.
    """
    input_ids = token_ids(input_ids, what="the prompt")
    if max_new_tokens < 0:
        raise MqAoError(f"max_new_tokens is {max_new_tokens}: give 0 or a positive number.")
    counts = lengths(input_ids, attention_mask)
    run = Ragged(step, counts, states) if len(set(counts)) > 1 else step
    sampling = sampling or Sampling()
    generator: torch.Generator | None = None
    carried: list[Any] = []
    tokens = input_ids[:, -max(counts) :]
    ended = torch.zeros(len(tokens), 1, dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits, *carried = run(tokens, *carried)
        # A program may give its logits on another device than that of the prompt.
        generator = generator or sampling.generator(logits.device)
        tokens = sampling.choose(logits[:, -1], generator)
        if not sampling.ends:
            yield tokens
            continue
        ended = ended.to(tokens.device)
        fill = sampling.ends[0] if sampling.pad_token_id is None else sampling.pad_token_id
        # What fills a row is for the caller: the model may know no such token, and goes on with those that it chose.
        yield torch.where(ended, fill, tokens)
        ended = ended | torch.isin(tokens, torch.tensor(sampling.ends, device=tokens.device))
        if ended.all():
            return


def generate(
    step: Step,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    *,
    attention_mask: Any = None,
    states: States | None = None,
) -> Tensor:
    """Prompt and continuation: (batch, length) -> (batch, length + at most max_new_tokens) int64; see `stream`."""
    input_ids = token_ids(input_ids, what="the prompt")
    following = stream(step, input_ids, max_new_tokens, sampling, attention_mask=attention_mask, states=states)
    return torch.cat([input_ids, *(tokens.to(input_ids.device) for tokens in following)], dim=1)
