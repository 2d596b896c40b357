"""What XNNPACK's kernels and ours for ExecuTorch take."""

from __future__ import annotations

import torch

from mq_ao.graph import Role
from mq_ao.quantizer.kernels import INT8, Kernels
from mq_ao.quantizer.specs import LINEAR_ROLES, Activation

# XNNPACK has no kernel for float activations and integer weights.
ROLES = {
    **dict.fromkeys(LINEAR_ROLES, frozenset({Activation.STATIC, Activation.PER_TOKEN})),
    Role.CONV1D: frozenset({Activation.STATIC}),
    Role.EMBEDDING: frozenset({Activation.NONE}),
    Role.SCAN: frozenset({Activation.STATIC}),
}
KERNELS = Kernels(
    "executorch",
    ROLES,
    static=INT8,
    per_token={8: INT8},
    integer_outputs=True,
    weight_bits=frozenset({8, 4}),
    group_multiple=32,
    group_scale=torch.bfloat16,
    experts=None,
)
