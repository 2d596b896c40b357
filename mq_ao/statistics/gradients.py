"""How much a change of a linear's output matters: gradients of log p by it, and the layer's input weighted by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from mq_ao.errors import MqAoError, first_line
from mq_ao.graph import edit, match, walk
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
        self._categorical = bool(self._wanted and match(module).heads)
        self._axes = _batch_axes(module)
        self._generator = torch.Generator().manual_seed(0)
        self._taken: dict[Node, tuple[Tensor, Tensor]] = {}

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
            with plain(), torch.enable_grad():
                for given in self._sequences(self.graph.process_inputs(*batch)):
                    self._backwards(self.run(*given, enable_io_processing=False))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise MqAoError("there is not enough memory for gradients: give fewer or shorter sequences.") from error
            raise MqAoError(f"gradients of this model cannot be computed: {first_line(error)}") from error

    def run_node(self, n: Node) -> Any:
        """Runs a node; keeps inputs and outputs of wanted linears."""
        if n.target in _DIFFERENTIABLE:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return _DIFFERENTIABLE[n.target](*args, **kwargs)
        value = super().run_node(n)
        if n in self._wanted:
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

    def _backwards(self, outputs: Any) -> None:
        first = outputs[0] if isinstance(outputs, tuple | list) else outputs
        nodes, taken = zip(*self._taken.items(), strict=True)
        self._taken = {}
        found = torch.autograd.grad(self._likelihood(first), [value for _, value in taken], allow_unused=True)
        for node, (x, value), gradient in zip(nodes, taken, found, strict=True):
            rows = torch.zeros_like(value) if gradient is None else gradient
            self._add(node, x.flatten(0, -2), rows.flatten(0, -2))

    def _likelihood(self, output: Tensor) -> Tensor:
        """log p of what is drawn for every token."""
        if not self._categorical:
            noise = torch.randn(output.shape, generator=self._generator, dtype=output.dtype)
            return (output * noise.to(output.device)).sum()
        log_p = output.flatten(0, -2).log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=self._generator)
        return log_p.gather(1, drawn.to(log_p.device)).sum()

    def _add(self, node: Node, x: Tensor, gradient: Tensor) -> None:
        weighted = weighted_input_name(node)
        if weighted in self._accumulators:
            self._accumulators[weighted].update(x * gradient.norm(dim=1, keepdim=True), weighted)
        for name, part in zip(gradient_names(node), gradient.split(OUTPUTS, dim=1), strict=True):
            if name in self._accumulators:
                self._accumulators[name].update(part, name)


def _batch_axes(module: GraphModule) -> list[int | None]:
    """The axis of each input that holds its sequences: of the symbolic size that the first one's axis 0 has."""
    values = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    batch = values[0].shape[0] if values and isinstance(values[0], Tensor) and values[0].dim() else None
    if not isinstance(batch, torch.SymInt):
        return [None] * len(values)
    shapes = [list(map(str, value.shape)) if isinstance(value, Tensor) else [] for value in values]
    return [shape.index(str(batch)) if str(batch) in shape else None for shape in shapes]
