"""How well a program predicts a text, and how far a quantized one strays from its float model."""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mq_ao.errors import MqAoError
from mq_ao.models.prompts import Step
from mq_ao.text import TokenText, byte_text


@dataclass(frozen=True)
class Evaluation:
    """The cost of a text under a model.

    Attributes:
        tokens: tokens predicted.
        text_bytes: size of the text, or None if only its tokens are known.
        nats: sum of -ln p over all predicted tokens.
        correct: tokens that were the likeliest.
        seconds: time spent in the model.
    """

    tokens: int
    text_bytes: int | None
    nats: float
    correct: int
    seconds: float

    @property
    def bits_per_byte(self) -> float | None:
        """Mean cost of a byte of the text in bits."""
        return None if self.text_bytes is None else self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        """exp of the mean cost of a token; infinite where that overflows."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the likeliest."""
        return self.correct / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "tokens_per_second": self.tokens / self.seconds,
        }


@dataclass(frozen=True, eq=False)
class TokenCosts:
    """Two models token by token, in the order of the text; each (tokens,) float64.

    Attributes:
        reference: -ln p of the token under the reference, nats.
        other: -ln q of it under the other model, nats.
        divergence: KL(p || q) of the distributions that predict it, nats.
        same: 1 where both have the same likeliest token, else 0.
    """

    reference: Tensor
    other: Tensor
    divergence: Tensor
    same: Tensor


@dataclass(frozen=True)
class Comparison:
    """Two models on the same text; p is the reference's distribution and q the other's.

    Attributes:
        reference: the reference's cost, usually of the float model.
        other: the other's cost.
        divergence: mean over tokens of KL(p || q) in nats.
        agreement: share of tokens for which both have the same likeliest token.
        tokens: what these are the sums of.
    """

    reference: Evaluation
    other: Evaluation
    divergence: float
    agreement: float
    tokens: TokenCosts = field(compare=False, repr=False)

    @property
    def relative_cost(self) -> float:
        """The other's cost over the reference's."""
        return self.other.nats / self.reference.nats

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {
            "kl_divergence": self.divergence,
            "agreement": self.agreement,
            "relative_cost": self.relative_cost,
        }


@dataclass
class _Tally:
    """Sums over the tokens seen so far."""

    nats: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    states: tuple[Any, ...] = ()

    def run(self, step: Step, inputs: Tensor, targets: Tensor, fresh: bool) -> tuple[Tensor, Tensor]:
        """Runs a chunk from the carried state and adds its cost.

        Returns:
            log p (length, vocab_size), and the cost of every target (length,) float64.
        """
        started = time.perf_counter()
        logits, *states = step(inputs[None], *(() if fresh else self.states))
        logits = logits.to(targets.device)  # a GPU is not done before
        self.seconds += time.perf_counter() - started
        self.states = tuple(states)
        log_p = functional.log_softmax(logits[0].float(), dim=-1)
        costs = functional.nll_loss(log_p, targets, reduction="none").double()
        total = costs.sum().item()
        if not math.isfinite(total):
            raise MqAoError("the model's logits hold NaN or Inf on this text: it is broken.")
        self.nats += total
        self.correct += int((log_p.argmax(-1) == targets).sum())
        return log_p, costs

    def result(self, text: TokenText) -> Evaluation:
        return Evaluation(text.predicted, text.text_bytes, self.nats, self.correct, self.seconds)


@torch.no_grad()
def evaluate(
    step: Step,
    text: TokenText,
    *,
    window: int | None = None,
    chunk: int = 1024,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Costs every token of a text, each predicted from those before it in its document.

    Args:
        step: model or lowered program.
        text: what is predicted.
        window: start again from a zero state after this many tokens; None: only at documents.
        chunk: tokens a call; bounds memory and does not change the result.
        progress: called with the number of tokens done after every call.

    Raises:
        MqAoError: window or chunk is below 1, or the model yields NaN or Inf.
    """
    tally = _Tally()
    for inputs, targets, fresh in _chunks(text, window, chunk):
        tally.run(step, inputs, targets, fresh)
        if progress is not None:
            progress(len(inputs))
    return tally.result(text)


def bits_per_byte(step: Step, text: bytes, chunk: int = 1024, progress: Callable[[int], object] | None = None) -> float:
    """Mean cost in bits of the bytes of `text` under a byte-level model; see `evaluate`.

    Documents are separated by 0 bytes; a separator is predicted too, and the state starts again from zeros after it.
    """
    return evaluate(step, byte_text(text), chunk=chunk, progress=progress).nats / math.log(2) / len(text)


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9e` needs for the same bytes."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


@torch.no_grad()
def compare(
    reference: Step,
    other: Step,
    text: TokenText,
    *,
    window: int | None = None,
    chunk: int = 1024,
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """Evaluates two models on the same text, and how far their predictions lie apart.

    Args:
        reference: usually the float model.
        other: usually the quantized program.
        text: what is predicted.
        window: see `evaluate`.
        chunk: see `evaluate`.
        progress: see `evaluate`.

    Raises:
        MqAoError: see `evaluate`; or the vocabularies differ.
    """
    ours, theirs = _Tally(), _Tally()
    rows = []
    for inputs, targets, fresh in _chunks(text, window, chunk):
        log_p, our_costs = ours.run(reference, inputs, targets, fresh)
        log_q, their_costs = theirs.run(other, inputs, targets, fresh)
        if log_p.shape != log_q.shape:
            raise MqAoError(
                f"the models have vocabularies of {log_p.shape[-1]} and {log_q.shape[-1]} tokens: compare a "
                "model with its own quantized program."
            )
        divergence = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double()
        rows.append((our_costs, their_costs, divergence, (log_p.argmax(-1) == log_q.argmax(-1)).double()))
        if progress is not None:
            progress(len(inputs))
    tokens = TokenCosts(*map(torch.cat, zip(*rows, strict=True)))
    means = tokens.divergence.mean().item(), tokens.same.mean().item()
    return Comparison(ours.result(text), theirs.result(text), *means, tokens)


def _chunks(text: TokenText, window: int | None, chunk: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yields inputs, targets, and whether the state starts from zero."""
    for name, value in (("window", window), ("chunk", chunk)):
        if value is not None and value < 1:
            raise MqAoError(f"the {name} is {value} tokens: give at least 1.")
    for document in text.documents:
        size = window or len(document)
        for inputs, targets in zip(document[:-1].split(size), document[1:].split(size), strict=True):
            fresh = True
            for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
                yield x, y, fresh
                fresh = False
