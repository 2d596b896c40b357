"""A rewritten graph that is trained with its quantization, and becomes a quantized model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import edit, walk
from mq_ao.lowering.language_graphs import find_states
from mq_ao.prepared import Prepared
from mq_ao.quantized import QuantizedModel
from mq_ao.quantizer.annotator import copied
from mq_ao.quantizer.observers import PlannedWeight
from mq_ao.training.fake_quantizers import TrainedWeight, fake_quantizer


class TrainableModel(nn.Module):
    """What `mq_ao.prepare_qat` gives: a module to train as any other, and then to `convert`.

    Called as the model was captured: a language model with states takes ids (batch, length), and states if there are,
    and gives logits and states. It begins where quantization after training ends: without training, `convert` gives the
    same integers.

    Args:
        prepared: graph with observers, calibrated.

    Raises:
        MqAoError: there is a scan without a gradient.
    """

    def __init__(self, prepared: Prepared) -> None:
        super().__init__()
        _check_gradients(prepared.graph)
        self._prepared, self._states = prepared, find_states(prepared.source.graph)
        self.graph = _with_parameters(prepared.graph)
        self._observers: dict[str, nn.Module] = {}
        for node in _observed(self.graph):
            name = str(node.target)
            if name not in self._observers:
                self._observers[name] = self.graph.get_submodule(name)
                self.graph.set_submodule(name, fake_quantizer(self._observers[name]))
        self._begin()

    def forward(self, *inputs: Any) -> Any:
        """The model's outputs, quantized as programs quantize them."""
        if self._states is not None and len(inputs) == 1:
            inputs = (*inputs, *self._states.examples(len(inputs[0]), 0))
        return self.graph(*inputs)

    @property
    def scales(self) -> list[nn.Parameter]:
        """Scales of the weights: give them a smaller learning rate than the rest, or none."""
        return [module.scale for module in self.graph.modules() if isinstance(module, TrainedWeight)]

    @property
    def weights(self) -> list[nn.Parameter]:
        """All other parameters."""
        scales = {id(scale) for scale in self.scales}
        return [parameter for parameter in self.parameters() if id(parameter) not in scales]

    @torch.no_grad()
    def convert(self) -> QuantizedModel:
        """The quantized model with the weights as they are now; this module can be trained on.

        Raises:
            MqAoError: a weight became NaN or Inf.
        """
        graph = copied(self.graph)
        for node in _observed(graph):
            name = str(node.target)
            observer, quantizer = self._observers[name], self.graph.get_submodule(name)
            if isinstance(quantizer, TrainedWeight):
                weight = edit.constant(graph, _source(node))
                if not torch.isfinite(weight).all() or not torch.isfinite(quantizer.scale).all():
                    raise MqAoError(f"{_source(node).target} became NaN or Inf: train with a smaller learning rate.")
                observer = PlannedWeight(quantizer.trained(weight))
            graph.set_submodule(name, observer)
        return self._prepared.quantized(graph)

    @torch.no_grad()
    def _begin(self) -> None:
        """Weights that GPTQ rounds otherwise begin where it rounds them, unless others read them too."""
        for node in _observed(self.graph):
            quantizer, source = self.graph.get_submodule(str(node.target)), _source(node)
            if isinstance(quantizer, TrainedWeight) and source.op == "get_attr":
                readers = [n for n in self.graph.graph.find_nodes(op="get_attr") if n.target == source.target]
                if len(readers) == 1 and len(source.users) == 1:
                    parameter = edit.attribute(self.graph, str(source.target))
                    parameter.copy_(quantizer.begin(parameter))


def _observed(graph: GraphModule) -> list[Node]:
    """Calls of observers, or of what stands in their place."""
    return [node for node in graph.graph.nodes if node.op == "call_module"]


def _source(node: Node) -> Node:
    """What an observer observes."""
    (value,) = node.all_input_nodes
    return value


def _with_parameters(graph: GraphModule) -> GraphModule:
    """The graph with parameters of its own, all of which are trained."""
    graph = copied(graph)
    for node in graph.graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.graph.erase_node(node)
    graph, meta = GraphModule(graph, graph.graph), graph.meta  # without what nobody reads
    graph.meta = meta
    for name in dict.fromkeys(str(node.target) for node in graph.graph.find_nodes(op="get_attr")):
        value = edit.attribute(graph, name)
        if isinstance(value, Tensor) and value.is_floating_point():
            path, _, leaf = name.rpartition(".")
            owner = graph.get_submodule(path)
            trained = isinstance(value, nn.Parameter)
            delattr(owner, leaf)
            setattr(owner, leaf, nn.Parameter(value.detach().clone(), requires_grad=trained))
    return graph


def _check_gradients(graph: GraphModule) -> None:
    for node in walk.calls(graph, walk.WITHOUT_GRADIENT):
        raise MqAoError(f"{node.target} has no gradient: train without expose_state.")
