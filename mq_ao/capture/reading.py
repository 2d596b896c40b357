"""How the parameters of a function are read as the operands of a selective scan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from mq_ao.capture import scans
from mq_ao.capture.frames import NAMES, find
from mq_ao.errors import MqAoError

AUTO = "auto"
CHANNEL_LAST, CHANNEL_FIRST = "channel_last", "channel_first"
OPERANDS = ("x", "dt", "A", "A_log", "B", "C", "D", "z", "dt_bias", "initial_state")
_NEEDED = ("x", "dt", "B", "C")
_SELF = "self."


@dataclass(frozen=True)
class SelectiveScan:
    """Which parameters of a function are the operands of Mamba-1's scan, for `mq_ao.export(..., scans=...)`.

    A tensor is named by its parameter, "delta", or, where a method reads it from its module, by "self.A_log". "auto"
    is what a parameter of a usual name (x, u; dt, delta; A, A_log; D; z; delta_bias; ...) says, or self.A_log and
    self.D; what remains open, such as whether there is a softplus inside, is tried out. None is for what the function
    does not compute.

    Attributes:
        x: input of the scan, (batch, length, channels).
        dt: step sizes, like x.
        A: (channels, d_state), negative.
        A_log: instead of A: the scan computes with -exp(A_log).
        B: (batch, length, d_state), or (batch, length, groups, d_state).
        C: like B.
        D: (channels,), if D x is added inside.
        z: like x, if y is multiplied by SiLU(z) inside.
        dt_bias: (channels,), if it is added to dt inside.
        initial_state: (batch, channels, d_state).
        dt_softplus: whether dt goes through a softplus inside, or the parameter that says so.
        layout: "channel_last" as above, or "channel_first": x, dt, z and y are (batch, channels, length).
        BC_layout: "channel_last" as above, or "channel_first": B and C are (batch, [groups,] d_state, length).
        last_state: whether (y, last state) is returned and not y alone, or the parameter that says so.
    """

    x: str = AUTO
    dt: str = AUTO
    A: str | None = AUTO
    A_log: str | None = AUTO
    B: str = AUTO
    C: str = AUTO
    D: str | None = AUTO
    z: str | None = AUTO
    dt_bias: str | None = AUTO
    initial_state: str | None = AUTO
    dt_softplus: bool | str = AUTO
    layout: str = AUTO
    BC_layout: str = AUTO
    last_state: bool | str = AUTO

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            flag, optional = (
                item.name in ("dt_softplus", "last_state"),
                item.name in OPERANDS and item.name not in _NEEDED,
            )
            if not (
                (isinstance(value, str) and value) or (flag and isinstance(value, bool)) or (optional and value is None)
            ):
                raise MqAoError(f"SelectiveScan: {item.name} is {value!r}: give the name of a parameter.")
        for name in ("layout", "BC_layout"):
            if getattr(self, name) not in (AUTO, CHANNEL_LAST, CHANNEL_FIRST):
                raise MqAoError(
                    f"SelectiveScan: {name} is {getattr(self, name)!r}: it is {CHANNEL_LAST!r} or {CHANNEL_FIRST!r}."
                )
        named = [name for name in (self.A, self.A_log) if name not in (AUTO, None)]
        if len(named) == 2 or (self.A is None and self.A_log is None):
            raise MqAoError("SelectiveScan: give one of A and A_log.")

    def __str__(self) -> str:
        """What was given, as code."""
        given = [(item.name, getattr(self, item.name)) for item in fields(self)]
        return f"SelectiveScan({', '.join(f'{name}={value!r}' for name, value in given if value != AUTO)})"

    def operand(self, name: str, values: Mapping[str, Any], owner: Any) -> Any:
        """The value of an operand in a call: of a parameter, of the module, or None."""
        source = getattr(self, name)
        return None if source is None else value_of(source, values, owner)

    def compute(self, values: Mapping[str, Any], owner: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Our scan, of a call's arguments by name; all fields are known.

        Raises:
            MqAoError: the operands are not those of a scan.
        """
        x, dt, A, A_log, B, C, D, z, dt_bias, initial = (self.operand(name, values, owner) for name in OPERANDS)
        if self.layout == CHANNEL_FIRST:
            x, dt = x.transpose(1, 2), dt.transpose(1, 2)
            z = None if z is None else z.transpose(1, 2)
        if self.BC_layout == CHANNEL_FIRST:
            B, C = scans.channel_last(B), scans.channel_last(C)
        A = A if A_log is None else -torch.exp(A_log)
        softplus, returned = (
            bool(values[flag]) if isinstance(flag, str) else flag for flag in (self.dt_softplus, self.last_state)
        )
        y, last = scans.selective_scan(x, dt, A, B, C, D, z, dt_bias, softplus, initial)
        y = y.transpose(1, 2) if self.layout == CHANNEL_FIRST else y
        return (y, last) if returned else y


def value_of(source: str, values: Mapping[str, Any], owner: Any) -> Any:
    """What a name stands for in a call.

    Raises:
        MqAoError: neither the function nor its module has it.
    """
    if not source.startswith(_SELF):
        if source not in values:
            raise MqAoError(f"it has no parameter {source!r}, only {', '.join(values) or 'none'}.")
        return values[source]
    value: Any = owner
    for name in source.removeprefix(_SELF).split("."):
        if not hasattr(value, name):
            raise MqAoError(f"there is no {source}: {'it is no method' if owner is None else type(owner).__name__}.")
        value = getattr(value, name)
    return value


def readings(given: SelectiveScan, values: Mapping[str, Any], owner: Any, result: Any) -> list[SelectiveScan]:
    """What a function may compute, by the names and shapes of a call: the likeliest first, with all fields known.

    Raises:
        MqAoError: an operand is missing, is no operand of a scan, or is named by several parameters.
    """
    options: dict[str, list[Any]] = {name: _sources(given, name, values, owner) for name in OPERANDS}
    for name in _NEEDED:
        if not options[name]:
            raise MqAoError(f"none of its parameters ({', '.join(values)}) is named like {name}: give {name}=.")
    forms = [(form, None) for form in options.pop("A") if form] + [
        (None, form) for form in options.pop("A_log") if form
    ]
    if not forms:
        raise MqAoError(f"none of its parameters ({', '.join(values)}) is named like A: give A= or A_log=.")
    options["dt_softplus"] = _flags(given.dt_softplus, "dt_softplus", values, [False, True])
    options["last_state"] = _flags(given.last_state, "last_state", values, [isinstance(result, tuple | list)])
    for name in ("x", "dt", "B", "C"):
        _check_axes(name, value_of(options[name][0], values, owner), (3, 4) if name in "BC" else (3,))
    A = value_of(forms[0][0] or forms[0][1], values, owner)
    _check_axes("A", A, (2,))
    channels, d_state = A.shape
    x = value_of(options["x"][0], values, owner)
    if min(x.shape[1:]) < 2:
        raise MqAoError(
            f"its x is {tuple(x.shape)}: a scan of one step does not show what it computes, give two or more."
        )
    options["layout"] = _layouts(given.layout, x.shape, channels)
    options["BC_layout"] = _layouts(given.BC_layout, value_of(options["B"][0], values, owner).shape, d_state)
    chosen = (dict(zip(options, values, strict=True)) for values in product(*options.values()))
    return [SelectiveScan(A=A, A_log=A_log, **rest) for rest in chosen for A, A_log in forms]


def _sources(given: SelectiveScan, operand: str, values: Mapping[str, Any], owner: Any) -> list[str | None]:
    """What an operand may be: the name that was given, or what has a usual one."""
    source = getattr(given, operand)
    if source != AUTO:
        if source is not None:
            value_of(source, values, owner)
        return [source]
    if operand in _OTHER and getattr(given, _OTHER[operand]) not in (AUTO, None):
        return []
    found: list[str | None] = [*find(operand, values)]
    if len(found) > 1:
        raise MqAoError(f"the parameters {', '.join(map(str, found))} are all named like {operand}: give {operand}=.")
    if found or operand in _NEEDED:
        return found
    own: list[str | None] = [f"{_SELF}{path}" for path in _ATTRIBUTES.get(operand, ()) if _has(owner, path)]
    if operand in _OTHER:
        return [] if find(_OTHER[operand], values) else own
    return [*own, None] if operand == "D" else [None, *own]


_OTHER = {"A": "A_log", "A_log": "A"}
_ATTRIBUTES = {"A": ("A",), "A_log": ("A_log",), "D": ("D",), "dt_bias": ("dt_bias", "dt_proj.bias")}
"""Where a method finds an operand in its module that it is not given."""


def _has(owner: Any, path: str) -> bool:
    value: Any = owner
    for name in path.split("."):
        value = getattr(value, name, None)
    return isinstance(value, Tensor)


def _flags(value: bool | str, name: str, values: Mapping[str, Any], default: list[bool]) -> list[bool] | list[str]:
    """What a flag may be: as given, what the parameter of that name says, or to be tried."""
    found = find(name, values) if value == AUTO else [value]
    if found and isinstance(found[0], str):
        value_of(found[0], values, None)
    # All of one kind: a name alone, or flags. mypy sees a list of both.
    return found or default  # type: ignore[return-value]


def _check_axes(name: str, value: Any, allowed: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.dim() not in allowed:
        shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise MqAoError(f"its {name} is {shape}: a tensor of {' or '.join(map(str, allowed))} axes was expected.")


def _layouts(given: str, shape: torch.Size, last: int) -> list[str]:
    """How axes may be ordered of which the last is of this size, channel-last, and the one before it otherwise."""
    if given != AUTO:
        return [given]
    fitting = [name for name, axis in ((CHANNEL_LAST, -1), (CHANNEL_FIRST, -2)) if shape[axis] == last]
    if not fitting:
        raise MqAoError(f"one of its operands is of shape {tuple(shape)}, with no axis of {last}, of which A has.")
    return fitting


def alternatives(reading: SelectiveScan) -> Iterator[SelectiveScan]:
    """Readings that differ in one thing that is often mistaken, then those that differ in two."""
    changes: list[dict[str, Any]] = [
        {"A": reading.A_log, "A_log": reading.A},
        {"B": reading.C, "C": reading.B},
        {"x": reading.dt, "dt": reading.x},
    ]
    if isinstance(reading.dt_softplus, bool):
        changes.append({"dt_softplus": not reading.dt_softplus})
    for name in ("layout", "BC_layout"):
        changes.append({name: CHANNEL_LAST if getattr(reading, name) == CHANNEL_FIRST else CHANNEL_FIRST})
    for name in ("D", "z", "dt_bias"):
        sources = [*NAMES[name], *(f"{_SELF}{path}" for path in _ATTRIBUTES.get(name, ())), None]
        changes += [{name: source} for source in sources if source != getattr(reading, name)]
    for count in (1, 2):
        for chosen in combinations(changes, count):
            yield replace(reading, **{name: value for change in chosen for name, value in change.items()})
