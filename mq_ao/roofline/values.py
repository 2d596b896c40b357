"""Every node's value at a given batch and length, on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from mq_ao.compat.tracing import FakeTensorMode


def values(module: GraphModule, batch: int, length: int) -> dict[Node, Any]:
    """Runs a lowered language model's graph on fake tensors.

    Args:
        module: graph `(input_ids, conv_state, ssm_state, positions) -> ...` of `with_positions`.
        batch: sequences.
        length: tokens of each.

    Returns:
        The value of every node; logits are those of the last token.
    """
    _, conv, ssm, *_ = module.graph.find_nodes(op="placeholder")
    ids, positions = torch.empty(batch, length, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    return record(module, ids, _state(conv, batch), _state(ssm, batch), positions)


def record(module: GraphModule, *inputs: Tensor) -> dict[Node, Any]:
    """The fake value of every node of a graph on such inputs, whose values are not looked at."""
    with FakeTensorMode() as mode, torch.no_grad():
        recorder = _Recorder(module, mode)
        recorder.run(*map(mode.from_tensor, inputs))
    return recorder.seen


def _state(placeholder: Node, batch: int) -> Tensor:
    """Carried states (n_layer, batch, ...) as the graph takes them."""
    example = placeholder.meta["val"]
    layers, _, *rest = example.shape
    return torch.empty([int(layers), batch, *map(int, rest)], dtype=example.dtype)


class _Recorder(Interpreter):
    """Keeps what every node gives."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.mode = mode
        self.seen: dict[Node, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        """A fake of a constant."""
        value = super().fetch_attr(target)
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value

    def run_node(self, n: Node) -> Any:
        """Runs a node."""
        self.seen[n] = super().run_node(n)
        return self.seen[n]
