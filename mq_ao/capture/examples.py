"""Example inputs that torch.export can generalise from: it takes a size of 1 for a constant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mq_ao.compat.trees import tree_leaves, tree_map
from mq_ao.errors import MqAoError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs."""


def own(call: Call) -> Call:
    """Copies of the inputs: a program captured from a slice would ask what each input is a slice of."""

    def copied(value: Any) -> Any:
        return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value

    with torch.inference_mode(False):
        return tree_map(copied, call)


def widened(call: Call) -> Call:
    """The inputs with two sequences where there is one, and two tokens where there is one.

    The first tensor says whether there is one of either: whatever has as many along the same axis is repeated.
    """
    call = _repeated(call, 0, lambda first: first.dim() > 1)
    return _repeated(call, 1, lambda first: first.dim() == 2 and not first.is_floating_point())


def _repeated(call: Call, axis: int, applies: Callable[[Tensor], bool]) -> Call:
    first = next((leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)), None)
    if first is None or not applies(first) or first.shape[axis] != 1:
        return call
    sizes = first.shape[: axis + 1]

    def repeat(value: Any) -> Any:
        alike = isinstance(value, Tensor) and value.shape[: axis + 1] == sizes
        return torch.cat([value, value], dim=axis) if alike else value

    return tree_map(repeat, call)


def vary(program: ExportedProgram, call: Call, wide: Call) -> bool:
    """Whether a program captured from `wide` takes any number of what is repeated there."""
    signature = program.graph_signature
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    inputs = [values.get(name) for name in signature.user_inputs if isinstance(name, str)]
    pairs = [pair for pair in zip(tree_leaves(call), tree_leaves(wide), strict=True) if isinstance(pair[0], Tensor)]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    return all(
        isinstance(size, torch.SymInt)
        for (narrow, repeated), value in zip(pairs, tensors, strict=True)
        for size, before, after in zip(value.shape, narrow.shape, repeated.shape, strict=True)
        if before != after
    )


def explicit(module: nn.Module, call: Call) -> Callable[..., Any]:
    """A module's forward with a parameter for each keyword input of `call`: torch.export confuses those in `**kwargs`.

    Raises:
        MqAoError: the inputs do not fit the signature.
    """
    forward, signature = module.forward, inspect.signature(module.forward)
    arguments(module, call)
    named = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    others = call[1].keys() - signature.parameters.keys()
    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in call[1] if name in others]

    def forward_explicit(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return signed(forward_explicit, signature.replace(parameters=[*named, *keywords]))


def signed(forward: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """`forward`, with the signature that torch.export is to name its inputs by."""
    forward.__signature__ = signature  # type: ignore[attr-defined]  # what `inspect.signature` looks for first
    return forward


def every_size(forward: Callable[..., Any], call: Call) -> dict[str, Any]:
    """Dynamic shapes that let every size vary that the model does not fix itself, by parameter of its forward."""
    args, kwargs = tree_map(_varying, call)
    return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)


def arguments(module: nn.Module, call: Call) -> dict[str, Any]:
    """What a module is called with, by parameter.

    Raises:
        MqAoError: the inputs do not fit its signature.
    """
    try:
        return dict(inspect.signature(module.forward).bind(*call[0], **call[1]).arguments)
    except TypeError as error:
        raise MqAoError(f"the inputs do not fit {type(module).__name__}.forward: {error}.") from error


def described(module: nn.Module, call: Call) -> str:
    """The same in words."""
    return ", ".join(f"{name}: {_in_words(value)}" for name, value in arguments(module, call).items())


def _in_words(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _varying(value: Any) -> Any:
    return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None
