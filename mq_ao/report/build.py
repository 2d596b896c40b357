"""Fills the page from a quantization."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.graph import Role, match, walk
from mq_ao.graph.views import Layer
from mq_ao.passes import Profile, Rewrite
from mq_ao.report import sizes
from mq_ao.report.data import PageData, RangeRow, VarianceProfile
from mq_ao.report.sqnr import node_qualities, values
from mq_ao.report.summary import Report
from mq_ao.version import __version__

_SAMPLE = (2, 256)
"""Batch and length that nodes are compared on: enough for figures to a tenth of a decibel, and seconds to run."""


@dataclass(frozen=True, eq=False)
class Source:
    """What a page needs of the float side of a quantization.

    Attributes:
        title: what was quantized.
        graph: rewritten float graph, with tensors of its own only where passes made new ones.
        batch: a few calibration inputs, see `sample`.
        stored: constants of the graph as it was captured.
        profiles: channel variances that the rewrites noted.
    """

    title: str
    graph: GraphModule
    batch: tuple[Tensor, ...]
    stored: tuple[sizes.Stored, ...]
    profiles: tuple[Profile, ...]


@dataclass(frozen=True, eq=False)
class Captured:
    """What a page needs of the graph as it was captured, noted before rewrites edit it.

    Attributes:
        title: what is quantized.
        stored: constants of the graph.
    """

    title: str
    stored: tuple[sizes.Stored, ...]

    @classmethod
    def of(cls, title: str, graph: GraphModule) -> Captured:
        """Notes it now."""
        return cls(title, sizes.stored(graph, sizes.roles(graph)))

    def rewritten(self, rewrite: Rewrite, batch: tuple[Any, ...]) -> Source:
        """Keeps the rewritten graph as it is now: `prepare_pt2e` edits it in place. Tensors are shared."""
        module = rewrite.module
        graph = GraphModule(module, copy.deepcopy(module.graph))
        return Source(self.title, graph, sample(module, batch), self.stored, tuple(rewrite.profiles))


def sample(graph: GraphModule, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first two sequences of a batch and their first 256 tokens, where the graph takes any number of them.

    Batch and length are the first two sizes of the first input, and what has the same symbol in the others.
    """
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    first = next(like for like in inputs if isinstance(like, Tensor))
    pairs = zip(first.shape, _SAMPLE, strict=False)
    limits = {str(size): limit for size, limit in pairs if isinstance(size, torch.SymInt)}

    def cut(value: Any, like: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[tuple(slice(limits.get(str(size))) for size in like.shape)].clone()

    return tuple(cut(value, like) for value, like in zip(batch, inputs, strict=True))


def page_data(converted: GraphModule, report: Report, source: Source, title: str | None = None) -> PageData:
    """Everything on the page; it runs the float graph twice and the converted one once, on `source.batch`.

    Args:
        converted: result of `convert_pt2e`.
        report: what was done to get there.
        source: the float side.
        title: heading, if not that of the source.
    """
    graph, decisions = source.graph, report.quantization.decisions
    after = sizes.stored(converted, sizes.roles(graph))
    return PageData(
        title=title or source.title,
        recipe=report.recipe.name,
        recipe_text=str(report.recipe),
        batches=report.batches,
        tokens=report.tokens,
        sample=_sample_text(source.batch[0]),
        versions={"mq-ao": __version__, "torch": torch.__version__, "torchao": version("torchao")},
        blocks=report.match,
        transforms=report.transforms,
        decisions=decisions,
        sizes=sizes.compare(source.stored, after),
        variances=tuple(map(_variances, source.profiles)),
        ranges=_ranges(graph, source.batch, {(item.node, item.role) for item in decisions if item.accepted}),
        nodes=node_qualities(graph, converted, source.batch, decisions),
    )


@dataclass(frozen=True)
class _Input:
    """A value that a node reads: by which role, which operand it is, and where its channels are."""

    role: Role
    label: str
    reader: Node
    value: Node
    axis: int = -1


def _ranges(
    graph: GraphModule, batch: tuple[Tensor, ...], quantized: set[tuple[str, Role | None]]
) -> tuple[RangeRow, ...]:
    """Ranges of what quantized nodes read; a value that several of them read is one row with the roles of all."""
    readers: dict[str, list[_Input]] = {}
    for item in _inputs(graph):
        if (item.reader.name, item.role) in quantized:
            readers.setdefault(item.value.name, []).append(item)
    rows = {name: _range(readers[name], value) for name, value in values(graph, batch, readers)}
    return tuple(rows[name] for name in readers)


def _inputs(graph: GraphModule) -> Iterator[_Input]:
    found = match(graph)
    for role, node in found.by_role():
        if role is not Role.EMBEDDING:
            # Our convolution has the channels last, ATen's has them before the length.
            axis = 1 if node.target in walk.CONV - {torch.ops.mq_ao.causal_conv1d.default} else -1
            yield _Input(role, str(role), node, Layer.of(node).x, axis)
    for block in found.blocks:
        for role, node, operands in block.operands():
            for symbol, operand in operands.items():
                yield _Input(role, f"{role} {symbol}", node, operand)


def _range(inputs: list[_Input], value: Tensor) -> RangeRow:
    first = inputs[0]
    magnitudes = value.abs()
    axis = first.axis % value.dim()
    kth = max(1, math.ceil(0.999 * value.numel()))
    return RangeRow(
        ", ".join(dict.fromkeys(item.label for item in inputs)),
        walk.module_path(first.reader) or first.reader.name,
        float(value.min()),
        float(value.max()),
        magnitudes.amax([other for other in range(value.dim()) if other != axis]),
        float(magnitudes.flatten().kthvalue(kth).values),
    )


def _variances(profile: Profile) -> VarianceProfile:
    # Rotated covariances of dead channels come out a rounding error below zero.
    parts = [part.clamp(min=0) for part in (profile.before, profile.hadamard, profile.after)]
    return VarianceProfile(profile.where, *parts)


def _sample_text(first: Tensor) -> str:
    if first.is_floating_point():
        return f"{first.shape[0]} calibration inputs"
    return f"{' x '.join(map(str, first.shape))} calibration tokens"
