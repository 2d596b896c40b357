"""What tracing is made of: tensors without values, sizes that are known, its errors. It takes seconds to import."""

from __future__ import annotations

from torch._dynamo.exc import Unsupported, UserError
from torch._export.verifier import SpecViolationError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true

__all__ = [
    "REFUSALS",
    "FakeTensorMode",
    "SpecViolationError",
    "size_checks",
    "size_guards",
    "statically_known_true",
]

REFUSALS = (UserError, Unsupported, GuardOnDataDependentSymNode)
"""What torch.export raises where a model cannot be captured as it is written. They have no public base class."""


def size_checks(module: GraphModule) -> list[Node]:
    """The nodes by which `ExportedProgram.module()` checks the sizes of all inputs, which they are given; one or none.

    They fail with AssertionError, and are exported again with the graph.
    """
    return module.graph.find_nodes(op="call_module", target="_guards_fn")


def size_guards(program: ExportedProgram) -> list[str]:
    """What an exported program assumes of its inputs' sizes, as Python; it checks that itself only where it is run."""
    # Not public, and not in every version's types.
    return program._guards_code  # type: ignore[no-any-return, attr-defined, unused-ignore]
