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


def keep_states(module: GraphModule, states: States, kept: Mapping[str, Tensor], start_pos: Node | None = None) -> None:
    """Edits a graph with explicit states into one that keeps them: `(input_ids, ...) -> logits`.

    Args:
        module: `(input_ids, *states, ...) -> (logits, *states)`, flat.
        states: its states.
        kept: see `buffers`; they become the module's.
        start_pos: an input of the graph, int64 (1,), the tokens before: where it is 0, states are zero whatever the
            buffers hold. None: the program counts.

    Raises:
        MqAoError: a stack is read or given back otherwise than layer by layer, or a cache otherwise than by attention.
    """
    for name, value in kept.items():
        module.register_buffer(name, value)
    _Keeper(module.graph, states, start_pos).run()
    module.recompile()


def _is_stack(state: State) -> bool:
    return not state.grows and state.batch_axis == 1


class _Keeper:
    def __init__(self, graph: Graph, states: States, start_pos: Node | None) -> None:
        self._graph, self._start_pos = graph, start_pos
        placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
        self._ids, self._last = next(iter(placeholders.values())), list(placeholders.values())[-1]
        (self._output,) = graph.find_nodes(op="output")
        self._logits, *given = self._output.args[0]
        self._states = [(item, placeholders[item.name], new) for item, new in zip(states.items, given, strict=True)]
        self._known: dict[str, Node] = {}
        self._read: dict[str, Node] = {}

    def run(self) -> None:
        # States are written last, when nothing reads the old ones any more.
        writes: list[tuple[Node, Node]] = []
        for item, source, new in self._states:
            if _is_stack(item):
                self._layers(source, item.name)
                layers = enumerate(_stacked(new, item.name))
                writes += [(self._buffer(f"{item.name}_{layer}"), last) for layer, last in layers]
            elif not item.grows:
                source.replace_all_uses_with(self._state(item.name))
                writes.append((self._buffer(item.name), new))
        self._cache()
        with self._graph.inserting_before(self._output):
            call = self._graph.call_function
            if any(item.grows for item, _, _ in self._states):
                count = call(aten.sym_size.int, (self._ids, 1))
                writes.append((self._buffer(POSITION), call(aten.add.Scalar, (self._position(), count))))
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

    def _state(self, name: str) -> Node:
        """What a state's buffer holds; zero at the beginning."""
        if self._start_pos is None:
            return self._buffer(name)
        if name not in self._read:
            buffer, call = self._buffer(name), self._graph.call_function
            with self._graph.inserting_after(buffer):
                zeros = call(aten.zeros_like.default, (buffer,))
            with self._graph.inserting_after(zeros):
                begins = call(aten.eq.Scalar, (self._start_pos, 0))
            with self._graph.inserting_after(begins):
                # Not a product: a buffer that nobody has written may hold NaN.
                self._read[name] = call(aten.where.self, (begins, zeros, buffer))
        return self._read[name]

    def _position(self) -> Node:
        return self._buffer(POSITION) if self._start_pos is None else self._start_pos

    def _layers(self, source: Node, name: str) -> None:
        """A state in the place of every `source[layer]`."""
        for user in list(source.users):
            if user.target == aten.sym_size.int:
                continue
            given = walk.arguments(user) if user.target == aten.select.int else {}
            layer = given.get("index")
            if given.get("dim") != 0 or not isinstance(layer, int):
                raise MqAoError(f"{user.name} reads {name} otherwise than layer by layer: it cannot become a buffer.")
            user.replace_all_uses_with(self._state(f"{name}_{layer}"))
            self._graph.erase_node(user)

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
            new = self._graph.call_function(aten.add.Tensor, (steps, self._position()))
        places.replace_all_uses_with(new)
        self._graph.erase_node(places)

    def _attend(self, node: Node, caches: Mapping[Node, Node]) -> None:
        a: Any = walk.arguments(node)
        keys, values = a["past_key"], a["past_value"]
        if caches.get(keys) is not a["key"] or caches.get(values) is not a["value"] or a["starts"] or a["key_scale"]:
            return
        kept = [*(self._buffer(str(cache.target)) for cache in (keys, values)), self._position()]
        with self._graph.inserting_before(node):
            args = (a["query"], a["key"], a["value"], a["scaling"], *kept)
            new = self._graph.call_function(mq.attention_into_cache.default, args)
        node.replace_all_uses_with(new)
        self._graph.erase_node(node)


def _stacked(stack: Any, name: str) -> list[Node]:
    if not isinstance(stack, Node) or stack.target != aten.stack.default:
        raise MqAoError(f"the graph's output {name} is not a stack of the layers' states: it cannot become a buffer.")
    return list(walk.inputs(stack))
