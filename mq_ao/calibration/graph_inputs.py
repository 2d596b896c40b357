"""Calibration data as the inputs of a captured graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mq_ao.calibration.calls import Call, calls
from mq_ao.compat.trees import TreeSpec, call_structure, leaves_as
from mq_ao.errors import MqAoError
from mq_ao.graph.partial import Batch
from mq_ao.models.states import States, Value, tensors

_ABSENT = object()


class Calibration:
    """What a model is calibrated on. It is read once, as the graph's inputs are asked for.

    Args:
        model: that the data is for.
        data: batches of its inputs; see `calls`.
        vocab_size: of a language model, to check token ids against.
        takes_mask: whether the model has a use for an `attention_mask`.

    Attributes:
        first: the first call, which is there to capture the model from.
        tokens: how many token ids were read so far, without padding.

    Raises:
        MqAoError: there is no batch, or the first is none.
    """

    def __init__(
        self, model: nn.Module, data: Iterable[Any], vocab_size: int | None = None, *, takes_mask: bool = True
    ) -> None:
        self._calls = calls(model, data, vocab_size, takes_mask=takes_mask)
        first = next(self._calls, None)
        if first is None:
            raise MqAoError("calibration is empty: give at least one batch of inputs.")
        self.first: Call = first
        self.tokens = 0

    def close(self) -> None:
        """Reads no more: a generator of the user's is closed."""
        self._calls.close()

    def inputs(self, graph: GraphModule, states: States | None = None) -> Iterator[Batch]:
        """Yields each call as inputs of the graph, in its order.

        Args:
            graph: captured from the first call.
            states: of a language model that is given ids alone: zero states are added.

        Raises:
            MqAoError: a call has other inputs than the graph, or other constants than it was captured with.
        """
        order = _Order(graph)
        zeros: dict[int, tuple[Value, ...]] = {}
        for call in chain([self.first], self._calls):
            args, kwargs = call.args, call.kwargs
            if states is not None and len(args) + len(kwargs) == 1:
                ids = next(iter((*args, *kwargs.values())))
                # One pair for all batches of a size: nothing writes to it.
                if ids.shape[0] not in zeros:
                    zeros[ids.shape[0]] = states.zeros(ids.shape[0])
                args, kwargs = (ids, *tensors(zeros[ids.shape[0]])), {}
            try:
                flat = order.leaves(args, kwargs)
            except MqAoError as error:
                raise MqAoError(f"calibration batch {call.batch}: {error}") from error
            self.tokens += tokens(flat[0])
            yield Batch.of(flat, call.batch)


def tokens(ids: Any) -> int:
    """Number of tokens of a model's first input, or 0 if it holds no token ids."""
    return ids.numel() if isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype == torch.int64 else 0


class _Order:
    """The order in which a graph takes what is in nested arguments, whatever the order of their dictionaries."""

    def __init__(self, graph: GraphModule) -> None:
        structure = call_structure(graph)
        args, kwargs = structure.in_spec.children()
        self._by_position = args.num_children
        self._names: list[str] = [*structure.orig_args[: self._by_position], *kwargs.context]
        self._specs: list[TreeSpec] = [*args.children(), *kwargs.children()]
        self._values = [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        given = dict(zip(self._names, args, strict=False))
        if len(args) > self._by_position or not given.keys().isdisjoint(kwargs):
            raise self._others([*map(str, range(len(args))), *kwargs])
        given |= kwargs
        if given.keys() - set(self._names):
            raise self._others(given)
        flat: list[Any] = []
        for name, spec in zip(self._names, self._specs, strict=True):
            expected = self._values[len(flat) : len(flat) + spec.num_leaves]
            value = given.get(name, _ABSENT)
            if value is _ABSENT:
                if any(isinstance(item, Tensor) for item in expected):
                    raise self._others(given)
                flat += expected
                continue
            leaves = leaves_as(value, spec)
            if leaves is None:
                raise MqAoError(
                    f"{name} is nested otherwise than in the first batch: give the same inputs in every batch."
                )
            for leaf, wanted in zip(leaves, expected, strict=True):
                _check(leaf, wanted, name)
            flat += leaves
        return flat

    def _others(self, given: Iterable[str]) -> MqAoError:
        return MqAoError(
            f"this holds {', '.join(given) or 'nothing'}, and the model was captured with {', '.join(self._names)}: "
            "give the same inputs in every batch."
        )


def _check(leaf: Any, wanted: Any, name: str) -> None:
    if isinstance(wanted, Tensor):
        if not isinstance(leaf, Tensor):
            raise MqAoError(f"{name} is {leaf!r}, where the model was captured with a tensor.")
    elif type(leaf) is not type(wanted) or leaf != wanted:
        raise MqAoError(
            f"{name} is {leaf!r}, and the model was captured with {wanted!r}, which is a constant of the graph now: "
            "give the same in every batch, or quantize once for each."
        )
