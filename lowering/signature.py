"""How a program of any module is called: its inputs and their sizes, and the structure of what it gives."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor

from mq_ao.compat import trees as pytree
from mq_ao.errors import MqAoError
from mq_ao.lowering.guards import Guard
from mq_ao.models.token_inputs import is_plain

_WIDER = frozenset({torch.int32, torch.int16, torch.int8, torch.uint8})
"""What becomes int64 without a loss."""


@dataclass(frozen=True)
class Input:
    """One tensor among the inputs.

    Attributes:
        name: of the argument that holds it.
        dtype: of its values.
        sizes: of its axes; those that vary are names, and equal names are equal sizes.
        count: if its values are row numbers of an embedding, the number of rows.
    """

    name: str
    dtype: str
    sizes: tuple[int | str, ...]
    count: int | None = None

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.sizes))}) {self.dtype}"

    def taken(self, given: Any) -> Tensor:
        """The tensor as compiled code reads it.

        Raises:
            MqAoError: it has another dtype or number of axes, or is no tensor.
        """
        dtype = getattr(torch, self.dtype)
        value = given
        if isinstance(given, numpy.ndarray):
            try:
                value = torch.from_numpy(numpy.array(given, order="C"))
            except TypeError:
                raise self._wrong(f"an array of {given.dtype}") from None
        if not isinstance(value, Tensor) or not is_plain(value):
            raise self._wrong(f"a {type(given).__name__}" + (" without values" if isinstance(given, Tensor) else ""))
        if value.dtype != dtype and not (dtype == torch.int64 and value.dtype in _WIDER):
            raise self._wrong(f"{str(value.dtype)[6:]} of shape {tuple(value.shape)}")
        if value.dim() != len(self.sizes):
            raise self._wrong(f"shape {tuple(value.shape)}")
        value = value.to(dtype)
        if self.count is not None and value.numel():
            least, most = torch.stack(torch.aminmax(value)).tolist()
            if least < 0 or most >= self.count:
                raise MqAoError(f"{self.name} holds {least}..{most}, and the model's embedding has {self.count} rows.")
        return value.detach() if value.requires_grad else value

    def _wrong(self, got: str) -> MqAoError:
        return MqAoError(f"this program takes {self}; got {got}.")


@dataclass(frozen=True)
class Signature:
    """Inputs and results of a program.

    Attributes:
        inputs: its tensors, in the order in which it reads them.
        positions: of these tensors among the leaves of the arguments.
        constants: the other leaves, by position: the program was made for these values.
        names: of the arguments.
        by_position: how many of them were given by position when the module was captured; the others were keywords.
        arguments: structure of the arguments, `(args, kwargs)`, as `compat.trees.treespec_dumps` writes it.
        result: structure of what is given, likewise.
        leaves: of the result: the number of a tensor that the program gives, or a list of one constant.
        least: smallest size by name.
        most: largest size by name, where there is one.
        guards: what else is assumed of sizes; see `Guard`.
    """

    inputs: tuple[Input, ...]
    positions: tuple[int, ...]
    constants: Mapping[int, Any]
    names: tuple[str, ...]
    by_position: int
    arguments: str
    result: str
    leaves: tuple[int | list[Any], ...]
    least: Mapping[str, int]
    most: Mapping[str, int]
    guards: tuple[str, ...] = ()

    @property
    def described(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "constants": {str(key): value for key, value in self.constants.items()}}

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Signature:
        """From what `described` gave, after a while in a file."""
        values: dict[str, Any] = dict(described)
        for name in ("positions", "names", "leaves", "guards"):
            values[name] = tuple(described[name])
        values["inputs"] = tuple(Input(**{**item, "sizes": tuple(item["sizes"])}) for item in described["inputs"])
        values["constants"] = {int(key): value for key, value in described["constants"].items()}
        return cls(**values)

    def __str__(self) -> str:
        text = ", ".join(map(str, self.inputs))
        ranges = [
            f"{low} <= {name}" + (f" <= {self.most[name]}" if name in self.most else "")
            for name, low in self.least.items()
        ]
        return "; ".join([text, *ranges])

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that the program reads, of a call; all are checked.

        Raises:
            MqAoError: arguments are too many, missing or unknown, or a tensor's dtype, sizes or values do not fit.
        """
        leaves = pytree.leaves_as(self._arranged(args, kwargs), self._arguments)
        if leaves is None:
            raise self._refused("the arguments are nested otherwise")
        for position, constant in self.constants.items():
            value = leaves[position]
            if type(value) is not type(constant) or value != constant:
                shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise self._refused(f"it was made with {constant!r} where {shown} is given")
        tensors = [item.taken(leaves[at]) for item, at in zip(self.inputs, self.positions, strict=True)]
        self._check_sizes(tensors)
        return tensors

    def restore(self, outputs: Sequence[Tensor]) -> Any:
        """What the module gives, from the tensors that the program gives."""
        values = [leaf[0] if isinstance(leaf, list) else outputs[leaf] for leaf in self.leaves]
        return pytree.tree_unflatten(values, self._result)

    def _arranged(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by position and by keyword, as when the module was captured; constants may be left out."""
        if len(args) > self.by_position:
            names = ", ".join(self.names[self.by_position :])
            raise self._refused(f"{len(args)} arguments are given" + (f": give {names} by name" if names else ""))
        given = dict(zip(self.names, args, strict=False))
        if twice := sorted(given.keys() & kwargs.keys()):
            raise self._refused(f"{', '.join(twice)} is given twice")
        given = {**self._defaults, **given, **kwargs}
        if missing := [name for name in self.names if name not in given]:
            raise self._refused(f"{', '.join(missing)} is missing")
        # None is what a model takes where nothing is given.
        given = {name: value for name, value in given.items() if name in self.names or value is not None}
        if unknown := [name for name in given if name not in self.names]:
            raise self._refused(f"{', '.join(unknown)} is no argument of it")
        first, rest = self.names[: self.by_position], self.names[self.by_position :]
        return tuple(given[name] for name in first), {name: given[name] for name in rest}

    def _check_sizes(self, tensors: Sequence[Tensor]) -> None:
        sizes: dict[str, int] = {}
        for item, tensor in zip(self.inputs, tensors, strict=True):
            for axis, (wanted, size) in enumerate(zip(item.sizes, tensor.shape, strict=True)):
                expected = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
                if size != expected:
                    raise self._refused(f"axis {axis} of {item.name} is {size} where {expected} is needed")
        for name, least in self.least.items():
            most = self.most.get(name, sizes[name])
            if not least <= sizes[name] <= most:
                raise self._refused(f"{name} is {sizes[name]}")
        shapes = [tensor.shape for tensor in tensors]
        for guard in self._guards:
            if not guard.holds(shapes):
                names = dict(enumerate(item.name for item in self.inputs))
                raise self._refused(
                    f"shapes {', '.join(str(tuple(shape)) for shape in shapes)} are not as it was captured for: "
                    f"{guard.described(names)}"
                )

    def _refused(self, why: str) -> MqAoError:
        return MqAoError(f"this program takes {self}; {why}.")

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        """Arguments that are constants."""
        missing = object()
        leaves = [self.constants.get(at, missing) for at in range(len(self.positions) + len(self.constants))]
        args, kwargs = pytree.tree_unflatten(leaves, self._arguments)
        values = zip(self.names, (*args, *kwargs.values()), strict=True)
        return {name: value for name, value in values if value is None or isinstance(value, bool | int | float | str)}

    @cached_property
    def _guards(self) -> tuple[Guard, ...]:
        return tuple(map(Guard, self.guards))

    @cached_property
    def _arguments(self) -> pytree.TreeSpec:
        return structure(self.arguments)

    @cached_property
    def _result(self) -> pytree.TreeSpec:
        return structure(self.result)


def structure(text: str) -> pytree.TreeSpec:
    """A structure that `compat.trees.treespec_dumps` wrote; libraries whose types are in it are imported.

    Raises:
        MqAoError: a library is not installed, or does not have the type.
    """
    for name in _types(json.loads(text)[1]):
        module = name.rpartition(".")[0]
        if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and module:
            try:
                importlib.import_module(module)
            except ImportError:
                raise _foreign(name) from None
    try:
        return pytree.treespec_loads(text)
    except (NotImplementedError, KeyError, ValueError, AttributeError, ImportError):  # pytree has no error of its own
        raise _foreign(", ".join(_types(json.loads(text)[1]))) from None


def _foreign(name: str) -> MqAoError:
    return MqAoError(f"this program takes or gives a {name}, which this Python does not have: install its library.")


def _types(described: Mapping[str, Any]) -> list[str]:
    below = [name for child in described["children_spec"] for name in _types(child)]
    return below if described["type"] is None else [described["type"], *below]
