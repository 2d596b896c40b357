"""Calibration data as calls of a model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader

from mq_ao.arrays import as_tensor
from mq_ao.calibration.batches import FORMS, IDS, MASK, Given, described, is_text, sequences
from mq_ao.calibration.padding import unpadded
from mq_ao.compat.trees import call_structure, tree_leaves, tree_map_only
from mq_ao.errors import MqAoError
from mq_ao.models.token_inputs import is_plain, token_ids
from mq_ao.modes import plain
from mq_ao.turns import yielding_turns

logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """One call of a model.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs.
        batch: number of the calibration batch that it is of; a batch of several lengths makes several calls.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int


_UNUSED = frozenset({"labels", "use_cache"})
"""Inputs of transformers' models that a calibration needs nothing of: a loss, and the cache of a generation."""
_PACKED = frozenset({"seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"})
_CONSTANT = (bool, int, float, str, type(None))


def calls(
    model: nn.Module, calibration: Iterable[Any], vocab_size: int | None = None, *, takes_mask: bool = True
) -> Generator[Call]:
    """Yields the calls of a model that a calibration consists of: one or more a batch.

    Floating inputs become float32 and token ids int64. Padding that an `attention_mask` tells is left out. While the
    data is read, other threads may have their turn (see `turns`).

    Args:
        model: whose forward is called; its signature gives positional inputs their names.
        calibration: the batches.
        vocab_size: of a language model, to check token ids against; None: not known.
        takes_mask: whether the model has a use for an `attention_mask`, which is left out else.

    Raises:
        MqAoError: something is no batch, no input of the model, or holds ids that are none of its tokens.
    """
    if isinstance(calibration, Tensor | Mapping | str | bytes) or not isinstance(calibration, Iterable):
        kind = "one tensor" if isinstance(calibration, Tensor) else f"of type {type(calibration).__name__}"
        raise MqAoError(f"calibration is {kind}: give an iterable of batches, for example [batch].")
    forward = _Forward(model, takes_mask)
    # Whatever else makes batches may make them all in one memory.
    keeps = isinstance(calibration, list | tuple | DataLoader)
    with closing(yielding_turns(calibration)) as batches:
        for index, batch in enumerate(batches):
            try:
                with plain():  # whatever made the batch
                    parts = [forward.call(part, vocab_size) for part in forward.parts(batch)]
                    if not keeps:
                        parts = tree_map_only(Tensor, torch.clone, parts)
            except MqAoError as error:
                raise MqAoError(f"calibration batch {index}: {error}") from error
            for args, kwargs in parts:
                yield Call(args, kwargs, index)


class _Forward:
    """What a model takes."""

    def __init__(self, model: nn.Module, takes_mask: bool) -> None:
        self._kind = type(model).__name__
        self._signature = _signature(model)
        parameters = self._signature.parameters.values()
        self._names = [item.name for item in parameters if item.kind is not item.VAR_KEYWORD]
        self._unnamed = [item.name for item in parameters if item.kind is item.VAR_POSITIONAL]
        self._rest = next((item.name for item in parameters if item.kind is item.VAR_KEYWORD), None)
        # transformers' models hand on to their parts whatever else they are called with.
        self._theirs = type(model).__module__.startswith("transformers.")
        self._takes_all = self._rest is not None and not self._theirs
        self._takes_mask = takes_mask and self._has(MASK)
        self._left_out: set[str] = set()

    def parts(self, batch: Any) -> Iterator[dict[str, Any]]:
        """The inputs of a batch by parameter, of one length each and without padding."""
        for inputs in sequences(batch, self._reads):
            named = self._bound(inputs)
            if not named:
                held = ", ".join(batch) if isinstance(batch, Mapping) else ""
                raise MqAoError(
                    f"this holds {held or 'nothing'}, and {self._kind}.forward takes "
                    f"{', '.join(self._signature.parameters) or 'nothing'}: name its inputs so."
                )
            given = {name: _tensors(value, name) for name, value in named.items()}
            if not self._takes_mask and isinstance(mask := given.get(MASK), Tensor) and mask.dim() != 2:
                raise MqAoError(f"attention_mask is of shape {tuple(mask.shape)}: {self._kind} has no use for one.")
            yield from unpadded(given)

    def call(self, named: dict[str, Any], vocab_size: int | None) -> Given:
        """The call that has these inputs."""
        for name, value in named.items():
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf.numel() == 0:
                    raise MqAoError(f"{name} is empty, of shape {tuple(leaf.shape)}: leave the batch out.")
        if IDS in named:
            named[IDS] = token_ids(named[IDS], vocab_size)
        arguments = {name: value for name, value in named.items() if name in self._names}
        others = {name: value for name, value in named.items() if name not in self._names}
        if not self._takes_mask:
            arguments.pop(MASK, None)
            others.pop(MASK, None)
        bound = self._signature.bind_partial()
        bound.arguments.update(arguments)
        if self._rest is not None and others:
            bound.arguments[self._rest] = others
        return bound.args, bound.kwargs

    def _has(self, name: str) -> bool:
        return (name in self._names and name not in self._unnamed) or self._takes_all

    def _reads(self, name: str, value: Any) -> bool:
        """Whether an input is of use: the model takes it, or it tells what is padding."""
        if is_text(value):
            known = name in self._names and isinstance(value, str)
        else:
            known = name == MASK or (self._has(name) and not (self._theirs and name in _UNUSED))
        if known:
            return True
        if name in _PACKED:
            raise MqAoError(f"{name} says that sequences are packed: give one sequence a row instead.")
        if name not in self._left_out:
            self._left_out.add(name)
            logger.info("%s has no use for %s, which is left out", self._kind, name)
        return False

    def _bound(self, given: Given) -> dict[str, Any]:
        """Inputs by parameter; `*args` is one, whose value is a tuple."""
        args, kwargs = given
        try:
            named = dict(self._signature.bind_partial(*args).arguments)
        except TypeError as error:
            keywords = [item.name for item in self._signature.parameters.values() if item.kind is item.KEYWORD_ONLY]
            hint = f" ({', '.join(keywords)} by name)" if keywords else ""
            raise MqAoError(f"this does not fit {self._kind}.forward{hint}: {error}.") from error
        if twice := named.keys() & kwargs.keys():
            raise MqAoError(f"{', '.join(sorted(twice))} is given twice.")
        named |= kwargs
        return {
            name: value
            for name, value in named.items()
            if not self._is_left_out(name, value) and (name in self._unnamed or self._reads(name, value))
        }

    def _is_left_out(self, name: str, value: Any) -> bool:
        """Whether it is None, which is what the model takes where nothing is given."""
        parameter = self._signature.parameters.get(name)
        return value is None and (parameter is None or parameter.default is None)


def _signature(model: nn.Module) -> inspect.Signature:
    """A model's signature; a captured graph takes by position what it was captured with so, and the rest by name."""
    signature = inspect.signature(model.forward)
    if not isinstance(model, GraphModule):
        return signature
    by_position = call_structure(model).in_spec.child(0).num_children
    parameters = list(signature.parameters.values())
    named = [item.replace(kind=item.KEYWORD_ONLY) for item in parameters[by_position:]]
    return signature.replace(parameters=[*parameters[:by_position], *named])


def _tensors(value: Any, name: str) -> Any:
    """A value with tensors for arrays, of the dtypes that are captured."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_tensors(item, name) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_tensors(item, name) for item in value)
    if isinstance(value, Mapping):
        return {key: _tensors(item, name) for key, item in value.items()}
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, _CONSTANT):
        return value
    tensor = as_tensor(value) if isinstance(value, Tensor | numpy.ndarray) else None
    if tensor is None:
        raise MqAoError(f"{name} is {described(value)}: {FORMS}.")
    if not is_plain(tensor):
        raise MqAoError(f"{name} has no plain values in memory ({tensor.device.type}, {tensor.layout}): {FORMS}.")
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.float()
    # What was made in inference mode could not be saved for a graph.
    return tensor.clone() if tensor.is_inference() else tensor
