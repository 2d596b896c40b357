"""What a pass is: an exact rewrite of a float graph and of the statistics that were taken on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import ClassVar, get_type_hints

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.errors import MqAoError, Unsuitable
from mq_ao.graph import Block, Direction, edit, match, walk
from mq_ao.graph.residual import Stream, streams
from mq_ao.graph.rows import Rows
from mq_ao.graph.views import Layer
from mq_ao.memory import release
from mq_ao.ops import hadamard_matrix
from mq_ao.passes.options import checked
from mq_ao.statistics import ChannelStatistics, Request

_LARGE = 2**20
"""Elements of a weight whose old values and temporaries are worth giving back at once."""


class Status(StrEnum):
    """What became of a pass at one place."""

    APPLIED = "applied"
    LEFT_OUT = "left out"


@dataclass(frozen=True)
class Transform:
    """What one pass did at one place.

    Attributes:
        name: the pass.
        step: its name in docs/method.md, such as R1, or "".
        where: the module or stream it was applied to.
        status: applied, or left out.
        detail: figures, or the reason.
    """

    name: str
    step: str
    where: str
    status: Status
    detail: str = ""

    def __str__(self) -> str:
        step = f" ({self.step})" if self.step else ""
        return f"{self.name}{step} {self.status} at {self.where}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Profile:
    """Channel variances at one place.

    Attributes:
        where: module or stream.
        before: (channels,) before the rotation.
        hadamard: (channels,) after a Hadamard rotation alone.
        after: (channels,) after the rotation that was applied.
    """

    where: str
    before: Tensor
    hadamard: Tensor
    after: Tensor


@dataclass
class Rewrite:
    """A float graph while passes rewrite it.

    Attributes:
        module: the graph; passes edit it in place.
        statistics: of the values of the graph as it is now, by node name.
        transforms: what was done so far.
        profiles: channel variances before and after rotations.
    """

    module: GraphModule
    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)
    transforms: list[Transform] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the graph as it is now."""
        return match(self.module).blocks

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The scans of all blocks of the graph as it is now."""
        return match(self.module).directions

    @property
    def streams(self) -> list[Stream]:
        """The residual streams of the graph as it is now."""
        return streams(self.module, self.blocks)

    def of(self, node: Node) -> ChannelStatistics:
        """Statistics of a node's value.

        Raises:
            MqAoError: none were collected.
        """
        if node.name not in self.statistics:
            raise MqAoError(f"no statistics of {node.name}: collect what the passes' `requests` ask for.")
        return self.statistics[node.name]

    def weight(self, linear: Node) -> Tensor:
        """A copy of the weight of a linear or convolution in float64."""
        weight = edit.operand(self.module, Layer.of(linear).weight)
        assert weight is not None
        return weight

    def set_weight(self, layer: Node, weight: Tensor) -> None:
        """Replaces the weight of a layer; a tied weight becomes its own."""
        self.set_parameter(layer, "weight", weight)

    def set_parameter(self, user: Node, name: str, value: Tensor) -> None:
        """Replaces a constant operand; where others read it too, notes that each now has its own."""
        others = [reader.name for reader in edit.readers(walk.arguments(user)[name]) if reader is not user]
        if others:
            size = value.numel() * 4 / 1e6
            detail = f"shared with {', '.join(others)} before, now each has its own: {size:.1f} MB more in float32"
            where = walk.module_path(user) or user.name
            self.transforms.append(Transform("untie", "", where, Status.APPLIED, detail))
        edit.set_operand(self.module, user, name, value)
        if value.numel() >= _LARGE:
            release()

    def bias(self, linear: Node) -> Tensor | None:
        """A copy of the bias of a linear or convolution in float64, or None."""
        return edit.operand(self.module, Layer.of(linear).bias)

    def set_bias(self, linear: Node, bias: Tensor) -> None:
        """Replaces or adds the bias of a linear or convolution."""
        edit.set_operand(self.module, linear, "bias", bias)

    def scale_rows(self, rows: Rows, factor: Tensor) -> None:
        """Multiplies output channels of a linear, bias included."""
        weight = self.weight(rows.linear)
        weight[rows.slice] *= factor[:, None]
        self.set_weight(rows.linear, weight)
        bias = self.bias(rows.linear)
        if bias is not None:
            bias[rows.slice] *= factor
            self.set_bias(rows.linear, bias)

    def scale_columns(self, linear: Node, factor: Tensor) -> None:
        """Multiplies input channels of a linear."""
        self.change_rows(linear, lambda rows: rows * factor)

    def rotate_rows(self, rows: Rows, rotation: Tensor) -> None:
        """Output channels y become y @ rotation."""
        weight = self.weight(rows.linear)
        weight[rows.slice] = rotation.T @ weight[rows.slice]
        self.set_weight(rows.linear, weight)
        bias = self.bias(rows.linear)
        if bias is not None:
            bias[rows.slice] = bias[rows.slice] @ rotation
            self.set_bias(rows.linear, bias)

    def rotate_columns(self, linear: Node, rotation: Tensor) -> None:
        """The linear takes inputs x @ rotation instead of x."""
        self.change_rows(linear, lambda rows: rows @ rotation)

    def change_rows(self, layer: Node, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change` to every row of the weight of a linear or embedding, in float64."""
        matrix = edit.constant(self.module, Layer.of(layer).weight)
        self.set_weight(layer, edit.by_rows(matrix, change))

    def scale_taps(self, conv: Node, factor: Tensor) -> None:
        """Multiplies the taps of every channel of a depthwise convolution, (channels, ...)."""
        taps = self.weight(conv)
        self.set_weight(conv, taps * factor.view(-1, *[1] * (taps.dim() - 1)))

    def rotate_input(self, reader: Node, value: Node) -> Tensor:
        """Puts a fast Hadamard transform between a value and what reads it; returns its matrix, float64.

        Raises:
            Unsuitable: the value's width has no Hadamard matrix; nothing is changed then.
        """
        matrix = hadamard_matrix.matrix(edit.channels(value))
        with self.module.graph.inserting_before(reader):
            rotated = edit.call(self.module, torch.ops.mq_ao.hadamard.default, (value,), like=reader)
        reader.replace_input_with(value, rotated)
        return matrix

    def largest_by_column(self, linear: Node) -> Tensor:
        """Largest magnitude of every input channel of a linear's weight, (inputs,) float64."""
        weight = edit.constant(self.module, Layer.of(linear).weight)
        low, high = torch.aminmax(weight, dim=0)
        return torch.maximum(-low, high).double()

    def power_by_column(self, linear: Node) -> Tensor:
        """Root mean square of every input channel of a linear's weight, (inputs,) float64."""
        return self.weight(linear).square().mean(0).sqrt()

    def update(self, node: Node, statistics: ChannelStatistics) -> None:
        """Replaces the statistics of a value that was rewritten."""
        self.statistics[node.name] = statistics


@dataclass(frozen=True)
class Pass(ABC):
    """An exact rewrite. Subclasses are frozen dataclasses whose fields are the pass's options.

    Attributes:
        name: how recipes call it.
        step: its name in docs/method.md, or "".

    Raises:
        MqAoError: an option has a value that its type does not take; see `passes.options`.
    """

    name: ClassVar[str]
    step: ClassVar[str] = ""

    def __post_init__(self) -> None:
        options = fields(self)
        hints = get_type_hints(type(self), include_extras=True) if options else {}
        for option in options:
            what = f"option {option.name} of pass {self.name}"
            object.__setattr__(self, option.name, checked(getattr(self, option.name), hints[option.name], what))

    def requests(self, rewrite: Rewrite) -> Iterable[Request]:
        """The statistics it needs of the float graph."""
        return ()

    @abstractmethod
    def apply(self, rewrite: Rewrite) -> None:
        """Rewrites the graph and its statistics in place.

        Raises:
            MqAoError: the pass was applied before, where a second application would not be exact or idempotent.
        """

    def note(self, rewrite: Rewrite, where: str, detail: str = "") -> None:
        """Records an application."""
        rewrite.transforms.append(Transform(self.name, self.step, where, Status.APPLIED, detail))

    @contextmanager
    def where_suitable(self, rewrite: Rewrite, where: str) -> Iterator[None]:
        """Records a place as left out if the rewrite cannot be made there; it has to find that out before it edits."""
        try:
            yield
        except Unsuitable as error:
            self.leave_out(rewrite, where, str(error))

    def leave_out(self, rewrite: Rewrite, where: str, reason: str) -> None:
        """Records a place that was left as it is."""
        rewrite.transforms.append(Transform(self.name, self.step, where, Status.LEFT_OUT, reason))
