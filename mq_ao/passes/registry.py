"""The passes by name, and their written form in recipe files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from types import MappingProxyType
from typing import Any

from mq_ao.errors import MqAoError
from mq_ao.passes.base import Pass
from mq_ao.passes.expose_state import ExposeState
from mq_ao.passes.fold_norm import FoldNorm
from mq_ao.passes.plant_outliers import PlantOutliers
from mq_ao.passes.rotate_dt import RotateDt
from mq_ao.passes.rotate_out_proj import RotateOutProj
from mq_ao.passes.rotate_residual import RotateResidual
from mq_ao.passes.rotate_state import RotateState
from mq_ao.passes.shift_dt import ShiftDt
from mq_ao.passes.smooth_conv import SmoothConv
from mq_ao.passes.smooth_dt import SmoothDt
from mq_ao.passes.smooth_gate import SmoothGate
from mq_ao.passes.smooth_norm import SmoothNorm
from mq_ao.passes.smooth_state import SmoothState

PASSES: Mapping[str, type[Pass]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            FoldNorm,
            SmoothNorm,
            SmoothGate,
            SmoothState,
            SmoothDt,
            SmoothConv,
            ShiftDt,
            RotateResidual,
            RotateDt,
            RotateOutProj,
            ExposeState,
            RotateState,
            PlantOutliers,
        )
    }
)
"""Rewrites by name, in the order in which they make sense."""


def parse_pass(written: Any) -> Pass:
    """A pass from its written form: its name, or `{name: {option: value}}`.

    Raises:
        MqAoError: an unknown name or option, or a value that the option does not take.
    """
    if isinstance(written, Pass):
        return written
    name, options = written, None
    if isinstance(written, Mapping) and len(written) == 1:
        ((name, options),) = written.items()
    if not isinstance(name, str) or name not in PASSES:
        raise MqAoError(f"unknown pass {name!r}: the passes are {', '.join(PASSES)}.")
    kind = PASSES[name]
    known = sorted(field.name for field in fields(kind))
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise MqAoError(f"the options of pass {name} are {options!r}: give a mapping from {_listed(known)} to values.")
    unknown = sorted({str(option) for option in options} - set(known))
    if unknown:
        raise MqAoError(f"pass {name} has no option {', '.join(unknown)}: it has {_listed(known)}.")
    return kind(**options)


def write_pass(of: Pass) -> str | dict[str, dict[str, Any]]:
    """The written form of a pass; options that have their default are left out."""
    default = type(of)()
    options = {
        field.name: _plain(getattr(of, field.name))
        for field in fields(of)
        if getattr(of, field.name) != getattr(default, field.name)
    }
    return {of.name: options} if options else of.name


def _listed(options: list[str]) -> str:
    return ", ".join(options) or "none"


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
