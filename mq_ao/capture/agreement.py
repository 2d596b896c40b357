"""Compares a function of the user's with our scan, on the model's own values and on random ones."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mq_ao.capture import frames
from mq_ao.capture.reading import CHANNEL_LAST, OPERANDS, SelectiveScan, alternatives, readings, value_of
from mq_ao.errors import MqAoError

TOLERANCE = 1e-4
"""Largest difference, of the largest value, between two float32 programs for one scan."""
_HALF = 2e-2
"""The same where the user's function computes in bfloat16 or float16."""
_RANDOM, _OWN, _LATER = "random inputs", "the model's own inputs", "the model's own inputs of another call"


@dataclass(frozen=True)
class Call:
    """A call of the user's function.

    Attributes:
        owner: module, or other object, whose method it is, or None.
        values: arguments by the names of the parameters.
        function: calls it again, with other values.
    """

    owner: Any
    values: Mapping[str, Any]
    function: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class _Sample:
    """Arguments and attributes, with what the user's function makes of them."""

    source: str
    values: Mapping[str, Any]
    attributes: Mapping[str, Tensor]
    result: Any
    owner: Any

    def difference(self, reading: SelectiveScan) -> tuple[float, str]:
        """The largest difference relative to the largest value, and of which output."""
        with _attributes(self.owner, self.attributes):
            ours = reading.compute(self.values, self.owner)
        return _difference(ours, self.result)

    @property
    def tolerance(self) -> float:
        wide = all(torch.finfo(x.dtype).bits >= 32 for x in frames.tensors(self.result) if x.is_floating_point())
        return TOLERANCE if wide or self.source == _RANDOM else _HALF


def reading_of(label: str, given: SelectiveScan, call: Call, result: Any) -> SelectiveScan:
    """What a function computes, of what is given or left open about it.

    Args:
        label: how errors call the function.
        given: what the user says.
        call: the first call.
        result: what the function made of it.

    Raises:
        MqAoError: it takes other operands, or computes something else; with the difference.
    """
    try:
        candidates = readings(given, call.values, call.owner, result)
    except MqAoError as error:
        raise MqAoError(f"{label}: {_discretised(call) or error}") from error
    random = _random(label, candidates, call)
    own = _Sample(_OWN, call.values, {}, result, call.owner)
    failures = []
    for reading in candidates:
        failure = _failure(label, given, reading, random) or _failure(label, given, reading, own)
        if failure is None:
            return reading
        failures.append((failure, reading))
    # The likeliest reading, or one that only loses accuracy.
    failure, reading = next(((text, item) for text, item in failures if _ACCURACY in text), failures[0])
    raise MqAoError(failure if _ACCURACY in failure else f"{failure} {_hint(reading, random)}")


def check(label: str, reading: SelectiveScan, call: Call, result: Any) -> None:
    """Compares what a function made of the model's own values, at a later call, with what our scan does.

    Raises:
        MqAoError: they differ.
    """
    failure = _failure(label, reading, reading, _Sample(_LATER, call.values, {}, result, call.owner))
    if failure is not None:
        raise MqAoError(failure)


def _failure(label: str, given: SelectiveScan, reading: SelectiveScan, sample: _Sample) -> str | None:
    """Why a reading does not agree with a sample, or None."""
    try:
        difference, output = sample.difference(reading)
    except (MqAoError, RuntimeError, IndexError) as error:
        return f"{label} is not the scan that {given} says: {str(error).strip().splitlines()[0]}"
    if difference <= sample.tolerance:
        return None
    text = (
        f"{label} and our scan differ on {sample.source}: {output} by {difference:.2g} of its largest value, where "
        f"{sample.tolerance:g} is allowed."
    )
    return text + _MORE.get(sample.source, "")


_ACCURACY = (
    " On random ones they agree: a function that divides by decays, as cumulative sums do, loses accuracy with the "
    "length."
)


_MORE = {
    _OWN: _ACCURACY,
    _LATER: " At the first call they agreed: does the function compute something else for other options?",
}


def _difference(ours: Any, theirs: Any) -> tuple[float, str]:
    wanted = list(theirs) if isinstance(theirs, tuple | list) else [theirs]
    got = list(ours) if isinstance(ours, tuple) else [ours]
    if len(wanted) != len(got):
        raise MqAoError(f"it returns {len(wanted)} values, where {' and '.join(_OUTPUTS[: len(got)])} were expected.")
    worst = (0.0, _OUTPUTS[0])
    for output, a, b in zip(_OUTPUTS, got, wanted, strict=False):
        if not isinstance(b, Tensor) or a.shape != b.shape:
            shape = tuple(b.shape) if isinstance(b, Tensor) else type(b).__name__
            raise MqAoError(f"its {output} is {shape}, and ours {tuple(a.shape)}.")
        difference = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        worst = max(worst, (math.inf if math.isnan(difference) else difference, output))
    return worst


_OUTPUTS = ("y", "last state")


def _hint(reading: SelectiveScan, sample: _Sample) -> str:
    """The other reading that agrees, if there is one."""
    for other in alternatives(reading):
        try:
            agrees = sample.difference(other)[0] <= sample.tolerance
        except (MqAoError, RuntimeError, IndexError):
            continue
        if agrees:
            changed = [item.name for item in fields(other) if getattr(other, item.name) != getattr(reading, item.name)]
            says = ", ".join(f"{name}={getattr(other, name)!r}" for name in changed)
            causes = dict.fromkeys(_CAUSES[name][getattr(other, name) in _NOT] for name in changed if name != "A")
            return f"They agree with {says}: {', and '.join(causes)}."
    unread = _unread(reading, sample.values)
    ignored = f" Its parameters {', '.join(unread)} are no operands of the scan." if unread else ""
    return f"No other way to read its parameters agrees either: does it discretise in another way?{ignored}"


_NOT = (None, False, CHANNEL_LAST)
_CAUSES = {
    **dict.fromkeys(("x", "dt"), ("x and dt are the other way round",)),
    **dict.fromkeys(("B", "C"), ("B and C are the other way round",)),
    "A_log": ("A is given as its logarithm", "A is given as it is"),
    "D": ("D x is added inside", "D x is added outside, if at all"),
    "z": ("the gate is inside", "the gate is outside, if there is one"),
    "dt_bias": ("the bias of dt is added inside", "the bias of dt is added outside, if there is one"),
    "dt_softplus": ("the softplus is inside", "the softplus is outside, if there is one"),
    "layout": ("channels come before the length", "channels are the last axis"),
    "BC_layout": ("d_state comes before the length", "d_state is the last axis"),
}
"""What is mistaken, by the field that has to change: if it is given, and if it is not."""


def _unread(reading: SelectiveScan, values: Mapping[str, Any]) -> list[str]:
    """The tensors of a call that a reading does not use."""
    read = {getattr(reading, name) for name in OPERANDS}
    return [name for name, value in values.items() if isinstance(value, Tensor) and name not in read]


def _discretised(call: Call) -> str | None:
    """What to say of a function such as `pscan(A, X)`, whose operands no longer hold those of the scan."""
    wide = [tuple(x.shape) for x in frames.tensors(call.values) if x.dim() > 3]
    if not wide or any(_axes(call.values[name]) == 3 for name in frames.find("x", call.values)):
        return None
    around = (frame for frame in frames.own_frames(sys._getframe()) if frames.looks_like_scan(frame))
    scan = next(around, None)
    return (
        f"its operands, such as one of {wide[0]}, are not those of Mamba-1's scan. If they are discretised, exp(dt A) "
        "and dt B x, then dt, A and B cannot be had back: name the function around it that takes x, dt, A, B and C"
        f"{f', which is {frames.key_of(scan)!r}' if scan is not None else ''}."
    )


def _axes(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


def _random(label: str, candidates: list[SelectiveScan], call: Call) -> _Sample:
    """Random arguments of the call's shapes, and attributes of the module, for all candidates."""
    generator = torch.Generator().manual_seed(0)
    roles = {getattr(reading, name): name for reading in candidates for name in OPERANDS}
    values, attributes = dict(call.values), {}
    for name, value in call.values.items():
        if isinstance(value, Tensor):
            values[name] = _drawn(roles.get(name), value, generator)
    for source, role in roles.items():
        if source is not None and source not in values:
            value = value_of(source, values, call.owner)
            if isinstance(value, nn.Parameter) and isinstance(call.owner, nn.Module):
                attributes[source] = _drawn(role, value, generator)
    try:
        with _attributes(call.owner, attributes):
            result = call.function(values)
    except Exception as error:
        raise MqAoError(f"{label} does not run on random inputs of the shapes that it is given: {error}") from error
    return _Sample(_RANDOM, values, attributes, result, call.owner)


def _drawn(role: str | None, like: Tensor, generator: torch.Generator) -> Tensor:
    """Values that keep a scan stable however they are read: steps are positive, A is negative."""
    if not like.is_floating_point():
        return torch.randint(0, 2, like.shape, generator=generator).to(like.device, like.dtype)
    uniform = torch.rand(like.shape, generator=generator) * 0.3 + 0.01
    value = {"dt": uniform, "dt_bias": uniform, "A": -uniform * 4, "A_log": -uniform * 4}.get(role or "")
    if value is None:
        value = torch.randn(like.shape, generator=generator)
    return value.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)


@contextmanager
def _attributes(owner: Any, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives a module these parameters, such as "self.A_log", for a while."""
    before: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None]] = []
    try:
        for source, value in values.items():
            path, _, name = source.removeprefix("self.").rpartition(".")
            parameters = owner.get_submodule(path)._parameters
            before.append((parameters, name, parameters[name]))
            parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for parameters, name, parameter in before:
            parameters[name] = parameter
