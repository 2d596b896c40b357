"""Operators and their calls: schemas, overloads, modes that see every call, tensors without values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OpOverload", "OpOverloadPacket", "TorchDispatchMode", "is_fake", "parse_schema"]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values, as while a model is traced."""
    return isinstance(tensor, FakeTensor)


def parse_schema(text: str) -> Any:
    """A schema such as "mq_ao::f(Tensor x) -> Tensor", with its arguments, defaults and aliases."""
    return torch._C.parse_schema(text)
