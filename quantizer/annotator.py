"""Writing pt2e annotations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace

from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from mq_ao.graph import edit
from mq_ao.graph.rows import pieces
from mq_ao.graph.views import Layer
from mq_ao.quantizer.carried_states import CarriedState
from mq_ao.quantizer.kernels import Kernels
from mq_ao.quantizer.observers import activation_spec, state_spec, weight_spec
from mq_ao.quantizer.planning import without_gradients
from mq_ao.quantizer.specs import Activation, Range, RoleSpec, Rounding
from mq_ao.quantizer.weights import QuantizedWeight


class Annotator:
    """Annotates the nodes of one graph; what several nodes read statically is quantized once.

    Args:
        planned: weights that are integers already, by node.
        kernels: whose integers activations become.
    """

    def __init__(self, planned: Mapping[Node, QuantizedWeight], kernels: Kernels) -> None:
        self._planned = planned
        self._kernels = kernels
        self._edges: dict[tuple[Node, Range], tuple[Node, Node]] = {}

    def layer(self, node: Node, spec: RoleSpec) -> None:
        """Annotates weight and input of a layer."""
        given = Layer.of(node)
        qspecs: dict[Node, QuantizationSpecBase | None] = {given.weight: weight_spec(self._planned[node])}
        if spec.activation is not Activation.NONE:
            qspecs[given.x] = self._input(given.x, node, spec)
        self._write(node, qspecs)

    def inputs(self, node: Node, operands: tuple[Node, ...], spec: RoleSpec) -> None:
        """Annotates operands of a node without weights."""
        qspecs = {operand: self._input(operand, node, spec) for operand in operands if operand in node.all_input_nodes}
        self._write(node, qspecs)
        for operand in operands:
            # z is read by the activation, not by the multiplication itself.
            for user in sorted(operand.users) if operand not in qspecs else ():
                self._write(user, {operand: self._input(operand, user, spec)})

    def outputs(self, linear: Node, spec: RoleSpec) -> None:
        """Annotates what a linear gives, piece by piece, where something reads it in float."""
        parts = pieces(linear)
        for piece in [linear] if parts is None else [value for value, _, _ in parts]:
            if all(_is_static(user, piece) for user in piece.users):
                continue
            given = piece.meta.get(Q_ANNOTATION_KEY)
            inputs = {} if given is None else given.input_qspec_map
            output = activation_spec(spec, self._kernels)
            piece.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(inputs, output, _annotated=True)

    def state(self, state: CarriedState, scale: Tensor) -> None:
        """Annotates a carried state where it enters the scan and where it leaves it."""
        for node in (state.initial, state.last):
            qspec = state_spec(scale)
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=qspec, _annotated=True)

    def cache(self, rows: Iterable[Node], spec: RoleSpec) -> None:
        """Annotates new keys and values: attention reads, and the graph gives, what is held in integers."""
        for node in rows:
            qspec = activation_spec(spec, self._kernels)
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=qspec, _annotated=True)

    def describe(self, node: Node, spec: RoleSpec) -> str:
        """The spec in words, with what was planned otherwise, and what is held in more bits than it has."""
        planned, words = self._planned[node], str(spec)
        if spec.group_size is not None and planned.group_size is None:
            inputs = planned.values.shape[1]
            words += f"; per channel, since {inputs} inputs are no multiple of {spec.group_size}"
        if spec.rounding is Rounding.FISHER and (reason := without_gradients(node)):
            words += f"; rounded by gptq, since {reason}"
        if spec.bits == 3:
            words += "; weights are held in 4 bits"
        if spec.activation_bits == 4:
            words += "; inputs are held in 8 bits"
        return words

    def _input(self, value: Node, user: Node, spec: RoleSpec) -> QuantizationSpecBase | None:
        if spec.activation is not Activation.STATIC:
            return activation_spec(spec, self._kernels, edit.channels(value))
        first = self._edges.setdefault((value, spec.range), (value, user))
        return activation_spec(spec, self._kernels) if first == (value, user) else SharedQuantizationSpec(first)

    def _write(self, node: Node, qspecs: dict[Node, QuantizationSpecBase | None]) -> None:
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=qspecs, _annotated=True)


def copied(graph: GraphModule) -> GraphModule:
    """A prepared graph to convert, on the same tensors: its annotations name nodes of the copy."""
    copy = GraphModule(graph, deepcopy(graph.graph))
    copy.meta = dict(graph.meta)
    places = dict(zip(graph.graph.nodes, copy.graph.nodes, strict=True))

    def moved(qspec: QuantizationSpecBase | None) -> QuantizationSpecBase | None:
        if not isinstance(qspec, SharedQuantizationSpec):
            return qspec
        given = qspec.edge_or_node
        return SharedQuantizationSpec(places[given] if isinstance(given, Node) else tuple(map(places.get, given)))

    for node in copy.graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is not None:
            inputs = {places[value]: moved(qspec) for value, qspec in annotation.input_qspec_map.items()}
            node.meta[Q_ANNOTATION_KEY] = replace(annotation, input_qspec_map=inputs)
    return copy


def is_annotated(node: Node) -> bool:
    """Whether a quantizer has annotated a node."""
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation._annotated


def _is_static(user: Node, value: Node) -> bool:
    """Whether `user` reads `value` in static integers."""
    annotation = user.meta.get(Q_ANNOTATION_KEY)
    qspec = None if annotation is None else annotation.input_qspec_map.get(value)
    return isinstance(qspec, SharedQuantizationSpec) or (isinstance(qspec, QuantizationSpec) and not qspec.is_dynamic)


def carries(node: Node, spec: RoleSpec) -> bool:
    """Whether a layer's annotation is still there, for all of its operands."""
    if not is_annotated(node):
        return False
    wanted = 1 if spec.activation is Activation.NONE else 2
    return len(set(node.meta[Q_ANNOTATION_KEY].input_qspec_map) & set(node.all_input_nodes)) == wanted
