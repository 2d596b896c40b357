"""What the kernels for GPUs take."""

from __future__ import annotations

import torch

from mq_ao.lowering.inductor.kernels import ROLES
from mq_ao.quantizer.kernels import INT8, Kernels
from mq_ao.quantizer.specs import Activation

KERNELS = Kernels(
    "cuda",
    {role: able - {Activation.PER_GROUP} for role, able in ROLES.items()},  # of the same operators
    static=INT8,
    groups=frozenset({64, 128, 256}),
    group_scale=torch.bfloat16,
)
