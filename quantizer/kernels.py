"""What the kernels of a backend take, role by role, and on which integers; each backend says it in its own package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torchao.quantization.pt2e.observer import MappingType

from mq_ao.errors import MqAoError
from mq_ao.graph import Role
from mq_ao.ops.linear_packed import TOKEN_LIMITS
from mq_ao.quantizer.specs import LEARNED_ROUNDINGS, LINEAR_ROLES, Activation, RoleSpec


@dataclass(frozen=True)
class Integers:
    """The integers of an activation.

    Attributes:
        dtype: what holds them.
        low: smallest one.
        high: largest one.
        mapping: whether 0 is in their middle.
    """

    dtype: torch.dtype
    low: int
    high: int
    mapping: MappingType

    @property
    def limits(self) -> tuple[int, int, torch.dtype]:
        """As the q/dq operators take it."""
        return self.low, self.high, self.dtype


UINT8 = Integers(torch.uint8, 0, 255, MappingType.ASYMMETRIC)
INT8 = Integers(torch.int8, -128, 127, MappingType.ASYMMETRIC)
SYMMETRIC_INT8 = Integers(torch.int8, *TOKEN_LIMITS[8], MappingType.SYMMETRIC)
SYMMETRIC_INT4 = Integers(torch.int8, *TOKEN_LIMITS[4], MappingType.SYMMETRIC)


@dataclass(frozen=True)
class Kernels:
    """What a backend's kernels take.

    Attributes:
        backend: name of the backend.
        roles: activations that it has an integer kernel for, by role.
        static: integers of a static activation.
        per_token: integers of a per-token activation, by bits.
        integer_outputs: whether linears with static inputs can only write static integers, so that their outputs
            are quantized even where nothing that reads them asks for it.
        weight_bits: widths of weights that it takes.
        group_multiple: what the size of a group of weights must be a multiple of.
        groups: the sizes of groups that it takes; None: all.
        group_scale: dtype in which it keeps the scales of groups.
        experts: activations that it has a kernel for where each row has a weight of its own; None: its programs cannot
            hold such layers in float either.
    """

    backend: str
    roles: Mapping[Role, frozenset[Activation]]
    static: Integers = UINT8
    per_token: Mapping[int, Integers] = field(default_factory=lambda: {8: SYMMETRIC_INT8})
    integer_outputs: bool = False
    weight_bits: frozenset[int] = frozenset({8, 4, 3})
    group_multiple: int = 4
    groups: frozenset[int] | None = None
    group_scale: torch.dtype = torch.float32
    experts: frozenset[Activation] | None = frozenset()


def check_executable(kernels: Kernels, role: Role, spec: RoleSpec) -> None:
    """Checks that a backend runs `role` as `spec` says.

    Raises:
        MqAoError: it does not; the message says what it can do.
    """
    able = kernels.roles.get(role, frozenset())
    if spec.activation not in able:
        known = " or ".join(sorted(activation.value for activation in able)) or "nothing"
        raise MqAoError(
            f"backend {kernels.backend!r} has no integer kernel for {role} with activation {spec.activation}: "
            f"choose {known}, or leave the role out."
        )
    if spec.activation_bits not in kernels.per_token:
        raise MqAoError(
            f"backend {kernels.backend!r} has no kernel for {role} with {spec.input}: it takes tokens of 8 bits. "
            "Backends native and inductor run those of 4 bits, which shows what they cost in accuracy."
        )
    if role is Role.KV_CACHE and spec.activation_bits != 8:
        raise MqAoError("keys and values are held in 8 bits: leave activation_bits out.")
    if spec.bits not in kernels.weight_bits:
        known = " or ".join(map(str, sorted(kernels.weight_bits, reverse=True)))
        raise MqAoError(
            f"backend {kernels.backend!r} has no kernel for {role} with {spec.weight}: it takes {known} bits."
        )
    if role not in LINEAR_ROLES and (spec.bits != 8 or spec.group_size is not None):
        raise MqAoError(
            f"backend {kernels.backend!r} has no kernel for {role} with {spec.weight}: it takes int8, per channel."
        )
    if role not in LINEAR_ROLES and spec.rounding in LEARNED_ROUNDINGS:
        raise MqAoError(f"rounding {spec.rounding} is for linears; {role} is none: choose nearest or search.")
    if spec.group_size is not None and spec.group_size % kernels.group_multiple:
        raise MqAoError(
            f"backend {kernels.backend!r} takes groups of a multiple of {kernels.group_multiple} weights, not "
            f"{spec.group_size}: choose one, or None for one scale a channel."
        )
    if spec.group_size is not None and kernels.groups is not None and spec.group_size not in kernels.groups:
        raise MqAoError(
            f"backend {kernels.backend!r} takes groups of {', '.join(map(str, sorted(kernels.groups)))} weights, not "
            f"{spec.group_size}: choose one, or None for one scale a channel."
        )
