"""What each backend can execute, role by role."""

from __future__ import annotations

from collections.abc import Mapping

from mq_ao.errors import MqAoError
from mq_ao.graph import Role
from mq_ao.quantizer.specs import LINEAR_ROLES, Activation, RoleSpec, Rounding

_INDUCTOR = {
    **dict.fromkeys(LINEAR_ROLES, frozenset(Activation)),
    Role.CONV1D: frozenset({Activation.STATIC}),
    Role.EMBEDDING: frozenset({Activation.NONE}),
    Role.SCAN: frozenset({Activation.STATIC}),
    Role.GATE: frozenset({Activation.STATIC}),
    # In reference arithmetic: the lowering names what it simulates.
    Role.STATE: frozenset({Activation.STATIC}),
    Role.CARRIED_STATE: frozenset({Activation.STATIC}),
}

BACKENDS: Mapping[str, Mapping[Role, frozenset[Activation]]] = {"inductor": _INDUCTOR}
"""Backend -> role -> activations that it has an integer kernel for."""


def check_backend(backend: str) -> str:
    """Returns `backend`.

    Raises:
        MqAoError: it is not one of ours; the message lists those.
    """
    if backend not in BACKENDS:
        raise MqAoError(f"unknown backend {backend!r}: the backends are {', '.join(BACKENDS)}.")
    return backend


def check_executable(backend: str, role: Role, spec: RoleSpec) -> None:
    """Checks that `backend` runs `role` as `spec` says.

    Raises:
        MqAoError: it does not; the message says what it can do.
    """
    able = BACKENDS[backend].get(role, frozenset())
    if spec.activation not in able:
        known = " or ".join(sorted(activation.value for activation in able)) or "nothing"
        raise MqAoError(
            f"backend {backend!r} has no integer kernel for {role} with activation {spec.activation}: "
            f"choose {known}, or leave the role out."
        )
    if role not in LINEAR_ROLES and (spec.bits != 8 or spec.group_size is not None):
        raise MqAoError(f"backend {backend!r} has no kernel for {role} with {spec.weight}: it takes int8, per channel.")
    if role not in LINEAR_ROLES and spec.rounding is Rounding.GPTQ:
        raise MqAoError(f"GPTQ is for linears; {role} is none: choose nearest or search.")
