"""What rules read and edit."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from mq_ao.graph import edit, walk

Operands = tuple[Any, Any]

_CONSTANT = frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR})


class Spelling:
    """A captured program while rules edit it; its parameters are still inputs of its graph.

    Args:
        program: the program.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program, self.graph = program, program.graph
        signature = program.graph_signature
        changing = set(signature.buffers_to_mutate.values())
        self._constants = {
            item.arg.name for item in signature.input_specs if item.kind in _CONSTANT and item.target not in changing
        }

    def is_constant(self, node: object) -> bool:
        """Whether a value depends on parameters and buffers alone."""
        if not isinstance(node, Node):
            return False
        if node.op == "placeholder":
            return node.name in self._constants
        inputs = node.all_input_nodes
        return node.op == "call_function" and bool(inputs) and all(map(self.is_constant, inputs))

    def is_vector(self, node: object, width: Any) -> bool:
        """Whether a value is constant, with one number for each of `width` channels on the last axis."""
        if not self.is_constant(node):
            return False
        assert isinstance(node, Node)
        shape = node.meta["val"].shape
        return len(shape) > 0 and walk.same_size(shape[-1], width) and walk.same_size(shape.numel(), width)

    def vector(self, node: Node, before: Node) -> Node:
        """A value that `is_vector`, as one of a single axis, computed before a node."""
        self._hoist(node, before)
        if node.meta["val"].dim() == 1:
            return node
        return self.call(walk.aten.reshape.default, (node, [node.meta["val"].shape[-1]]), before)

    def call(self, target: Any, args: tuple[Any, ...], before: Node) -> Node:
        """A new node before another one, whose place among the modules it has."""
        with self.graph.inserting_before(before):
            return edit.call(self.program.graph_module, target, args, like=before)

    def become(self, node: Node, target: Any, args: tuple[Any, ...]) -> None:
        """Changes what a node calls."""
        node.target, node.args, node.kwargs = target, args, {}

    def substitute(self, old: Node, new: Node) -> None:
        """Puts another value in the place of a node, among the program's outputs too."""
        old.replace_all_uses_with(new)
        self.program.graph_signature.replace_all_uses(old.name, new.name)
        self.graph.erase_node(old)

    def _hoist(self, constant: Node, before: Node) -> None:
        if constant.op == "placeholder" or constant < before:
            return
        for item in constant.all_input_nodes:
            self._hoist(item, before)
        before.prepend(constant)


def both_ways(node: Node) -> tuple[Operands, Operands]:
    """Operands of a sum or product, which commute."""
    first, second = node.args[:2]
    return (first, second), (second, first)
