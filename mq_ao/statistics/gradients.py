"""How much a change of a linear's output matters: gradients of log p by it, and the layer's input weighted by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from mq_ao.errors import MqAoError, first_line
from mq_ao.graph import edit, match, walk
from mq_ao.graph.stretches import GIVEN, Stretch, is_size, stretches
from mq_ao.graph.views import Layer
from mq_ao.memory import is_out_of_memory
from mq_ao.modes import plain
from mq_ao.ops.cached_attention import cached_attention
from mq_ao.statistics.accumulators import Accumulator

OUTPUTS = 1024
"""Outputs of a linear whose gradients are related to each other; second moments of all would be larger than a model."""
_DIFFERENTIABLE = {torch.ops.mq_ao.cached_attention.default: cached_attention.reference}
"""What is run where a kernel keeps nothing for gradients."""


def weighted_input_name(linear: Node) -> str:
    """Name in statistics of a linear's input (tokens, in), every token times the length of the output's gradient."""
    return f"{linear.name}_weighted_input"


def gradient_names(linear: Node) -> list[str]:
    """Names of the gradients of a linear's output, (tokens, `OUTPUTS` or fewer) each."""
    return [f"{linear.name}_gradient_{first}" for first in range(0, edit.channels(linear), OUTPUTS)]


class GradientRun(Interpreter):
    """Runs a graph forwards and backwards, and adds up what is asked of its linears.

    The gradients are those of log p of outputs that are drawn from the model's own distribution, so that their second
    moments are its Fisher information: where the graph has a head, its first output holds the logits of a categorical
    distribution; otherwise it is the mean of a normal one. Draws have a fixed seed.

    Args:
        module: float graph.
        accumulators: by the names of this file; others are left alone.

    Raises:
        MqAoError: gradients are asked for, and an operator has none.
    """

    def __init__(self, module: GraphModule, accumulators: Mapping[str, Accumulator]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._accumulators = accumulators
        self._wanted = {
            node: names
            for node in walk.calls(module, walk.LINEAR)
            if (names := [name for name in (weighted_input_name(node), *gradient_names(node)) if name in accumulators])
        }
        other = next(iter(walk.calls(module, walk.WITHOUT_GRADIENT)), None)
        if self._wanted and other is not None:
            raise MqAoError(f"{other.name} has no gradient: ask for statistics of values alone.")
        self._axes = _batch_axes(module)
        self._generator = torch.Generator().manual_seed(0)
        self._taken: dict[Node, tuple[Tensor, Tensor]] = {}
        if self._wanted:
            found = match(module)
            self._categorical, self._output = bool(found.heads), _first_output(module)
            # What is kept for gradients is that of one block, which is run a second time for them.
            self._stretches = stretches(module.graph, [block.in_proj for block in found.blocks])

    @property
    def names(self) -> set[str]:
        """Those of this file that are asked for."""
        return {name for names in self._wanted.values() for name in names}

    def run_batch(self, batch: tuple[Any, ...]) -> None:
        """Adds a batch, which has run through the graph without error before.

        Raises:
            MqAoError: an operator on the way has no gradient, or there is not enough memory.
        """
        try:
            with plain():
                for given in self._sequences(self.graph.process_inputs(*batch)):
                    self._forwards(given)
                    self._backwards()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise MqAoError("there is not enough memory for gradients: give fewer or shorter sequences.") from error
            raise MqAoError(f"gradients of this model cannot be computed: {first_line(error)}") from error

    def run_node(self, n: Node) -> Any:
        """Runs a node; where gradients are computed, keeps inputs and outputs of wanted linears."""
        if n.target in _DIFFERENTIABLE:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return _DIFFERENTIABLE[n.target](*args, **kwargs)
        value = super().run_node(n)
        if n.op == "get_attr":
            return value.detach() if isinstance(value, Tensor) else value  # gradients by weights are not asked for
        if n in self._wanted and torch.is_grad_enabled():
            if not value.requires_grad:
                value.requires_grad_()
            self._taken[n] = (self.env[Layer.of(n).x].detach(), value)
        return value

    def _sequences(self, given: Sequence[Any]) -> Iterator[list[Any]]:
        """The inputs of one sequence after the other, where the graph takes any batch: all that a sequence computes is
        kept until its gradients are known.
        """
        if self._axes[0] is None:
            yield list(given)
            return
        for row in range(given[0].shape[self._axes[0]]):
            yield [
                value if axis is None else value.narrow(axis, row, 1)
                for value, axis in zip(given, self._axes, strict=True)
            ]

    @torch.no_grad()
    def _forwards(self, given: list[Any]) -> None:
        """Leaves in `env` what the graph is given, the values that stretches read of earlier ones, and its output."""
        self.env, self.args_iter = {}, iter(given)
        kept = {self._output}.union(*(stretch.reads for stretch in self._stretches))
        for node in self.graph.nodes:
            if node.op in GIVEN:
                self.env[node] = self.run_node(node)
        for stretch in self._stretches:
            self._run(stretch)
            self._forget(node for node in stretch.nodes if node not in kept)

    def _backwards(self) -> None:
        """Runs the stretches again from the last to the first, with the gradients that the later ones left."""
        gradients = {self._output: self._gradient_of_likelihood(self.env[self._output])}
        for stretch in reversed(self._stretches):
            self._taken = {}
            read = [node for node in stretch.reads if self.env[node].is_floating_point()]
            for node in read:
                self.env[node] = self.env[node].detach().requires_grad_()
            with torch.enable_grad():
                self._run(stretch)
            results = [
                (self.env[node], gradients.pop(node))
                for node in stretch.nodes
                if node in gradients and self.env[node].requires_grad
            ]
            leaves = [*(self.env[node] for node in read), *(value for _, value in self._taken.values())]
            found = _gradients(results, leaves)
            del results
            for node, gradient in zip(read, found, strict=False):
                if gradient is not None:
                    gradients[node] = gradients[node] + gradient if node in gradients else gradient
            for (node, (x, value)), gradient in zip(self._taken.items(), found[len(read) :], strict=True):
                rows = torch.zeros_like(value) if gradient is None else gradient
                self._add(node, x.flatten(0, -2), rows.flatten(0, -2))
            self._forget(stretch.nodes)
        self._taken = {}

    def _run(self, stretch: Stretch) -> None:
        for node in stretch.nodes:
            self.env[node] = self.run_node(node)

    def _forget(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not is_size(node):
                self.env.pop(node, None)

    def _gradient_of_likelihood(self, output: Tensor) -> Tensor:
        """The gradient by the output of log p of what is drawn for every token."""
        if not self._categorical:
            noise = torch.randn(output.shape, generator=self._generator, dtype=output.dtype)
            return noise.to(output.device)
        p = output.flatten(0, -2).log_softmax(-1).exp_()
        drawn = torch.multinomial(p.cpu(), 1, generator=self._generator)
        one = torch.ones_like(drawn, dtype=p.dtype, device=p.device)
        return p.neg_().scatter_add_(1, drawn.to(p.device), one).view(output.shape)

    def _add(self, node: Node, x: Tensor, gradient: Tensor) -> None:
        weighted = weighted_input_name(node)
        if weighted in self._accumulators:
            self._accumulators[weighted].update(x * gradient.norm(dim=1, keepdim=True), weighted)
        for name, part in zip(gradient_names(node), gradient.split(OUTPUTS, dim=1), strict=True):
            if name in self._accumulators:
                self._accumulators[name].update(part, name)


def _gradients(results: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients by the leaves, given those by results; None for what no result depends on."""
    if not results or not leaves:
        return [None] * len(leaves)
    values, gradients = zip(*results, strict=True)
    return torch.autograd.grad(values, leaves, gradients, allow_unused=True)


def _first_output(module: GraphModule) -> Node:
    (given,) = module.graph.output_node().args
    first = given[0] if isinstance(given, tuple | list) else given
    assert isinstance(first, Node)
    return first


def _batch_axes(module: GraphModule) -> list[int | None]:
    """The axis of each input that holds its sequences: of the symbolic size that the first one's axis 0 has."""
    values = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    batch = values[0].shape[0] if values and isinstance(values[0], Tensor) and values[0].dim() else None
    if not isinstance(batch, torch.SymInt):
        return [None] * len(values)
    shapes = [list(map(str, value.shape)) if isinstance(value, Tensor) else [] for value in values]
    return [shape.index(str(batch)) if str(batch) in shape else None for shape in shapes]
