"""Running a graph as far as it is of interest, and watching for values that would poison what is learned from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from mq_ao.errors import MqAoError, first_line
from mq_ao.graph import walk
from mq_ao.memory import is_out_of_memory
from mq_ao.modes import plain

_CHANNELS = walk.LINEAR | walk.CONV | walk.ANY_SCAN | walk.NORM
_WATCHED = _CHANNELS | walk.ADD | walk.MUL
"""Whose outputs are looked at besides those that are wanted; masks that hold infinities come from others."""


class Batch(tuple[Any, ...]):
    """Inputs of a graph in order.

    Attributes:
        number: of the calibration batch that they are a part of, for messages.
    """

    number: int

    @classmethod
    def of(cls, values: Iterable[Any], number: int) -> Batch:
        """These inputs, of that batch."""
        batch = cls(values)
        batch.number = number
        return batch


class PartialRun(Interpreter):
    """Runs a graph up to the last of some nodes: a head's logits are large, and nobody calibrates on them.

    Args:
        module: the graph.
        wanted: nodes of it; without any, it runs whole.
    """

    def __init__(self, module: GraphModule, wanted: Iterable[Node]) -> None:
        super().__init__(module)
        # Our errors are complete sentences.
        self.extra_traceback = False
        nodes = list(module.graph.nodes)
        places = {node: place for place, node in enumerate(nodes)}
        wanted = list(wanted)
        last = max((places[node] for node in wanted), default=len(nodes) - 1)
        self._unneeded = frozenset(nodes[last + 1 :])
        self._computed = frozenset(node for node in nodes if node.target in _WATCHED and _is_wide(node))
        self._watched = self._computed.union(wanted)
        self._inputs = sum(node.op == "placeholder" for node in nodes)
        self._batch = -1

    def run_batch(self, batch: tuple[Any, ...]) -> None:
        """Runs the graph on positional inputs.

        Modes that the thread is in, or a generator of batches, do not matter.

        Raises:
            MqAoError: they are not a tuple, not as many as the graph's or none that it takes; or a value is NaN, Inf or
                too large, and its node is named. Always the number of the batch is.
        """
        self._batch = batch.number if isinstance(batch, Batch) else self._batch + 1
        if not isinstance(batch, tuple):
            raise MqAoError(f"a batch is a tuple of the graph's inputs, not a {type(batch).__name__}.")
        flat: Sequence[Any] = self.graph.process_inputs(*batch)
        if len(flat) != self._inputs:
            raise MqAoError(f"a batch holds {len(flat)} inputs, but the graph takes {self._inputs}.")
        try:
            with plain():
                # The outputs may be unneeded, and are never used.
                self.run(*flat, enable_io_processing=False)
        except MqAoError as error:
            raise MqAoError(f"batch {self._batch}: {error}") from error
        except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
            shapes = ", ".join(f"{tuple(item.shape)} {item.dtype}" for item in flat if isinstance(item, Tensor))
            what = f"batch {self._batch} ({shapes})"
            if is_out_of_memory(error):
                raise MqAoError(f"there is not enough memory for {what}: give fewer or shorter sequences.") from error
            reason = first_line(error)
            raise MqAoError(
                f"{what} does not fit the graph, which was captured from the first batch: {reason}"
            ) from error

    def run_node(self, n: Node) -> Any:
        """Runs a node, or nothing behind the last one that is wanted."""
        if n in self._unneeded:
            return None
        value = super().run_node(n)
        if n in self._watched:
            self._check(n, value)
        return value

    def _check(self, node: Node, value: Any) -> None:
        value = value[0] if isinstance(value, tuple | list) else value
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return
        # The extremes are finite if and only if everything is, and cost one pass without a mask.
        low, high = torch.aminmax(value)
        largest = float(torch.maximum(-low, high))
        # Where squares overflow, a norm makes 0 of everything beside such a value.
        limit = torch.finfo(value.dtype).max ** 0.5 / 10 if node in self._computed else torch.inf
        if largest < limit:
            return
        path = walk.module_path(node)
        found = f"a value of {largest:.0e}" if largest < torch.inf else "NaN or Inf"
        raise MqAoError(
            f"{found} at node {node.name}{f' in {path}' if path else ''} during calibration: "
            "check the weights and the inputs before it."
        )


def _is_wide(node: Node) -> bool:
    """Whether a node is an activation with channels.

    What is computed from masks and positions has fewer axes, or four where it is added to scores of attention.
    """
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) and value else value
    return isinstance(value, Tensor) and (value.dim() == 3 or (value.dim() > 3 and node.target in _CHANNELS))
