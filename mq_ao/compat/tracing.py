"""What tracing is made of: tensors without values, modes that see every operator, sizes that are known, its errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported, UserError
from torch._export.verifier import SpecViolationError
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "REFUSALS",
    "FakeTensorMode",
    "OpOverload",
    "OpOverloadPacket",
    "SpecViolationError",
    "TorchDispatchMode",
    "is_fake",
    "parse_schema",
    "size_checks",
    "size_guards",
    "statically_known_true",
]

REFUSALS = (UserError, Unsupported, GuardOnDataDependentSymNode)
"""What torch.export raises where a model cannot be captured as it is written. They have no public base class."""


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values, as while a model is traced."""
    return isinstance(tensor, FakeTensor)


def parse_schema(text: str) -> Any:
    """A schema such as "mq_ao::f(Tensor x) -> Tensor", with its arguments, defaults and aliases."""
    return torch._C.parse_schema(text)


def size_checks(module: GraphModule) -> list[Node]:
    """The nodes by which `ExportedProgram.module()` checks the sizes of all inputs, which they are given; one or none.

    They fail with AssertionError, and are exported again with the graph.
    """
    return module.graph.find_nodes(op="call_module", target="_guards_fn")


def size_guards(program: ExportedProgram) -> list[str]:
    """What an exported program assumes of its inputs' sizes, as Python; it checks that itself only where it is run."""
    return program._guards_code  # type: ignore[no-any-return, attr-defined, unused-ignore]
