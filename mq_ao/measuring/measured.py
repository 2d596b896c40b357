"""What quantization does to a model on one text, piece by piece, and the estimates that follow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy

from mq_ao.errors import MqAoError
from mq_ao.measuring.bootstrap import Array, Estimate, ratio


@dataclass(frozen=True)
class Measured:
    """Sums over every piece of a text, see `pieces`.

    Attributes:
        tokens: predicted tokens.
        reference: cost under the float model, nats.
        cost: cost under the quantized model, nats.
        divergence: KL(float || quantized), nats.
        same: tokens whose likeliest prediction is the float model's.
    """

    tokens: tuple[float, ...]
    reference: tuple[float, ...]
    cost: tuple[float, ...]
    divergence: tuple[float, ...]
    same: tuple[float, ...]

    @classmethod
    def parse(cls, content: Any) -> Measured:
        """Reads what `vars` gives, from JSON.

        Raises:
            MqAoError: it is something else.
        """
        names = [field.name for field in fields(cls)]
        columns = [content.get(name) for name in names] if isinstance(content, dict) else []
        lists = [column for column in columns if isinstance(column, list) and all(isinstance(x, float) for x in column)]
        if len(lists) != len(names) or len({len(column) for column in lists}) != 1:
            raise MqAoError(f"it does not hold {', '.join(names)}")
        return cls(*(tuple(column) for column in lists))

    @property
    def change(self) -> float:
        """Relative change of the cost; 0.01 is 1 % more than float."""
        return sum(self.cost) / sum(self.reference) - 1

    @property
    def mean_divergence(self) -> float:
        """KL(float || quantized), nats a token."""
        return sum(self.divergence) / sum(self.tokens)

    @property
    def agreement(self) -> float:
        """Share of tokens whose likeliest prediction is the float model's."""
        return sum(self.same) / sum(self.tokens)


@dataclass(frozen=True)
class Loss:
    """What a recipe loses against the float model, or against another recipe.

    Attributes:
        cost: difference of the costs, as a share of the float model's.
        divergence: KL(float || quantized), or the difference of two of them, nats a token.
    """

    cost: Estimate
    divergence: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {"cost": self.cost.to_dict(), "divergence": self.divergence.to_dict()}


def loss(draws: Sequence[Measured]) -> Loss:
    """Against the float model.

    Args:
        draws: measurements on one text, one a draw of calibration data.
    """
    _check_same_text(draws)
    cost = _columns(draws, "cost") - _columns(draws, "reference")
    return _loss(draws[0], cost, _columns(draws, "divergence"))


def difference(draws: Sequence[Measured], others: Sequence[Measured]) -> Loss:
    """Of a recipe against another one, token by token, both calibrated on the same draws; below 0 it loses less."""
    _check_same_text([*draws, *others])
    cost = _columns(draws, "cost") - _columns(others, "cost")
    return _loss(draws[0], cost, _columns(draws, "divergence") - _columns(others, "divergence"))


def _loss(first: Measured, cost: Array, divergence: Array) -> Loss:
    """From sums (pieces, draws) that are set against one of the measurements."""
    return Loss(ratio(cost, numpy.array(first.reference)), ratio(divergence, numpy.array(first.tokens)))


def _columns(draws: Sequence[Measured], name: str) -> Array:
    """One of the sums of several measurements, (pieces, draws)."""
    return numpy.array([getattr(one, name) for one in draws]).T


def _check_same_text(measured: Sequence[Measured]) -> None:
    if any(a.tokens != b.tokens or a.reference != b.reference for a, b in itertools.pairwise(measured)):
        raise MqAoError("these measurements are of different texts or float models, and cannot be paired.")
