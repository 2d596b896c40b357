"""Reading a config.json, whichever way its library writes numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mq_ao.errors import MqAoError

_TAG = "__float__"
"""transformers writes what JSON has no number for as an object with this key: `{"__float__": "Infinity"}`."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        MqAoError: the file is missing or broken.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MqAoError(
            f"{path.parent} has no config.json: give the folder of a transformers, mamba_ssm or mq_ao Mamba model."
        ) from None
    except (OSError, ValueError) as error:
        raise MqAoError(f"{path} cannot be read as JSON ({error}): fetch it again.") from error
    if not isinstance(values, dict):
        raise MqAoError(f"{path} is not a JSON object: give the folder of a Mamba model.")
    return values


def number(value: object, name: str) -> float:
    """A number as libraries write it: bare, as a string, or tagged by transformers; it may be infinite.

    Raises:
        MqAoError: it is none, or NaN; `name` says which option it is.
    """
    given = value[_TAG] if isinstance(value, dict) and value.keys() == {_TAG} else value
    if isinstance(given, int | float | str) and not isinstance(given, bool):
        try:
            found = float(given)
        except ValueError:
            found = math.nan
        if not math.isnan(found):
            return found
    raise MqAoError(f"{name} is {value!r}: give a number.")


def limits(value: object, name: str) -> tuple[float, float | None]:
    """The smallest and the largest value of an option, the latter None where there is no limit.

    Args:
        value: `[smallest, largest]`, each of which may be None or infinite for no limit; or no limit at all, as None or
            infinity.
        name: of the option.

    Raises:
        MqAoError: it is nothing of that.
    """
    pair: Any = value if isinstance(value, list | tuple) else [None, value]
    if len(pair) == 2:
        low = 0.0 if pair[0] is None else number(pair[0], name)
        high = math.inf if pair[1] is None else number(pair[1], name)
        if pair is value or high == math.inf:
            return low, None if high == math.inf else high
    raise MqAoError(f"{name} is {value!r}: give a smallest and a largest number.")
