"""Running a graph as far as it is of interest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import GraphModule, Interpreter, Node

from mq_ao.errors import MqAoError


class PartialRun(Interpreter):
    """Runs a graph up to the last of some nodes: a head's logits are large, and nobody calibrates on them.

    Args:
        module: the graph.
        wanted: nodes of it, at least one.
    """

    def __init__(self, module: GraphModule, wanted: Iterable[Node]) -> None:
        super().__init__(module)
        # Our errors are complete sentences.
        self.extra_traceback = False
        nodes = list(module.graph.nodes)
        places = {node: place for place, node in enumerate(nodes)}
        self._unneeded = frozenset(nodes[max(places[node] for node in wanted) + 1 :])
        self._inputs = sum(node.op == "placeholder" for node in nodes)

    def run_batch(self, batch: tuple[Any, ...]) -> None:
        """Runs the graph on positional inputs.

        Raises:
            MqAoError: they are not a tuple, or not as many as the graph's.
        """
        if not isinstance(batch, tuple):
            raise MqAoError(f"a batch is a tuple of the graph's inputs, not a {type(batch).__name__}.")
        flat: Sequence[Any] = self.graph.process_inputs(*batch)
        if len(flat) != self._inputs:
            raise MqAoError(f"a batch holds {len(flat)} inputs, but the graph takes {self._inputs}.")
        # The outputs may be unneeded, and are never used.
        self.run(*flat, enable_io_processing=False)

    def run_node(self, n: Node) -> Any:
        """Runs a node, or nothing behind the last one that is wanted."""
        return None if n in self._unneeded else super().run_node(n)
