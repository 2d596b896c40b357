"""Which nodes of a lowered graph run as one kernel.

As Inductor does it: a matrix product, a scan and the like are kernels of their own; what is pointwise or reduces rows
between two of them is one kernel, which reads the inputs of the chain and writes what others need of it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.compat.operators import OpOverload, OpOverloadPacket
from mq_ao.errors import MqAoError
from mq_ao.graph import walk
from mq_ao.lowering.cuda.compiled import summed
from mq_ao.ops.gpu_tuning import FEW_ROWS
from mq_ao.roofline.cost import ROUNDING, RULES, SIGMOID, Call, Cost, cost_of, moved, tensors
from mq_ao.roofline.devices import Device

GATHERS = frozenset({"aten.embedding", "aten.index_select"})
"""Operators that read only those rows of their first input that they give."""
JOINS = frozenset({"aten.stack", "aten.cat"})
NORMS = frozenset({"aten.rms_norm", "aten.layer_norm", "aten._fused_rms_norm"})
ACTIVATIONS = frozenset({"aten.silu", "aten.sigmoid"})
_ROUNDS = frozenset({"quantized_decomposed.quantize_per_tensor", "mq_ao.quantize_per_token", "int8_per_token"})
_REDUCTIONS = frozenset({"aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.aminmax"})
_COPIES = frozenset({"aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.reshape", "aten.flatten"})
_OTHERS = frozenset(
    {
        "aten.flip",
        "aten.full",
        "aten.softplus",
        "aten.zeros",
        "mq_ao.dequantize_state",
        "mq_ao.quantize_state",
        "quantized_decomposed.dequantize_per_tensor",
        "torchao.choose_qparams_affine",
        "torchao.dequantize_affine",
        "torchao.quantize_affine",
    }
)
_FUSED = GATHERS | JOINS | NORMS | ACTIVATIONS | _ROUNDS | _REDUCTIONS | _COPIES | _OTHERS
_OPERATIONS = {
    **dict.fromkeys(NORMS, 4),
    **dict.fromkeys(_ROUNDS, 2 * ROUNDING),
    **dict.fromkeys(_COPIES | GATHERS | JOINS, 0),
}
"""fp32 operations for each value; 1 where nothing is said."""
_SPECIAL = {
    **dict.fromkeys(ACTIVATIONS, SIGMOID),
    **dict.fromkeys(("aten.exp", "aten.log", "aten.rsqrt", "aten.sqrt", "aten.div", "aten.tanh"), 1),
    "aten.softplus": 2,
}
"""Special functions for each value."""


@dataclass(frozen=True)
class Kernel:
    """Nodes that run together.

    Attributes:
        nodes: in graph order.
        operators: their names.
        cost: what they take.
    """

    nodes: tuple[Node, ...]
    operators: tuple[str, ...]
    cost: Cost


def kernels(module: GraphModule, seen: Mapping[Node, Any], device: Device) -> list[Kernel]:
    """The kernels of a lowered graph.

    Args:
        module: the graph.
        seen: value of every node, from `values.values`.
        device: what they run on.

    Raises:
        MqAoError: there is an operator that is neither pointwise nor one whose cost is known.
    """
    chains = _Chains(module, seen)
    found = [Kernel((node,), (name,), cost_of(_call(node, name, seen, device))) for node, name in chains.own.items()]
    found += [chains.kernel(chain) for chain in chains.groups()]
    # Where a norm follows the sum of a product of many rows and a residual, the product reads the residual and writes
    # the sum, which is then all that the norm reads.
    sums = [list(chains.products_summed(kernel)) for kernel in found]
    adds = {product: moved(seen[product]) for products in sums for product in products}
    more = [
        adds.get(kernel.nodes[0], 0) - 2 * sum(adds[item] for item in taken)
        for kernel, taken in zip(found, sums, strict=True)
    ]
    return [replace(kernel, cost=kernel.cost + Cost(moved=size)) for kernel, size in zip(found, more, strict=True)]


def operator_name(node: Node) -> str:
    """`aten.mul` of `aten.mul.Tensor`; of a Python function its name."""
    target = node.target
    if isinstance(target, OpOverload):
        return f"{target.namespace}.{target._opname}"
    if isinstance(target, OpOverloadPacket):
        return str(target).removeprefix("torch.ops.")
    return getattr(target, "__name__", str(target))


class _Chains:
    """Sorts the nodes of a graph: views, kernels of their own, and those that are fused."""

    def __init__(self, module: GraphModule, seen: Mapping[Node, Any]) -> None:
        self.seen = seen
        self.own: dict[Node, str] = {}
        self.fused: dict[Node, str] = {}
        self.views: set[Node] = set()
        for node in module.graph.nodes:
            if node.op == "call_function":
                self._sort(node)
        self.depth = self._depths(module)

    def _sort(self, node: Node) -> None:
        name = operator_name(node)
        if name in RULES:
            self.own[node] = name
        elif not tensors(self.seen[node]) or self._is_view(node):
            self.views.add(node)
        elif name in _FUSED or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            self.fused[node] = name
        else:
            raise MqAoError(
                f"the roofline has no cost of operator {name} ({node.name}), which is not known to be pointwise: add a "
                "rule to mq_ao/roofline/cost.py."
            )

    def _is_view(self, node: Node) -> bool:
        if node.target is operator.getitem:
            return True
        source = next(iter(tensors(self.seen[item] for item in walk.inputs(node))), None)
        results = tensors(self.seen[node])
        return source is not None and all(_storage(result) == _storage(source) for result in results)

    def _root(self, node: Node) -> Node:
        """What a view is of."""
        while node in self.views and (source := next(walk.inputs(node), None)) is not None:
            node = source
        return node

    def _sources(self, node: Node) -> Iterator[Node]:
        return (self._root(item) for item in walk.inputs(node))

    def _readers(self, node: Node) -> Iterator[Node]:
        for user in node.users:
            if user in self.views:
                yield from self._readers(user)
            else:
                yield user

    def _depths(self, module: GraphModule) -> dict[Node, int]:
        """How many kernels of their own lie before a node, as late as what reads it allows.

        Fused nodes of one depth have none between them: together they make no cycle.
        """
        depth: dict[Node, int] = {}
        for node in module.graph.nodes:
            sources = [depth.get(item, 0) + (item in self.own) for item in self._sources(node)]
            depth[node] = max(sources, default=0)
        for node in reversed(list(self.fused)):
            later = [depth[user] for user in self._readers(node) if user.op == "call_function"]
            depth[node] = max(depth[node], min(later, default=0))
        return depth

    def groups(self) -> list[list[Node]]:
        """The chains: fused nodes of one depth, of which one reads another."""
        chain: dict[Node, list[Node]] = {}
        for node in self.fused:
            mine = chain[node] = [node]
            for source in self._sources(node):
                if source in self.fused and self.depth[source] == self.depth[node] and chain[source] is not mine:
                    other = chain[source]
                    mine[:0] = other
                    for member in other:
                        chain[member] = mine
        return list({id(nodes): nodes for nodes in chain.values()}.values())

    def products_summed(self, kernel: Kernel) -> Iterator[Node]:
        """The products of many rows that a norm adds to a residual, which products can do in their epilogue."""
        found: list[Node | None] = []
        if kernel.operators == ("mq_ao.int8_rms_norm",):
            found = [summed(kernel.nodes[0])]
        elif not NORMS.isdisjoint(kernel.operators):
            sides = (self._root(side) for node in kernel.nodes if node.target in walk.ADD for side in walk.inputs(node))
            found = [side for side in sides if self.own.get(side) == "aten.linear"]
        for product in found:
            if product is not None and self.seen[product].numel() // self.seen[product].shape[-1] > FEW_ROWS:
                yield product

    def kernel(self, chain: list[Node]) -> Kernel:
        """One kernel: it reads what comes from outside, and writes what is read outside."""
        members = set(chain)
        read: dict[Any, int] = {}
        written = fp32 = special = 0
        for node in chain:
            name, results = self.fused[node], tensors(self.seen[node])
            for index, item in enumerate(walk.inputs(node)):
                if self._root(item) not in members:
                    for tensor in tensors(self.seen[item]):
                        size = moved(tensor)
                        gathered = name in GATHERS and index == 0
                        key = _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), gathered
                        read[key] = min(size, results[0].numel() * tensor.element_size()) if gathered else size
            written += self._written(node, members)
            counted = tensors(self.seen[next(walk.inputs(node))]) if name in _REDUCTIONS else results[:1]
            elements = sum(value.numel() for value in counted)
            fp32 += _OPERATIONS.get(name, 1) * elements
            special += _SPECIAL.get(name, 0) * elements
        cost = Cost(kernels=1, moved=sum(read.values()) + written, fp32=fp32, special=special)
        return Kernel(tuple(chain), tuple(self.fused[node] for node in chain), cost)

    def _written(self, node: Node, members: set[Node]) -> int:
        value = self.seen[node]
        if isinstance(value, Tensor):
            return moved(value) if any(user not in members for user in self._readers(node)) else 0
        return sum(
            moved(self.seen[item]) for item in node.users if any(user not in members for user in self._readers(item))
        )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _call(node: Node, name: str, seen: Mapping[Node, Any], device: Device) -> Call:
    target: Any = node.target
    arguments = torch.fx.node.map_arg(walk.arguments(node), lambda item: seen[item])
    changed = [item.name for item in target._schema.arguments if item.alias_info and item.alias_info.is_write]
    outputs = (*tensors(seen[node]), *(arguments[key] for key in changed))
    return Call(name, arguments, outputs, device.multiprocessors)
