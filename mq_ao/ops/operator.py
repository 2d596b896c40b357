"""An operator is a typed function in plain PyTorch, its reference, whose signature is stated nowhere else.

`@operator` reads the schema off it; the function of that name then calls the operator, and its attribute `reference` is
the slow one. What checks and computes otherwise takes the arguments by their names, as `Operands`.
"""

from __future__ import annotations

import functools
import inspect
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from mq_ao.ops import library

P = ParamSpec("P")
R = TypeVar("R")


class Operands:
    """An operator's arguments by their names, defaults filled in."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)  # one by one: the dynamo of PyTorch 2.11 cannot trace an update of `vars`

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no operand {name}.")

    def but(self, **values: Any) -> Operands:
        """The same but for these, which may be others."""
        return Operands(**{**vars(self), **values})


class Operator(Protocol[P, R]):
    """A function that calls an operator.

    Attributes:
        reference: the obviously right implementation in PyTorch, of any device and dtype; it checks its operands.
        operands: the arguments of a call by their names.
        results: checks operands, and gives empty results.
    """

    reference: Callable[P, R]
    operands: Callable[P, Operands]
    results: Callable[[Operands], R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the operator."""


def operator(
    *, results: Callable[[Operands], R], changes: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Defines `mq_ao::name` by its reference, a typed function of that name in plain PyTorch.

    Args:
        results: raises MqAoError on operands that do not fit together, and gives empty results (`like`). It runs before
            the reference, and in its place for FakeTensors.
        changes: arguments that are overwritten.
    """

    def decorate(function: Callable[P, R]) -> Operator[P, R]:
        parameters = inspect.signature(function).parameters
        defaults = {name: value.default for name, value in parameters.items() if value.default is not value.empty}

        def operands(*args: P.args, **kwargs: P.kwargs) -> Operands:
            return Operands(**{**defaults, **dict(zip(parameters, args, strict=False)), **kwargs})

        def fake(*args: P.args, **kwargs: P.kwargs) -> R:
            return results(operands(*args, **kwargs))

        @functools.wraps(function)
        def reference(*args: P.args, **kwargs: P.kwargs) -> R:
            results(operands(*args, **kwargs))
            return function(*args, **kwargs)

        library.define(function.__name__, _schema(function, changes), fake=fake, reference=reference)
        overload = getattr(torch.ops.mq_ao, function.__name__).default

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return overload(*args, **kwargs)

        made = cast("Operator[P, R]", call)
        made.reference, made.operands, made.results = reference, operands, results
        return made

    return decorate


def implements(of: Operator[P, R], **besides: Any) -> Callable[[Callable[[Operands], R]], Callable[..., R]]:
    """Makes a function of `Operands` one of an operator's arguments; `besides` are more of them, with defaults."""
    operands = of.operands

    def decorate(function: Callable[[Operands], R]) -> Callable[..., R]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            return function(operands(*args, **{**besides, **kwargs}))

        return call

    return decorate


def by_reference(of: Operator[..., R], a: Operands) -> R:
    """What an operator's reference gives, for a kernel that does not take these operands."""
    return of.reference(**{name: getattr(a, name) for name in inspect.signature(of).parameters})


def like(x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor on the device of `x`, and of its shape and dtype unless others are given."""
    return x.new_empty(x.shape if shape is None else shape, dtype=dtype or x.dtype)


def _schema(function: Callable[..., Any], changes: tuple[str, ...]) -> str:
    schema = torch.library.infer_schema(function, mutates_args=changes)
    letters = iter(string.ascii_lowercase)
    # Kernels take every int as a plain one: none is a size.
    return re.sub(r"\(a\d+!\)", lambda _: f"({next(letters)}!)", schema.replace("SymInt", "int"))
