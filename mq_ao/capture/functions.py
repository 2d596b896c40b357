"""Finds a function of the user's by the name that he gives it, and every place that refers to it."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from mq_ao.capture.replacing import Replacement, imported

Key = str | Callable[..., Any]
Body = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]
"""What runs instead of a function: it is given the module whose method it is, or None, and the arguments."""


@dataclass(frozen=True)
class Place:
    """An attribute that holds the function.

    Attributes:
        owner: Python module, class or `nn.Module`.
        name: attribute.
    """

    owner: Any
    name: str

    @property
    def function(self) -> Callable[..., Any]:
        """What is there, a static method unwrapped."""
        value = inspect.getattr_static(self.owner, self.name)
        if isinstance(self.owner, nn.Module) and not isinstance(value, staticmethod):
            return getattr(self.owner, self.name)
        found: Callable[..., Any] = value.__func__ if isinstance(value, staticmethod) else value
        return found

    @property
    def is_method(self) -> bool:
        """Whether the function is given its module first."""
        held = inspect.getattr_static(self.owner, self.name)
        return isinstance(self.owner, type) and not isinstance(held, staticmethod)

    def parameters(self) -> inspect.Signature:
        """The function's signature, without the module.

        Raises:
            ValueError: it has none.
        """
        function = self.function
        if isinstance(function, torch.jit.ScriptFunction):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            schema: Any = function.schema
            defaults = {item.name: item.default_value for item in schema.arguments if item.has_default_value()}
            names = [item.name for item in schema.arguments]
            empty = inspect.Parameter.empty
            return inspect.Signature([inspect.Parameter(x, kind, default=defaults.get(x, empty)) for x in names])
        owner = getattr(function, "__self__", None)
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            signature = inspect.signature(owner.forward)
            first = self.is_method or next(iter(signature.parameters), "") == "ctx"
        else:
            signature, first = inspect.signature(function), self.is_method
        return signature.replace(parameters=list(signature.parameters.values())[first:])

    def replaced_by(self, body: Body) -> Replacement:
        """The attribute with a function that calls `body`."""
        owner = self.owner if isinstance(self.owner, nn.Module) else None

        def function(*args: Any, **kwargs: Any) -> Any:
            return body(owner, args, kwargs)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return body(self, args, kwargs)

        if self.is_method:
            return Replacement(self.owner, self.name, method)
        held = isinstance(self.owner, type)
        return Replacement(self.owner, self.name, staticmethod(function) if held else function)


def places(module: nn.Module, key: Key) -> list[Place]:
    """Where the function is that a key of `scans` means; empty if there is none.

    Args:
        module: the model.
        key: "path.of.submodule.method", "path.of.submodule" for its forward, "Class.method" of parts of the model,
            "package.function", "package.Class.method", the name of a function in the file of one of the model's
            classes, or the function.
    """
    if not isinstance(key, str):
        return list(_holding(module, key))
    prefix, _, name = key.rpartition(".")
    parts = dict(module.named_modules())
    if key and key in parts:
        return [Place(parts[key], "forward")]
    if prefix in parts and callable(getattr(parts[prefix], name, None)):
        return [Place(parts[prefix], name)]
    classes = [kind for kind in _classes(module) if prefix in _names(kind) and callable(getattr(kind, name, None))]
    if classes:
        return [Place(kind, name) for kind in classes]
    try:
        function, home = pkgutil.resolve_name(key), pkgutil.resolve_name(prefix) if prefix else None
        if isinstance(home, type):
            return [Place(home, name)]
    except (ImportError, AttributeError, ValueError):
        homes = (vars(sys.modules[kind.__module__]) for kind in _classes(module) if kind.__module__ in sys.modules)
        function = next((home[key] for home in homes if key in home), None)
    return list(_holding(module, function)) if callable(function) else []


def _classes(module: nn.Module) -> list[type]:
    kinds = dict.fromkeys(kind for part in module.modules() for kind in type(part).__mro__)
    return [kind for kind in kinds if issubclass(kind, nn.Module) and kind is not nn.Module]


def _names(kind: type) -> tuple[str, ...]:
    return kind.__name__, kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}"


def _holding(module: nn.Module, function: Any) -> Iterator[Place]:
    """Every attribute of imported modules, of the model's classes and of its parts that is a function."""
    if isinstance(function, MethodType) and isinstance(function.__self__, nn.Module):
        yield Place(function.__self__, function.__name__)
        return
    for owner in [*imported(), *_classes(module), *module.modules()]:
        for name, value in list(vars(owner).items()):
            # Not isinstance: modules hold objects that import or warn when they are asked.
            if value is function or (type(value) is staticmethod and value.__func__ is function):
                yield Place(owner, name)
