"""What to quantize and how: frozen specs, one a role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from mq_ao.graph import Role


class Activation(StrEnum):
    """How the input of a quantized operator is quantized."""

    NONE = "none"
    """Left in float: only the weight is quantized."""
    STATIC = "static"
    """uint8, affine, one calibrated scale and zero point for the tensor."""
    PER_TOKEN = "per_token"
    """int8, symmetric, one scale a token taken from the token itself at run time."""


class Range(StrEnum):
    """How calibration turns observed values into a static range."""

    HISTOGRAM = "histogram"
    MIN_MAX = "min_max"
    MOVING_AVERAGE = "moving_average"


@dataclass(frozen=True)
class RoleSpec:
    """How one role is quantized. Weights are int8, symmetric, one scale an output channel.

    Attributes:
        activation: how the role's input is quantized.
        range: observer of a static activation.
    """

    activation: Activation = Activation.STATIC
    range: Range = Range.HISTOGRAM

    def __str__(self) -> str:
        if self.activation is Activation.NONE:
            return "int8 weight, float input"
        how = f"static uint8 ({self.range})" if self.activation is Activation.STATIC else "int8 per token"
        return f"int8 weight, {how} input"


LINEAR_ROLES = (Role.IN_PROJ, Role.X_PROJ, Role.DT_PROJ, Role.OUT_PROJ, Role.HEAD)


@dataclass(frozen=True)
class QuantizationConfig:
    """A spec for every role that is to be quantized; roles that are not named stay in float.

    Attributes:
        roles: spec by role.
    """

    roles: Mapping[Role, RoleSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parsed = {Role.parse(role): spec for role, spec in self.roles.items()}
        object.__setattr__(self, "roles", MappingProxyType(parsed))

    def __str__(self) -> str:
        return "\n".join(f"{role:<10} {spec}" for role, spec in self.roles.items())


def w8a8(activation: Activation = Activation.STATIC, range: Range = Range.HISTOGRAM) -> QuantizationConfig:
    """int8 weights and activations for every linear and the convolution, int8 weights for the embedding.

    Args:
        activation: for the linears; the convolution mixes tokens, so its input is always static.
        range: observer of the static ones.
    """
    roles = dict.fromkeys(LINEAR_ROLES, RoleSpec(activation, range))
    roles[Role.CONV1D] = RoleSpec(Activation.STATIC, range)
    roles[Role.EMBEDDING] = RoleSpec(Activation.NONE)
    return QuantizationConfig(roles)
