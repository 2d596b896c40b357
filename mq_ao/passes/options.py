"""What options of passes may be. They are checked where a pass is made, from Python and from files alike."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, get_args, get_origin

from mq_ao import checks


@dataclass(frozen=True)
class Within:
    """A range of numbers, both ends included; an option's type is annotated with it."""

    low: float
    high: float


Share = Annotated[float, Within(0, 1)]
"""A part of a whole."""


def checked(value: object, hint: Any, what: str) -> Any:
    """The value of an option, as its type says: a member of an enumeration for its name, a float for a whole number.

    Raises:
        MqAoError: the option does not take it.
    """
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return checks.member(value, what, hint)
    if get_origin(hint) is not Annotated:
        return value
    kind, within = get_args(hint)
    return (checks.whole if kind is int else checks.number)(value, what, within.low, within.high)
