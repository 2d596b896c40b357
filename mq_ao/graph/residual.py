"""Residual-stream analysis: who writes and who reads values that share one set of channels.

An orthogonal rotation of the channels is a change of basis that no norm without weight sees. It is legal only if
everything that writes into the stream and everything that reads from it is known (docs/design.md, decision 4).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.graph import walk
from mq_ao.graph.block import Block
from mq_ao.graph.edit import channels, is_constant
from mq_ao.graph.rows import channel_source
from mq_ao.graph.views import Layer, Linear, Norm

aten = walk.aten

NORM = walk.NORM

SELECTING = walk.COPYING | {aten.index_select.default, aten.select.int, aten.slice.Tensor}
"""Operators that hand on some or all rows of their input."""

MOVING = frozenset(
    {
        aten.flatten.using_ints,
        aten.permute.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.unflatten.int,
        aten.view.default,
    }
)
"""Operators that change the order and the axes of values: in the stream as long as the channels stay the last axis."""

_BY_CHANNEL = (
    SELECTING
    | MOVING
    | {
        aten.add.Tensor,
        aten.add_.Tensor,
        aten.cat.default,
        aten.concatenate.default,
        aten.expand.default,
        aten.flip.default,
        aten.gather.default,
        aten.index.Tensor,
        aten.mean.dim,
        aten.squeeze.dim,
        aten.sub.Tensor,
        aten.sum.dim_IntList,
        aten.unsqueeze.default,
    }
)
"""Operators that are linear and treat every channel alike, if the last axis keeps its size and is not what they act
on."""

_SHAPE_ONLY = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten.new_empty.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.ones_like.default,
        aten.sym_size.int,
        aten.zeros_like.default,
    }
)
"""Operators that look at the shape of their input and not at its values."""


@dataclass
class Stream:
    """Values that share one set of channels.

    A value may hold the channels several times, side by side: so does what joins values of the stream, and norms and
    linears may read it.

    Attributes:
        width: number of channels.
        writers: linears, experts and embeddings whose outputs are in the stream.
        constants: (node, argument's name) of parameters that are added or concatenated, such as position embeddings.
        norms: norms that read the stream; their outputs are in it too.
        readers: linears and experts whose inputs are in the stream.
        problem: why the stream cannot be rotated, or None.
    """

    width: int
    writers: list[Node] = field(default_factory=list)
    constants: list[tuple[Node, str]] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    problem: str | None = None
    _values: dict[Node, None] = field(default_factory=dict, repr=False)

    @property
    def inputs(self) -> list[Node]:
        """The values that the readers read, each once."""
        return list(dict.fromkeys(Layer.of(reader).x for reader in self.readers))

    @property
    def name(self) -> str:
        """How reports call it: its first writer and the number of its readers."""
        writer = self.writers[0] if self.writers else None
        where = (walk.module_path(writer) or writer.name) if writer is not None else "inputs"
        return f"stream of {where}"


def streams(module: GraphModule, blocks: Iterable[Block]) -> list[Stream]:
    """The streams that feed the blocks' in_proj or that their out_proj writes into, each once, in graph order."""
    found: list[Stream] = []
    seeds = [value for block in blocks for value in (Linear.of(block.in_proj).x, block.out_proj)]
    for seed in seeds:
        if not any(seed in stream._values for stream in found):
            stream = Stream(channels(seed))
            _grow(stream, seed)
            found.append(stream)
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for stream in found:
        for nodes in (stream.writers, stream.norms, stream.readers):
            nodes.sort(key=order.__getitem__)
    return found


def _grow(stream: Stream, seed: Node) -> None:
    pending = [seed]
    while pending and stream.problem is None:
        value = pending.pop()
        if value in stream._values:
            continue
        stream._values[value] = None
        pending += _backward(stream, value)
        for user in value.users:
            pending += _forward(stream, value, user)


def _end(stream: Stream, node: Node, why: str) -> list[Node]:
    path = walk.module_path(node)
    stream.problem = f"the walk along the residual stream ended at {node.name}{f' in {path}' if path else ''}: {why}"
    return []


def _backward(stream: Stream, value: Node) -> list[Node]:
    """What `value` is made of, as far as it lies in the stream."""
    if value.target in walk.LINEAR | walk.EXPERTS | walk.EMBEDDING:
        if channels(value) != stream.width:
            return _end(stream, value, f"it writes {channels(value)} channels where others write {stream.width}")
        stream.writers.append(value)
        return []
    if value.target in NORM:
        if normalised(value) != [channels(value)]:
            return _end(stream, value, "it normalises over more than the channels")
        stream.norms.append(value)
        return [Norm.of(value).x]
    if walk.is_tokenwise(value):
        return [walk.argument(value, 0)]
    if value.target in _BY_CHANNEL or walk.is_scaling(value):
        if not (keeps_channels(value, channels(value)) or joins_copies(value, stream.width)):
            return _end(stream, value, _misplaced(value))
        return _operands(stream, value)
    return _end(stream, value, f"{value.target if value.op == 'call_function' else value.op} is not understood")


def _operands(stream: Stream, value: Node) -> list[Node]:
    inside = []
    # Sizes may be nodes too.
    operands = [node for node in walk.inputs(value) if isinstance(node.meta["val"], Tensor)]
    if value.target in (aten.index.Tensor, aten.index_select.default, aten.gather.default):
        operands = operands[:1]
    for operand in operands:
        width = operand.meta["val"].shape[-1:]
        wanted = stream.width if joins_copies(value, stream.width) else channels(value)
        if not width or not walk.same_size(width[0], wanted):
            return _end(stream, value, f"it combines {width[0] if width else 1} with {wanted} channels")
        if is_constant(operand):
            name = next((name for name, given in walk.arguments(value).items() if given is operand), None)
            if name is None:
                return _end(stream, value, "it joins a constant that lies in a list")
            stream.constants.append((value, name))
        else:
            inside.append(operand)
    adds = value.target in (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor)
    if adds and any(isinstance(arg, int | float) for arg in value.args[:2]):
        return _end(stream, value, "it adds a number to every channel")
    return inside


def _forward(stream: Stream, value: Node, user: Node) -> list[Node]:
    """What `user` makes of `value`, as far as it lies in the stream."""
    if user in stream._values or looks_only(user, value):
        return []
    if user.target in walk.LINEAR | walk.EXPERTS and Layer.of(user).x is value:
        if user not in stream.readers:
            stream.readers.append(user)
        return []
    if user.target in NORM and Norm.of(user).x is value:
        return [user]
    if user.op == "output":
        return _end(stream, value, "it is an output of the graph")
    if walk.is_tokenwise(user) and user.args[0] is value:
        return [user]
    if user.target in _BY_CHANNEL or walk.is_scaling(user):
        if not (keeps_channels(user, channels(value)) or joins_copies(user, stream.width)):
            return _end(stream, user, _misplaced(user))
        return [user]
    return _end(stream, user, f"{user.target} is not understood")


def joins_copies(node: Node, width: int) -> bool:
    """Whether a node puts values of so many channels side by side."""
    if node.target not in (aten.cat.default, aten.concatenate.default) or node.kwargs:
        return False
    operands = [walk.value(operand) for operand in walk.inputs(node)]
    last = operands[0].dim() - 1
    return walk.arguments(node)["dim"] in (-1, last) and all(
        walk.same_size(operand.shape[-1], width) for operand in operands
    )


def looks_only(user: Node, value: Node) -> bool:
    """Whether a user of a value reads its shape or dtype, and no numbers."""
    as_pattern = user.target == aten.type_as.default and user.args[0] is not value
    return as_pattern or user.target in _SHAPE_ONLY


def _misplaced(node: Node) -> str:
    if node.kwargs:
        return "its keyword arguments are not understood"
    if node.target in walk.JOINING:
        return "it joins values along their channels"
    return "it does not keep the channels in place"


def normalised(norm: Node) -> list[int]:
    """Sizes of the axes that a norm normalises over."""
    return list(Norm.of(norm).shape)


def keeps_channels(user: Node, width: int) -> bool:
    """Whether the last axis of `user` is that of its input."""
    if user.kwargs and user.target not in walk.COPYING:
        return False
    value, source = user.meta["val"], user.all_input_nodes[0].meta["val"]
    if value.dim() == 0 or not walk.same_size(value.shape[-1], width):
        return False
    if user.target in walk.COPYING:
        return True
    last = source.dim() - 1
    if user.target in MOVING:
        return channel_source(user, value.dim() - 1) == (last, 0, width)
    given = walk.arguments(user)
    if user.target == aten.unsqueeze.default:
        return given["dim"] not in (-1, value.dim() - 1)
    if user.target == aten.index.Tensor:
        return len(given["indices"]) < source.dim()
    if user.target == aten.gather.default:
        # The same row for every channel: an index of one column, spread out.
        index = given["index"]
        if index.target != aten.expand.default or not walk.same_size(walk.value(walk.argument(index, 0)).shape[-1], 1):
            return False
    acted_on = given.get("dim", given.get("dims", []))
    return all(axis not in (-1, last) for axis in (acted_on if isinstance(acted_on, list | tuple) else [acted_on]))
