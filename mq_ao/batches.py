"""Calibration data as people have it, as inputs of a model.

A batch is a tensor, a tuple or list of positional inputs, or a mapping of keyword inputs such as a tokenizer gives.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from mq_ao.errors import MqAoError
from mq_ao.padding import MASK, unpadded

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


Given = tuple[tuple[Any, ...], dict[str, Any]]

IDS = "input_ids"
"""The name by which models know token ids."""

_FORMS = (
    "give a tensor, a tuple of the model's positional inputs, or a dictionary of its keyword inputs, as a tokenizer "
    "makes with return_tensors='pt'"
)
_UNUSED = frozenset({"labels", "use_cache"})
"""Inputs that a calibration needs nothing of: a loss, and the cache of a generation."""
_CONSTANT = (bool, int, float, type(None))


def calls(
    model: nn.Module, calibration: Iterable[Any], vocab_size: int | None = None, *, takes_mask: bool = True
) -> Iterator[Call]:
    """Yields the calls of a model that a calibration consists of: one or more a batch.

    Floating inputs become float32 and token ids int64. Padding that an `attention_mask` tells is left out.

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
    signature = inspect.signature(model.forward)
    names: set[str] | None = None
    for index, batch in enumerate(calibration):
        what = f"calibration batch {index}"
        for given in _sequences(batch, what):
            named = _bound(model, signature, given, what)
            try:
                parts = [*unpadded(named)]
            except MqAoError as error:
                raise MqAoError(f"{what}: {error}") from error
            for part in parts:
                bound = signature.bind_partial()
                if not takes_mask:
                    part.pop(MASK, None)
                bound.arguments.update(_known(model, signature, part))
                if not bound.arguments:
                    raise MqAoError(
                        f"{what} holds {', '.join(named) or 'nothing'}, and {type(model).__name__}.forward takes "
                        f"{', '.join(signature.parameters) or 'nothing'}: name its inputs so."
                    )
                _check_ids(bound.arguments.get(IDS), vocab_size, what)
                names = names or set(bound.arguments)
                if set(bound.arguments) != names:
                    raise MqAoError(
                        f"{what} holds {', '.join(bound.arguments) or 'nothing'}, and batches before it "
                        f"{', '.join(sorted(names))}: give the same inputs in every batch."
                    )
                yield Call(bound.args, bound.kwargs, index)


def tokens(ids: Any) -> int:
    """Number of tokens of a model's first input, or 0 if it holds no token ids."""
    return ids.numel() if isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype == torch.int64 else 0


def _sequences(batch: Any, what: str) -> Iterator[Given]:
    """Positional and keyword inputs of a batch; of lists of tokens, those of one length at a time."""
    if isinstance(batch, str) or (isinstance(batch, list | tuple) and batch and isinstance(batch[0], str)):
        raise MqAoError(f"{what} is text: tokenize it first, with mq_ao.text or the model's own tokenizer.")
    if isinstance(batch, Mapping):
        for part in _of_one_length({name: value for name, value in batch.items() if not _is_text(value)}):
            yield (), {name: _row(value) for name, value in part.items()}
    elif _is_tokens(batch):
        yield (torch.tensor(batch)[None],), {}
    elif isinstance(batch, list | tuple) and batch and all(map(_is_tokens, batch)):
        for length in sorted({len(row) for row in batch}):
            yield (torch.tensor([[*row] for row in batch if len(row) == length]),), {}
    elif isinstance(batch, Tensor | numpy.ndarray):
        yield (batch,), {}
    elif isinstance(batch, list | tuple) and batch:
        yield tuple(batch), {}
    else:
        raise MqAoError(f"{what} is {_described(batch)}: {_FORMS}.")


def _of_one_length(batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A tokenizer's batch without padding, lists of different lengths, as batches of one length each."""
    ids = batch.get(IDS)
    if not (isinstance(ids, list) and ids and all(map(_is_sequence, ids))):
        yield batch
        return
    lengths = [len(row) for row in ids]
    for length in sorted(set(lengths)):
        rows = [index for index, own in enumerate(lengths) if own == length]
        yield {
            name: [torch.as_tensor(value[row]).tolist() for row in rows]
            if isinstance(value, list) and len(value) == len(lengths)
            else value
            for name, value in batch.items()
        }


def _is_sequence(value: Any) -> bool:
    return _is_tokens(value) or (isinstance(value, Tensor | numpy.ndarray) and value.ndim == 1)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(item) is int for item in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def _row(value: Any) -> Any:
    """A named input; one sequence of numbers, such as a row of a data set holds, is a batch of one."""
    if isinstance(value, list):
        try:
            value = torch.tensor(value)
        except (ValueError, TypeError, RuntimeError):
            return value  # refused below, by its name
    if isinstance(value, numpy.ndarray):
        value = torch.from_numpy(value)
    whole = isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point()
    return value[None] if whole else value


def _bound(model: nn.Module, signature: inspect.Signature, call: Given, what: str) -> dict[str, Any]:
    """A call's inputs by parameter, as tensors; what keyword inputs the model does not know is left in."""
    args, kwargs = call
    try:
        named = dict(signature.bind_partial(*args).arguments)
    except TypeError as error:
        raise MqAoError(f"{what} does not fit {type(model).__name__}.forward: {error}.") from error
    if twice := named.keys() & kwargs.keys():
        raise MqAoError(f"{what} gives {', '.join(sorted(twice))} twice.")
    named |= kwargs
    return {name: _tensors(value, name, what) for name, value in named.items() if value is not None}


def _tensors(value: Any, name: str, what: str) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_tensors(item, name, what) for item in value)
    if isinstance(value, Mapping):
        return {key: _tensors(item, name, what) for key, item in value.items()}
    if isinstance(value, numpy.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, _CONSTANT):
        return value
    if not isinstance(value, Tensor):
        raise MqAoError(f"{what} is {_described(value)} where the model takes {name}: {_FORMS}.")
    value = value.detach()
    if value.is_floating_point():
        value = value.float()
    elif name == IDS and value.dtype not in (torch.int64, torch.bool) and not value.is_complex():
        value = value.long()
    # What was made in inference mode could not be saved for a graph.
    return value.clone() if value.is_inference() else value


def _known(model: nn.Module, signature: inspect.Signature, named: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a model has parameters for, nested as its signature is; others are left out, and logged."""
    parameters = signature.parameters
    rest = next((name for name, item in parameters.items() if item.kind is inspect.Parameter.VAR_KEYWORD), None)
    # transformers' models hand on to their parts whatever else they are called with.
    takes_all = rest is not None and not type(model).__module__.startswith("transformers.")
    kept, others = {}, {}
    for name, value in named.items():
        if name in _UNUSED or (name not in parameters and not takes_all):
            if name != MASK:
                logger.info("%s has no use for %s, which is left out", type(model).__name__, name)
        elif name in parameters:
            kept[name] = value
        else:
            others[name] = value
    return kept | ({rest: others} if rest is not None and others else {})


def _check_ids(ids: Any, vocab_size: int | None, what: str) -> None:
    if not isinstance(ids, Tensor):
        return
    if ids.dtype != torch.int64 or ids.dim() != 2:
        raise MqAoError(f"{what} is {tuple(ids.shape)} {ids.dtype}: token ids are (batch, length) int64.")
    if ids.numel() == 0:
        raise MqAoError(f"{what} is empty, of shape {tuple(ids.shape)}: give at least one token.")
    low, high = int(ids.min()), int(ids.max())
    if vocab_size is not None and not 0 <= low <= high < vocab_size:
        raise MqAoError(
            f"{what} holds token ids {low}..{high}, outside the vocabulary of {vocab_size} tokens: tokenize with the "
            "model's own tokenizer."
        )


def _described(value: Any) -> str:
    if isinstance(value, list | tuple) and not value:
        return f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__}"
