"""Explicit states become buffers: the program keeps them between calls.

A stack of layers' states is a buffer for each layer, which reads its own and writes it at the end. Keys and values are
caches of a fixed size; how many of their rows are tokens, the program counts in a buffer of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from mq_ao.errors import MqAoError
from mq_ao.graph import walk
from mq_ao.models.states import State, States

aten = torch.ops.aten
mq = torch.ops.mq_ao
POSITION = "position"
"""The buffer with the number of tokens so far, of programs with caches."""


def buffers(states: States, batch: int, max_context: int) -> dict[str, Tensor]:
    """What is kept of `batch` sequences, zeros, by the name of the buffer.

    Args:
        states: of the graph.
        batch: how many sequences.
        max_context: rows of caches.
    """
    found: dict[str, Tensor] = {}
    for item in states.items:
        value = item.example(batch, max_context)
        if _is_stack(item):
            found |= {f"{item.name}_{layer}": state.clone() for layer, state in enumerate(value)}
        else:
            found[item.name] = value
    if any(item.grows for item in states.items):
        found[POSITION] = torch.zeros(1, dtype=torch.int64)
    return found


def cleared(states: States, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those buffers that are zero for new sequences: all but caches, of which only what was written is read."""
    caches = {item.name for item in states.items if item.grows}
    return {name: value for name, value in kept.items() if name not in caches}


def keep_states(module: GraphModule, states: States, kept: Mapping[str, Tensor]) -> None:
    """Edits a graph with explicit states into one that keeps them: `(input_ids, ...) -> logits`.

    Args:
        module: `(input_ids, *states, ...) -> (logits, *states)`, flat.
        states: its states.
        kept: see `buffers`; they become the module's.

    Raises:
        MqAoError: a stack is read or given back otherwise than layer by layer, or a cache otherwise than by attention.
    """
    for name, value in kept.items():
        module.register_buffer(name, value)
    _Keeper(module.graph, states).run()
    module.recompile()


def _is_stack(state: State) -> bool:
    return not state.grows and state.batch_axis == 1


class _Keeper:
    def __init__(self, graph: Graph, states: States) -> None:
        self._graph = graph
        placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
        self._ids, self._last = next(iter(placeholders.values())), list(placeholders.values())[-1]
        (self._output,) = graph.find_nodes(op="output")
        self._logits, *given = self._output.args[0]
        self._states = [(item, placeholders[item.name], new) for item, new in zip(states.items, given, strict=True)]
        self._known: dict[str, Node] = {}

    def run(self) -> None:
        # States are written last, when nothing reads the old ones any more.
        writes: list[tuple[Node, Node]] = []
        for item, source, new in self._states:
            if _is_stack(item):
                current = self._layers(source, item.name)
                writes += [(current[layer], last) for layer, last in enumerate(_stacked(new, item.name))]
            elif not item.grows:
                source.replace_all_uses_with(self._buffer(item.name))
                writes.append((self._buffer(item.name), new))
        self._cache()
        with self._graph.inserting_before(self._output):
            call = self._graph.call_function
            if POSITION in self._known:
                count = call(aten.sym_size.int, (self._ids, 1))
                writes.append((self._known[POSITION], call(aten.add.Scalar, (self._known[POSITION], count))))
            for buffer, value in writes:
                call(aten.copy_.default, (buffer, value))
        self._output.args = ((self._logits,),)
        kept = {aten.copy_.default, mq.attention_into_cache.default}
        self._graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.target in kept)
        for item, source, _ in self._states:
            if source.users:
                reader = next(iter(source.users))
                raise MqAoError(f"{reader.name} reads {item.name} otherwise than attention does: it cannot be a cache.")
            self._graph.erase_node(source)

    def _buffer(self, name: str) -> Node:
        """A buffer, at the beginning of the graph."""
        if name not in self._known:
            with self._graph.inserting_after(self._last):
                self._known[name] = self._graph.get_attr(name)
        return self._known[name]

    def _layers(self, source: Node, name: str) -> dict[int, Node]:
        """A buffer in the place of every `source[layer]`."""
        found: dict[int, Node] = {}
        for user in list(source.users):
            if user.target == aten.sym_size.int:
                continue
            given = walk.arguments(user) if user.target == aten.select.int else {}
            layer = given.get("index")
            if given.get("dim") != 0 or not isinstance(layer, int):
                raise MqAoError(f"{user.name} reads {name} otherwise than layer by layer: it cannot become a buffer.")
            found[layer] = self._buffer(f"{name}_{layer}")
            user.replace_all_uses_with(found[layer])
            self._graph.erase_node(user)
        return found

    def _cache(self) -> None:
        """Attention reads and writes its caches; what asks for a cache's length counts from the position."""
        caches = {source: new for item, source, new in self._states if item.grows}
        for source in caches:
            for user in list(source.users):
                if user.target == aten.sym_size.int and user.args[1] == 0:
                    for places in [node for node in user.users if node.target == aten.arange.start]:
                        self._count_from_position(places, user)
                elif user.target == mq.cached_attention.default:
                    self._attend(user, caches)

    def _count_from_position(self, places: Node, length: Node) -> None:
        """`arange(length, length + count)` as `arange(count) + position`."""
        first, end = places.args
        terms = list(end.args) if isinstance(end, Node) and end.target == operator.add else []
        if first is not length or length not in terms:
            return
        terms.remove(length)
        with self._graph.inserting_before(places):
            steps = self._graph.call_function(aten.arange.default, tuple(terms), dict(places.kwargs))
            new = self._graph.call_function(aten.add.Tensor, (steps, self._buffer(POSITION)))
        places.replace_all_uses_with(new)
        self._graph.erase_node(places)

    def _attend(self, node: Node, caches: Mapping[Node, Node]) -> None:
        a: Any = walk.arguments(node)
        keys, values = a["past_key"], a["past_value"]
        if caches.get(keys) is not a["key"] or caches.get(values) is not a["value"] or a["starts"] or a["key_scale"]:
            return
        kept = [self._buffer(name) for name in (str(keys.target), str(values.target), POSITION)]
        with self._graph.inserting_before(node):
            args = (a["query"], a["key"], a["value"], a["scaling"], *kept)
            new = self._graph.call_function(mq.attention_into_cache.default, args)
        node.replace_all_uses_with(new)
        self._graph.erase_node(node)


def _stacked(stack: Any, name: str) -> list[Node]:
    if not isinstance(stack, Node) or stack.target != aten.stack.default:
        raise MqAoError(f"the graph's output {name} is not a stack of the layers' states: it cannot become a buffer.")
    return list(walk.inputs(stack))
