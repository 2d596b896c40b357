"""What to quantize and how: frozen specs, one a role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from mq_ao import checks
from mq_ao.errors import MqAoError
from mq_ao.graph import Role
from mq_ao.ops.linear_packed import TOKEN_LIMITS
from mq_ao.quantizer.weights import LIMITS


class Activation(StrEnum):
    """How the input of a quantized operator is quantized."""

    NONE = "none"
    """Left in float: only the weight is quantized."""
    STATIC = "static"
    """uint8, affine, one calibrated scale and zero point for the tensor."""
    PER_TOKEN = "per_token"
    """int8 or int4, symmetric, one scale a token taken from the token itself at run time."""
    PER_GROUP = "per_group"
    """The same, with a scale for every group of a token's channels: the groups that the weights have."""


class Range(StrEnum):
    """How calibration turns observed values into a static range."""

    HISTOGRAM = "histogram"
    MIN_MAX = "min_max"
    MOVING_AVERAGE = "moving_average"


class Rounding(StrEnum):
    """How weights become integers."""

    NEAREST = "nearest"
    """To the nearest, the largest weight of a channel (or group) at the end of the range."""
    SEARCH = "search"
    """To the nearest, with the scale that gives the least squared error."""
    GPTQ = "gptq"
    """One input at a time, later ones making up for earlier errors (Frantar et al., ICLR 2023)."""
    FISHER = "fisher"
    """For the model's predictions instead of the layer's output: later inputs and later outputs make up for errors, as
    far as gradients say that these matter, and scales are fitted to the integers (Tseng et al., YAQA, 2025)."""


LEARNED_ROUNDINGS = frozenset({Rounding.GPTQ, Rounding.FISHER})
"""Those that need statistics of the float graph."""


@dataclass(frozen=True)
class RoleSpec:
    """How one role is quantized. Weights are symmetric; scan, gate and states have none.

    Attributes:
        activation: how the role's inputs are quantized.
        range: observer of a static activation.
        bits: of the weights, 8, 4 or 3.
        group_size: consecutive inputs that share a weight scale, or None for one scale an output channel. A layer whose
            inputs are no multiple of it has one scale a channel.
        rounding: how weights become integers.
        activation_bits: of the role's inputs, 8, or 4 with scales a token.

    Raises:
        MqAoError: an attribute is not as above.
    """

    activation: Activation = Activation.STATIC
    range: Range = Range.HISTOGRAM
    bits: int = 8
    group_size: int | None = None
    rounding: Rounding = Rounding.NEAREST
    activation_bits: int = 8

    def __post_init__(self) -> None:
        for name, kind in (("activation", Activation), ("range", Range), ("rounding", Rounding)):
            object.__setattr__(self, name, checks.member(getattr(self, name), name, kind))
        # Of type int: True and 8.0 equal numbers that are right, and are no widths.
        if type(self.bits) is not int or self.bits not in LIMITS:
            raise MqAoError(f"weights have 8, 4 or 3 bits, not {self.bits!r}.")
        if type(self.activation_bits) is not int or self.activation_bits not in TOKEN_LIMITS:
            raise MqAoError(f"activations have 8 or 4 bits, not {self.activation_bits!r}.")
        if self.activation_bits != 8 and self.activation not in (Activation.PER_TOKEN, Activation.PER_GROUP):
            raise MqAoError(
                f"activations of {self.activation_bits} bits need a scale a token: give activation "
                f"{Activation.PER_TOKEN} or {Activation.PER_GROUP}, not {self.activation}."
            )
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 4):
            raise MqAoError(f"a group of weights has at least 4 inputs, not {self.group_size!r}.")
        if self.activation is Activation.PER_GROUP and self.group_size is None:
            raise MqAoError(f"activation {Activation.PER_GROUP} takes the groups of the weights: give a group_size.")
        if self.group_size is not None and self.group_size % 4:
            raise MqAoError(f"a group of weights has a multiple of 4 inputs, not {self.group_size}.")

    def __str__(self) -> str:
        return f"{self.weight}, {self.input}"

    @property
    def weight(self) -> str:
        """The weights in words."""
        group = "" if self.group_size is None else f" in groups of {self.group_size}"
        rounding = "" if self.rounding is Rounding.NEAREST else f" ({self.rounding})"
        return f"int{self.bits} weight{group}{rounding}"

    @property
    def input(self) -> str:
        """The inputs in words."""
        if self.activation is Activation.NONE:
            return "float input"
        if self.activation is Activation.STATIC:
            return f"static 8-bit ({self.range}) input"
        groups = " and group" if self.activation is Activation.PER_GROUP else ""
        return f"int{self.activation_bits} per token{groups} input"


LINEAR_ROLES = (Role.IN_PROJ, Role.X_PROJ, Role.DT_PROJ, Role.OUT_PROJ, Role.LINEAR, Role.HEAD)
CACHED_ROLES = (Role.CARRIED_STATE, Role.KV_CACHE)
"""What is held from call to call."""
WEIGHTLESS_ROLES = (Role.SCAN, Role.GATE, Role.STATE, *CACHED_ROLES)

CARRIED = "static int8, one scale a channel and state (twice the largest magnitude)"
"""A carried state in words: there is nothing to choose."""


def in_words(role: Role, spec: RoleSpec) -> str:
    """What a spec says of a role."""
    if role is Role.CARRIED_STATE:
        return CARRIED
    if role is Role.KV_CACHE:
        return f"{spec.input} and head"
    return spec.input if role in WEIGHTLESS_ROLES else str(spec)


@dataclass(frozen=True)
class QuantizationConfig:
    """A spec for every role that is to be quantized; roles that are not named, or whose spec is None, stay in float.

    Attributes:
        roles: spec by role, without those that stay in float.

    Raises:
        MqAoError: an unknown role, or a spec that is none.
    """

    roles: Mapping[Role, RoleSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.roles, Mapping):
            raise MqAoError(f"the roles are {self.roles!r}: give a mapping from roles to specs.")
        parsed: dict[Role, RoleSpec] = {}
        for name, spec in self.roles.items():
            role = Role.parse(name)
            if isinstance(spec, RoleSpec):
                parsed[role] = spec
            elif spec is not None:
                raise MqAoError(f"the spec of {role} is {spec!r}: give a RoleSpec, or None to leave the role in float.")
        object.__setattr__(self, "roles", MappingProxyType(parsed))

    def __str__(self) -> str:
        return "\n".join(f"{role:<10} {in_words(role, spec)}" for role, spec in self.roles.items())

    @property
    def needs_statistics(self) -> bool:
        """Whether a quantizer has to be given statistics of the float graph."""
        return Role.CARRIED_STATE in self.roles or any(
            spec.rounding in LEARNED_ROUNDINGS for spec in self.roles.values()
        )

    def replaced(self, **roles: RoleSpec | None) -> QuantizationConfig:
        """The configuration with other specs for the named roles; None leaves a role in float."""
        changed: dict[Role, Any] = {**self.roles, **{Role.parse(name): spec for name, spec in roles.items()}}
        return QuantizationConfig(changed)


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
