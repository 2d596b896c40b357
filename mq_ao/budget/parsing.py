"""Budgets as users write them: `size<=0.20`, `loss<=0.5%`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from mq_ao.errors import MqAoError

_FORM = re.compile(r"\s*(\w+)\s*<=\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*")


class Quantity(StrEnum):
    """What a budget limits."""

    SIZE = "size"
    """Bytes of the program's weights, as a share of those of the float32 model."""
    LOSS = "loss"
    """Relative increase of the cost of a text, in nats, over that of the float model."""


@dataclass(frozen=True)
class Budget:
    """A limit that quantization is to keep.

    Attributes:
        quantity: what is limited.
        limit: as a share, above 0; a size is below 1.
    """

    quantity: Quantity
    limit: float

    def __str__(self) -> str:
        return f"{self.quantity}<={self.limit:g}"


def parse_budget(text: str) -> Budget:
    """Reads a budget such as "size<=0.20", "size<=20%" or "loss<=0.5%".

    Raises:
        MqAoError: it is none, or its limit allows nothing or everything.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise MqAoError(f'the budget is {text!r}: write a limit such as "size<=0.20" or "loss<=0.5%".')
    name, number, percent = found.groups()
    if name == "latency":
        raise MqAoError(
            "there are no budgets of latency, since times of single layers do not add up to that of a program: limit "
            "size, which decoding follows where weights are read from memory, and time the result with mq-ao bench."
        )
    if name not in list(Quantity):
        raise MqAoError(f"the budget {text!r} limits {name}: limit {' or '.join(Quantity)}.")
    limit = float(number) / (100 if percent else 1)
    if limit <= 0:
        raise MqAoError(f"the budget {text!r} allows nothing: give a limit above 0.")
    if name == Quantity.SIZE and limit >= 1:
        raise MqAoError(f"the budget {text!r} allows the float model: give a share of its size, such as 0.2 or 20%.")
    return Budget(Quantity(name), limit)
