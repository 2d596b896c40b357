"""From the lowered graph of any module to the exported program of one forward pass, and how that is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from mq_ao.compat import trees as pytree
from mq_ao.compat.tracing import FakeTensorMode, size_checks, size_guards
from mq_ao.errors import MqAoError, first_line
from mq_ao.graph import walk
from mq_ao.graph.buffers import written
from mq_ao.graph.views import Layer
from mq_ao.lowering.guards import Guard
from mq_ao.lowering.language_graphs import export, flat
from mq_ao.lowering.signature import Input, Signature

aten = torch.ops.aten
_LENGTHS = ((1, 2), (1, 3))
"""Axes, of inputs of so many axes, that are called so in messages."""
Sizes = dict[sympy.Symbol, int]


def export_module(
    module: GraphModule,
    batch: int | None = None,
    largest: int | None = None,
    operators: Mapping[Any, Callable[..., Any]] | None = None,
) -> tuple[ExportedProgram, Signature]:
    """Exports a graph that takes and gives any structure as one of tensors alone, and says how it is called.

    Sizes that varied when the module was captured vary still, as far as nothing in the graph fixes them.

    Args:
        module: lowered, with the structure of the captured module; it is not changed.
        batch: the one size of the first input's first axis, if that varies; None: it goes on varying.
        largest: of sizes that vary; None: there is none.
        operators: functions that are traced in the place of operators.

    Raises:
        MqAoError: an input or a result is neither a tensor nor a constant, or a size does not suit it.
    """
    info = pytree.call_structure(module)
    graph_module = flat(module)
    constants = _take_constants(graph_module)
    leaves = _take_results(graph_module)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    values = [node.meta["val"] for node in placeholders]
    fixed = _batch(values, batch)
    shapes = _examples(values, fixed, largest)
    args = tuple(torch.zeros(shape, dtype=value.dtype) for shape, value in zip(shapes, values, strict=True))
    vary = Dim.AUTO if largest is None else Dim.AUTO(max=largest)
    dynamic: Any = tuple(dict.fromkeys(_varying(value, fixed), vary) for value in values)
    try:
        exported = export(graph_module, args, dynamic, operators)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = first_line(error)
        raise MqAoError(f"the graph cannot be exported for inputs of shapes {shapes}: {reason}") from error
    positional, keywords = pytree.tree_unflatten(range(info.in_spec.num_leaves), info.in_spec)
    inputs, least, most = _sizes(exported, placeholders)
    return exported, Signature(
        inputs=inputs,
        positions=tuple(index for index in range(info.in_spec.num_leaves) if index not in constants),
        constants=constants,
        names=(*info.orig_args[: len(positional)], *keywords),
        by_position=len(positional),
        arguments=_dumped(info.in_spec),
        result=_dumped(info.out_spec),
        leaves=leaves,
        least=least,
        most=most,
        guards=tuple(guard.text for guard in map(Guard.of, size_guards(exported))),
    )


def refuse_memory(converted: GraphModule) -> None:
    """Raises MqAoError if a graph writes to its buffers: a saved program keeps nothing between calls."""
    if (name := written(converted)) is not None:
        raise MqAoError(
            f"the module writes to its buffer {name}: a saved program keeps nothing between calls. Give it as an "
            "input, and return what it becomes."
        )


def _take_constants(module: GraphModule) -> dict[int, Any]:
    """Takes inputs that are no tensors out of a flat graph: torch.export made the graph for their values."""
    constants = {}
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            continue
        for check in size_checks(module):
            check.args = tuple(value if item is node else item for item in check.args)
        if node.users or not (value is None or isinstance(value, bool | int | float | str)):
            raise MqAoError(f"input {node.name} is neither a tensor nor a constant: a saved program cannot take it.")
        constants[index] = value
        module.graph.erase_node(node)
    return constants


def _take_results(module: GraphModule) -> tuple[int | list[Any], ...]:
    """Leaves only tensors, each once, among the results of a flat graph; returns what stands for each result."""
    (output,) = module.graph.find_nodes(op="output")
    results: Any = output.args[0]
    tensors: dict[Node, int] = {}
    leaves: list[int | list[Any]] = []
    for result in results:
        if not isinstance(result, Node):
            if not (result is None or isinstance(result, bool | int | float | str)):
                raise MqAoError(f"the model gives {result!r}: a saved program gives tensors and constants alone.")
            leaves.append([result])
        elif isinstance(result.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
            raise MqAoError(f"the model gives {result.name}, which is no tensor: a saved program cannot give it.")
        else:
            leaves.append(tensors.setdefault(result, len(tensors)))
    if not tensors:
        raise MqAoError("the model gives no tensor: there is nothing to run.")
    output.args = (tuple(tensors),)
    module.recompile()
    return tuple(leaves)


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def _batch(values: Sequence[Tensor], batch: int | None) -> Sizes:
    """The size of the first axis, if it varies and is to be fixed."""
    first = next((_expression(value.shape[0]) for value in values if value.dim()), None)
    return {first: batch} if batch is not None and isinstance(first, sympy.Symbol) else {}


def _varying(value: Tensor, fixed: Sizes) -> list[int]:
    """Axes of an input whose size varies."""
    return [axis for axis, size in enumerate(value.shape) if not _expression(size).subs(fixed).is_number]


def _examples(values: Sequence[Tensor], fixed: Sizes, largest: int | None) -> list[tuple[int, ...]]:
    """Shapes to export with: as the module was captured, where nothing else is said."""
    sizes: Sizes = dict(fixed)
    for value in values:
        for size in value.shape:
            if isinstance(size, SymInt) and isinstance(name := _expression(size), sympy.Symbol):
                hint = int(size.node.hint)
                sizes.setdefault(name, hint if largest is None else min(hint, largest))
    return [tuple(int(_expression(size).subs(sizes)) for size in value.shape) for value in values]


def _sizes(
    exported: ExportedProgram, placeholders: Sequence[Node]
) -> tuple[tuple[Input, ...], dict[str, int], dict[str, int]]:
    """The inputs of an exported graph, and the smallest and largest sizes of those axes that vary."""
    by_name = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    nodes = [by_name[name] for name in exported.graph_signature.user_inputs]
    values = [node.meta["val"] for node in nodes]
    names: dict[sympy.Expr, str] = {}
    for value in values:
        for axis, size in enumerate(value.shape):
            expression = _expression(size)
            if not expression.is_number and expression not in names:
                kind = "batch" if axis == 0 else "length" if (axis, value.dim()) in _LENGTHS else f"size{axis}"
                taken = sum(name.startswith(kind) for name in names.values())
                names[expression] = kind + (f"_{taken}" if taken else "")
    inputs = tuple(
        Input(
            str(node.target),
            str(value.dtype)[6:],
            tuple(names.get(_expression(size)) or int(_expression(size)) for size in value.shape),
            _rows(read),
        )
        for node, read, value in zip(placeholders, nodes, values, strict=True)
    )
    ranges = {name: exported.range_constraints[name] for name in names if isinstance(name, sympy.Symbol)}
    ones = _sizes_of_one(exported, values, [name for name, limits in ranges.items() if limits.lower == 2])
    least = {names[name]: 1 if name in ones else int(limits.lower) for name, limits in ranges.items()}
    most = {names[name]: int(limits.upper) for name, limits in ranges.items() if limits.upper.is_Integer}
    return inputs, least, most


def _rows(node: Node) -> int | None:
    """Rows of the embedding that an input's values are looked up in, if they are."""
    counts = [
        Layer.of(user).weight.meta["val"].shape[0]
        for user in node.users
        if user.target in walk.EMBEDDING and Layer.of(user).x is node
    ]
    below = [_rows(user) for user in node.users if user.target in walk.TRANSPARENT]
    known = [int(count) for count in [*counts, *below] if count is not None]
    return min(known, default=None)


def _sizes_of_one(exported: ExportedProgram, values: Sequence[Tensor], names: Sequence[Any]) -> set[Any]:
    """Those of these sizes that may be 1.

    torch.export takes for granted that a size that varies is 2 or more, also where 1 would do. It does where all shapes
    in the graph come out as they are written there, since that is all that compiled code knows.
    """
    varying: list[Any] = [size for value in values for size in value.shape if isinstance(size, SymInt)]
    hints = {_expression(size): int(size.node.hint) for size in varying if isinstance(_expression(size), sympy.Symbol)}
    module = exported.module(check_guards=False)
    alone = {name for name in names if _holds(module, values, {**hints, name: 1})}
    together = {**hints, **dict.fromkeys(alone, 1)}
    return alone if len(alone) < 2 or _holds(module, values, together) else set()


def _holds(module: Any, values: Sequence[Tensor], sizes: Sizes) -> bool:
    """Whether every shape in a graph is as written there, for inputs of these sizes."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        shapes = [[int(_expression(size).subs(sizes)) for size in value.shape] for value in values]
        inputs = [
            mode.from_tensor(torch.zeros(shape, dtype=value.dtype)) for shape, value in zip(shapes, values, strict=True)
        ]
        try:
            _Checking(module, sizes).run(*inputs)
        except (RuntimeError, AssertionError, MqAoError, IndexError, ValueError, TypeError):
            return False
    return True


class _Checking(Interpreter):
    """Runs a graph on fake tensors, and raises AssertionError at a shape that is not as written."""

    def __init__(self, module: GraphModule, sizes: Sizes) -> None:
        super().__init__(module)
        self._sizes = sizes

    def run_node(self, n: Node) -> Any:
        """Runs a node, and compares what it gives."""
        result = super().run_node(n)
        written = pytree.tree_leaves(n.meta.get("val"))
        if n.op == "call_function":
            for got, expected in zip(pytree.tree_leaves(result), written, strict=True):
                assert self._shape(got) == self._shape(expected), f"{n.name} has another shape"
        return result

    def _shape(self, value: Any) -> tuple[Any, ...] | None:
        if isinstance(value, Tensor):
            return tuple(int(_expression(size).subs(self._sizes)) for size in value.shape)
        return (int(_expression(value).subs(self._sizes)),) if isinstance(value, int | SymInt) else None


def _dumped(structure: pytree.TreeSpec) -> str:
    """A structure as text.

    Raises:
        MqAoError: a type in it cannot be written.
    """
    try:
        return pytree.treespec_dumps(structure)
    except (NotImplementedError, TypeError, ValueError) as error:  # pytree has no error of its own
        raise MqAoError(f"a saved program cannot take or give these types: {error}") from error
