"""A graph as a list of operator calls: what a file can hold, and C++ runs without a compiler (`plan.cpp`)."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.compat.operators import OpOverload
from mq_ao.errors import MqAoError

SIZES: Mapping[Any, str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.floordiv: "floordiv",
    operator.mod: "mod",
    torch.sym_max: "max",
    torch.sym_min: "min",
}
"""What is computed of two sizes, as the plan calls it."""
LIBRARIES = ("aten", "mq_ao")
"""Of operators that a plan may call: those with kernels that need no Python."""
_CHECKS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)
"""Of sizes: programs check what they are given before a plan runs."""


@dataclass(frozen=True)
class Value:
    """The value of that number: weights come first, then inputs, then what the steps give."""

    place: int


@dataclass(frozen=True)
class Step:
    """A call.

    Attributes:
        target: `library::operator.overload`, or an operation on sizes, of `SIZES`.
        arguments: all of them in the order of the schema: constants, `Value`, or lists of both.
        results: numbers of the values that it gives; None for one that nobody reads.
    """

    target: str
    arguments: tuple[Any, ...]
    results: tuple[int | None, ...]

    @property
    def described(self) -> list[Any]:
        """As JSON can hold it."""
        return [self.target, [_written(item) for item in self.arguments], list(self.results)]

    @classmethod
    def read(cls, described: Sequence[Any]) -> Step:
        """From what `described` gave."""
        target, arguments, results = described
        return cls(str(target), tuple(map(_read, arguments)), tuple(results))

    @property
    def places(self) -> list[list[int]]:
        """Which arguments are values, as `plan.cpp` reads it."""
        return [_places(item) for item in self.arguments]


@dataclass(frozen=True)
class Plan:
    """All calls of a graph.

    Attributes:
        inputs: how many tensors it takes.
        steps: the calls, in order.
        outputs: numbers of the values that it gives.
    """

    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    @property
    def described(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"inputs": self.inputs, "steps": [step.described for step in self.steps], "outputs": list(self.outputs)}

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Plan:
        """From what `described` gave."""
        steps = tuple(map(Step.read, described["steps"]))
        return cls(int(described["inputs"]), steps, tuple(map(int, described["outputs"])))

    @classmethod
    def of(cls, module: GraphModule, weights: int) -> Plan:
        """The plan of a flat graph without constants.

        Args:
            module: takes tensors, of which the first `weights` are weights, and gives a tuple of tensors.
            weights: how many of the inputs are weights.

        Raises:
            MqAoError: the graph has something else than operators of `LIBRARIES` and arithmetic on sizes.
        """
        return _Planner(module, weights).plan()

    def bound(self, weights: Sequence[Tensor]) -> Any:
        """The plan on its weights, ready to `run([Tensor]) -> [Tensor]`; the native kernels must be loaded.

        Raises:
            MqAoError: a step calls what no plan may call.
            RuntimeError: the steps do not fit together, or this PyTorch has no such operator.
        """
        made = torch.classes.mq_ao.Plan(list(weights), self.inputs)
        for step in self.steps:
            results = [-1 if place is None else place for place in step.results]
            if step.target in SIZES.values():
                numbers = [item if isinstance(item, int) else 0 for item in step.arguments]
                made.size(step.target, numbers, step.places, results[0])
                continue
            library, _, name = step.target.partition("::")
            if library not in LIBRARIES:
                raise MqAoError(f"a plan calls {step.target}, which is no operator of {' or '.join(LIBRARIES)}.")
            name, _, overload = name.partition(".")
            constants = tuple(map(_constant, step.arguments))
            made.call(f"{library}::{name}", "" if overload == "default" else overload, constants, step.places, results)
        made.finish(list(self.outputs))
        return made


class _Planner:
    """Numbers the values of a graph in the order in which they come."""

    def __init__(self, module: GraphModule, weights: int) -> None:
        self._graph = module.graph
        self._weights = weights
        self._numbers: dict[Node, int] = {}
        self._count = 0

    def plan(self) -> Plan:
        placeholders = self._graph.find_nodes(op="placeholder")
        for node in placeholders:
            self._number(node)
        steps = tuple(self._steps())
        (output,) = self._graph.find_nodes(op="output")
        results: Any = output.args[0]
        return Plan(len(placeholders) - self._weights, steps, tuple(self._numbers[node] for node in results))

    def _steps(self) -> Iterator[Step]:
        for node in self._graph.nodes:
            if node.op in ("placeholder", "output") or node in self._numbers or node.target in _CHECKS:
                continue
            if node.op != "call_function":
                raise _refused(node)
            if node.target is operator.getitem:
                if node.users:
                    raise _refused(node)  # of something else than an operator's results
            elif node.target in SIZES or node.target is operator.neg:
                name, given = (
                    ("sub", (0, *node.args)) if node.target is operator.neg else (SIZES[node.target], node.args)
                )
                arguments = tuple(map(self._argument, given))
                yield Step(name, arguments, (self._number(node),))
            else:
                yield self._call(node)

    def _call(self, node: Node) -> Step:
        overload = node.target
        if not isinstance(overload, OpOverload) or overload.namespace not in LIBRARIES:
            raise _refused(node)
        schema = overload._schema
        given = {**dict(zip((item.name for item in schema.arguments), node.args, strict=False)), **node.kwargs}
        arguments = tuple(self._argument(given.get(item.name, item.default_value)) for item in schema.arguments)
        target = f"{overload.namespace}::{schema.name.partition('::')[2]}.{overload._overloadname}"
        return Step(target, arguments, self._results(node, schema.returns))

    def _results(self, node: Node, returns: Sequence[Any]) -> tuple[int | None, ...]:
        """Numbers of the results; those of several are what `getitem` reads."""
        listed = len(returns) == 1 and isinstance(returns[0].type, torch.ListType)
        if len(returns) == 1 and not listed:
            return (self._number(node),)
        count = len(node.meta["val"]) if listed else len(returns)
        readers: dict[int, list[Node]] = {}
        for user in node.users:
            if user.target is not operator.getitem or not isinstance(user.args[1], int):
                raise _refused(user)
            readers.setdefault(user.args[1] % count, []).append(user)
        results: list[int | None] = []
        for index in range(count):
            nodes = readers.get(index, [])
            results.append(self._number(*nodes) if nodes else None)
        return tuple(results)

    def _number(self, *nodes: Node) -> int:
        for node in nodes:
            self._numbers[node] = self._count
        self._count += 1
        return self._count - 1

    def _argument(self, given: Any) -> Any:
        if isinstance(given, Node):
            return Value(self._numbers[given])
        if isinstance(given, list | tuple):
            return [self._argument(item) for item in given]
        return given


def _refused(node: Node) -> MqAoError:
    return MqAoError(
        f"{node.name} is {node.target}, which the native backend cannot run: it runs operators of "
        f"{' and '.join(LIBRARIES)}. Use backend 'inductor'."
    )


def _places(argument: Any) -> list[int]:
    if isinstance(argument, Value):
        return [argument.place]
    if isinstance(argument, list) and any(isinstance(item, Value) for item in argument):
        return [item.place if isinstance(item, Value) else -1 for item in argument]
    return []


_NAMED = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}
"""Types whose objects are attributes of torch."""


def _written(argument: Any) -> Any:
    """An argument as JSON can hold it."""
    if isinstance(argument, Value):
        return {"value": argument.place}
    if isinstance(argument, list):
        return [_written(item) for item in argument]
    if isinstance(argument, torch.device):
        return {"device": str(argument)}
    if (kind := _NAMED.get(type(argument))) is not None:
        return {kind: str(argument).removeprefix("torch.")}
    return argument


def _read(written: Any) -> Any:
    if isinstance(written, list):
        return [_read(item) for item in written]
    if not isinstance(written, dict):
        return written
    ((kind, name),) = written.items()
    if kind == "value":
        return Value(int(name))
    if kind == "device":
        return torch.device(name)
    value = getattr(torch, str(name), None)
    if type(value) not in _NAMED or _NAMED[type(value)] != kind:
        raise ValueError(f"{written} is no argument of an operator")
    return value


def _constant(argument: Any) -> Any:
    """An argument as `plan.cpp` takes it: lists as tuples, which may hold anything."""
    if isinstance(argument, Value):
        return None
    return tuple(map(_constant, argument)) if isinstance(argument, list) else argument
