"""Values that users give: numbers in a range, whole numbers, members of an enumeration."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TypeVar

from mq_ao.errors import MqAoError

Kind = TypeVar("Kind", bound=StrEnum)


def number(value: object, what: str, low: float, high: float) -> float:
    """`value` as a float; `what` is what messages call it.

    Raises:
        MqAoError: it is not a number from `low` to `high`. NaN is none, nor is True.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    raise MqAoError(f"{what} is {value!r}: it is a number from {low:g} to {high:g}.")


def whole(value: object, what: str, low: int, high: float = math.inf) -> int:
    """`value` as an int.

    Raises:
        MqAoError: it is not a whole number from `low` to `high`. 8.0 is none, nor is True.
    """
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    raise MqAoError(f"{what} is {value!r}: it is a whole number {limits}.")


def member(value: object, what: str, kind: type[Kind]) -> Kind:
    """`value`, or what it is the name of, as a member of `kind`.

    Raises:
        MqAoError: it is none; the message lists those.
    """
    if isinstance(value, str) and value in list(kind):
        return kind(value)
    raise MqAoError(f"{what} is {value!r}: it is one of {', '.join(kind)}.")
