"""Rewrites a converted graph: every dequantize -> operator pair becomes one integer operator of `mq_ao`."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401  (registers the q/dq operators)
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import walk

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
mq = torch.ops.mq_ao

DQ_WEIGHT = qd.dequantize_per_channel.default
DQ_STATIC = qd.dequantize_per_tensor.default
DQ_TOKEN = torch.ops.torchao.dequantize_affine
Q_STATIC = qd.quantize_per_tensor.default
INTEGER_KERNELS = frozenset({mq.qlinear.default, mq.qlinear_dynamic.default, mq.qcausal_conv1d.default})
# Narrower pieces than one panel of the kernel are cheaper as columns of a shared product.
_PANEL = 64
_UINT8 = (0, 255, torch.uint8)
_DEQUANTIZE = frozenset({DQ_WEIGHT, DQ_STATIC, DQ_TOKEN})


@dataclass(frozen=True)
class Weight:
    """A folded int8 weight: values (out, ...) int8, scale (out,) float32, symmetric."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, module: GraphModule, node: object) -> Weight | None:
        """The weight behind a per-channel dequantize node, or None if `node` is not one."""
        if not isinstance(node, Node) or node.target != DQ_WEIGHT:
            return None
        values, scale, zero_point, axis = node.args[:4]
        if not all(isinstance(arg, Node) and arg.op == "get_attr" for arg in (values, scale, zero_point)) or axis != 0:
            return None
        tensors = [_attribute(module, arg) for arg in (values, scale, zero_point)]
        if tensors[0].dtype != torch.int8 or tensors[2].any():
            return None
        return cls(tensors[0], tensors[1].float())

    def rows(self, start: int, stop: int) -> Weight:
        """Output channels start..stop."""
        return Weight(self.values[start:stop], self.scale[start:stop])


class Rewriter:
    """Edits one converted GraphModule in place; each method handles one pattern.

    Args:
        module: result of `convert_pt2e`.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self._names: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        """Rewrites everything; returns how many integer kernels of each kind the graph calls.

        Raises:
            MqAoError: the graph calls none.
        """
        for node in walk.calls(self.module, {mq.causal_conv1d.default}):
            self._conv(node)
        for node in walk.calls(self.module, walk.LINEAR):
            self._linear(node)
        for node in walk.calls(self.module, {aten.embedding.default}):
            self._embedding(node)
        self.graph.eliminate_dead_code()
        self.module.recompile()
        self.module.delete_all_unused_submodules()
        return count_integer_kernels(self.module)

    def _linear(self, node: Node) -> None:
        x, weight_node, bias = _arguments(node, 3)
        weight = Weight.of(self.module, weight_node)
        if weight is None or not isinstance(x, Node) or not (_is_static(x) or _is_per_token(x)):
            return
        pieces = _pieces(node, weight)
        if pieces is None or bias is not None:
            self._replace(node, self._product(node, x, weight, bias))
            return
        # Two products where the pieces are used apart: each then quantizes its own output, or not.
        for getitem, start, stop in pieces:
            self._replace(getitem, self._product(getitem, x, weight.rows(start, stop), None))

    def _product(self, at: Node, x: Node, weight: Weight, bias: Any) -> Node:
        """Integer product before `at`; quantizes its own output where `at` only feeds one static quantize."""
        graph = self.graph
        with graph.inserting_before(at):
            packed = self._store("packed", mq.qlinear_prepack(weight.values))
            scale = self._store("scale", weight.scale)
            if x.target == DQ_TOKEN:
                quantize = x.args[0]
                assert isinstance(quantize, Node)
                return graph.call_function(mq.qlinear_dynamic.default, (quantize.args[0], packed, scale, bias))
            args = (x.args[0], x.args[1], x.args[2], packed, scale, bias)
            following = _only_user(at)
            if following is None or following.target != Q_STATIC or following.args[3:] != _UINT8:
                return graph.call_function(mq.qlinear.default, args)
            product = graph.call_function(mq.qlinear.default, (*args, following.args[1], following.args[2]))
        following.replace_all_uses_with(product)
        return product

    def _conv(self, node: Node) -> None:
        x, weight_node, bias, state, activation = _arguments(node, 5)
        weight = Weight.of(self.module, weight_node)
        if weight is None or not isinstance(x, Node) or not _is_static(x):
            return
        with self.graph.inserting_before(node):
            values, scale = self._store("taps", weight.values), self._store("scale", weight.scale)
            args = (*x.args[:3], values, scale, bias, state, activation)
            self._replace(node, self.graph.call_function(mq.qcausal_conv1d.default, args))

    def _embedding(self, node: Node) -> None:
        weight = Weight.of(self.module, node.args[0])
        if weight is None:
            return
        with self.graph.inserting_before(node):
            values, scale = self._store("rows", weight.values), self._store("scale", weight.scale[:, None])
            rows = self.graph.call_function(aten.embedding.default, (values, node.args[1]))
            scales = self.graph.call_function(aten.embedding.default, (scale, node.args[1]))
            self._replace(node, self.graph.call_function(aten.mul.Tensor, (rows, scales)))

    def _replace(self, old: Node, new: Node) -> None:
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def _store(self, kind: str, value: Tensor) -> Node:
        """A get_attr node for a new buffer."""
        name = f"int8_{kind}_{self._names[kind]}"
        self._names[kind] += 1
        self.module.register_buffer(name, value.contiguous())
        return self.graph.get_attr(name)


def count_integer_kernels(module: GraphModule) -> Counter[str]:
    """Calls of integer kernels in a lowered graph, by operator name.

    Raises:
        MqAoError: there are none, so nothing would run in integers.
    """
    counts = Counter(str(node.target) for node in walk.calls(module, INTEGER_KERNELS))
    if not counts:
        raise MqAoError(
            "no integer kernel in the lowered graph: nothing in it was quantized. Check the quantizer's report, and "
            "that convert_pt2e was called on the prepared graph."
        )
    return counts


def _is_static(node: Node) -> bool:
    """Whether `node` dequantizes uint8 values with one constant scale and zero point."""
    return node.target == DQ_STATIC and node.args[3:] == _UINT8


def _is_per_token(node: Node) -> bool:
    """Whether `node` dequantizes what `mq_ao.ops.qlinear.quantize_per_token` gives."""
    if node.target != DQ_TOKEN:
        return False
    args: tuple[Any, ...] = node.args
    _, block, scale, _, *limits = args
    choose = scale.args[0] if isinstance(scale, Node) else None
    symmetric = isinstance(choose, Node) and choose.args[1] == "SYMMETRIC"
    return symmetric and set(block[:-1]) <= {1} and limits == [torch.int8, -127, 127]


def simulated_nodes(module: GraphModule) -> list[str]:
    """Names of the nodes of a lowered graph that still read dequantized values: they run in float."""
    readers = (user for node in walk.calls(module, _DEQUANTIZE) for user in node.users)
    return sorted({reader.name for reader in readers})


def _arguments(node: Node, count: int) -> list[Any]:
    """Positional arguments, padded with None."""
    assert not node.kwargs, f"{node.name} has keyword arguments"
    return [*node.args, *[None] * (count - len(node.args))]


def _attribute(module: GraphModule, node: object) -> Tensor:
    assert isinstance(node, Node) and isinstance(node.target, str)
    return operator.attrgetter(node.target)(module).detach()


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _pieces(node: Node, weight: Weight) -> list[tuple[Node, int, int]] | None:
    """(getitem, start, stop) of a linear that is only read in wide pieces along its last axis, else None."""
    split = _only_user(node)
    width = weight.values.shape[0]
    last = node.meta["val"].dim() - 1
    if split is None or split.target not in (aten.chunk.default, aten.split_with_sizes.default):
        return None
    _, how, axis = _arguments(split, 3)
    if split.target == aten.split_with_sizes.default:
        sizes = list(how)
    elif width % how == 0:
        sizes = [width // how] * how
    else:
        return None
    if axis not in (-1, last) or any(size % _PANEL for size in sizes):
        return None
    stops = list(accumulate(sizes))
    indices: list[tuple[Node, Any]] = [(user, user.args[1]) for user in split.users]
    return [(user, stops[index] - sizes[index], stops[index]) for user, index in indices]


def drop_unused_tensors(module: GraphModule) -> None:
    """Deletes parameters and buffers that no node reads: the float weights and the unpacked ones."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
