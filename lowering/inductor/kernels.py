"""What the kernels for this machine's CPU take."""

from __future__ import annotations

from mq_ao.graph import Role
from mq_ao.quantizer.kernels import SYMMETRIC_INT4, SYMMETRIC_INT8, Kernels
from mq_ao.quantizer.specs import LINEAR_ROLES, Activation

ROLES = {
    **dict.fromkeys(LINEAR_ROLES, frozenset(Activation)),
    Role.CONV1D: frozenset({Activation.STATIC}),
    Role.EMBEDDING: frozenset({Activation.NONE}),
    Role.SCAN: frozenset({Activation.STATIC}),
    Role.GATE: frozenset({Activation.STATIC}),
    # In reference arithmetic: the lowering names what it simulates.
    Role.STATE: frozenset({Activation.STATIC}),
    Role.CARRIED_STATE: frozenset({Activation.STATIC}),
}
KERNELS = Kernels(
    "inductor",
    {**ROLES, Role.KV_CACHE: frozenset({Activation.PER_TOKEN})},
    per_token={8: SYMMETRIC_INT8, 4: SYMMETRIC_INT4},  # both in the kernels for 8 bits
    experts=frozenset({Activation.STATIC, Activation.PER_TOKEN}),
)
