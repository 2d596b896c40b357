"""A captured language model with its states, run by PyTorch: the float program of what is not compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mq_ao.lowering.language_graphs import states_of
from mq_ao.models.states import States, tensors


class StatefulGraph:
    """Callable as `(input_ids, *states) -> (logits, *states)`, as programs are; it checks nothing.

    Args:
        graph: float, simulated or integer graph with states.
        states: what it carries, where the graph itself does not tell: `convert_pt2e` gives nodes without shapes.
    """

    def __init__(self, graph: GraphModule, states: States | None = None) -> None:
        self.graph, self.states = graph, states or states_of(graph)

    @property
    def carried(self) -> States:
        """The states that a call takes and gives."""
        return self.states

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, tied ones once."""
        return sum(parameter.nbytes for parameter in self.graph.parameters())

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, *states: Any) -> tuple[Any, ...]:
        """Logits (batch, length, vocab_size), and the states after the last token; without states, of new sequences."""
        given = states or self.states.zeros(len(input_ids))
        logits, *new = self.graph(input_ids, *tensors(given))
        return logits, *self.states.after(given, new)
