"""How well a quantized classifier keeps up with its float model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

BATCH = 64
"""Inputs that are classified at a time."""


@dataclass(frozen=True)
class Comparison:
    """What a quantized classifier keeps of the float one.

    Attributes:
        correct: inputs classified right, of `count`.
        count: number of inputs.
        agreement: share of inputs with the same class as in float.
        divergence: mean KL(float || quantized) in nats.
    """

    correct: int
    count: int
    agreement: float
    divergence: float

    @property
    def accuracy(self) -> float:
        """Share of inputs classified right."""
        return self.correct / self.count


@torch.no_grad()
def log_probabilities(
    model: Callable[[Tensor], Tensor], inputs: Tensor, advance: Callable[[int], object] = lambda _: None
) -> Tensor:
    """log p (inputs, classes) of a classifier, computed batch by batch.

    Args:
        model: (batch, ...) -> logits (batch, classes).
        inputs: (inputs, ...).
        advance: told how many inputs a batch had, after it.
    """

    def batches() -> Iterator[Tensor]:
        for batch in inputs.split(BATCH):
            yield functional.log_softmax(model(batch), dim=-1)
            advance(len(batch))

    return torch.cat(list(batches()))


def compare(log_q: Tensor, reference: Tensor, labels: Tensor) -> Comparison:
    """Sets log p of a quantized classifier against those of the float one, both (inputs, classes)."""
    classes = log_q.argmax(-1)
    divergence = functional.kl_div(log_q.double(), reference.double(), reduction="batchmean", log_target=True)
    return Comparison(
        correct=int((classes == labels).sum()),
        count=len(labels),
        agreement=float((classes == reference.argmax(-1)).double().mean()),
        divergence=float(divergence),
    )
