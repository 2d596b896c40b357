"""What the page shows, as plain data: no graphs, no modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.passes import Transform
from mq_ao.quantizer.report import Decision


@dataclass(frozen=True)
class Size:
    """Bytes of the weights of one part.

    Attributes:
        part: a role, or another name of a part of the model.
        float_bytes: before.
        quantized_bytes: after, scales included.
    """

    part: str
    float_bytes: int
    quantized_bytes: int


@dataclass(frozen=True, eq=False)
class VarianceProfile:
    """Variances of the channels at one place, before and after its rotation (docs/method.md, section 3).

    Attributes:
        where: the place in words, such as "residual stream" or "layers.3.mixer: dt_proj input".
        before: (channels,) any floating dtype, at least 0, in squared units of the activation.
        hadamard: the same after a Hadamard matrix alone, where that was measured.
        rotated: the same after the rotation of the recipe, where there is one.

    Raises:
        MqAoError: empty, of different lengths, negative, NaN or Inf.
    """

    where: str
    before: Tensor
    hadamard: Tensor | None = None
    rotated: Tensor | None = None

    def __post_init__(self) -> None:
        for values in (self.before, self.hadamard, self.rotated):
            if values is not None:
                _check_channels(values, f"variances of {self.where}")
                if values.shape != self.before.shape:
                    raise MqAoError(
                        f"variances of {self.where} have {self.before.numel()} channels before and {values.numel()} "
                        "after the rotation: give both for the same channels."
                    )


@dataclass(frozen=True, eq=False)
class RangeRow:
    """Range of one activation that quantized nodes read, in the float graph.

    Attributes:
        role: role of the node that reads it, and which operand; rows of one role share a heat map.
        module: qualified name of the node's module.
        low: smallest value.
        high: largest value.
        maxima: (channels,) any floating dtype, largest magnitude of every channel.
        p999: 99.9th percentile of the magnitudes, where that was measured.

    Raises:
        MqAoError: maxima are empty, negative, NaN or Inf.
    """

    role: str
    module: str
    low: float
    high: float
    maxima: Tensor
    p999: float | None = None

    def __post_init__(self) -> None:
        _check_channels(self.maxima, f"channel maxima of {self.module}")


@dataclass(frozen=True)
class NodeQuality:
    """How far the quantized program's value of one node is from the float program's.

    Attributes:
        node: name of the node.
        module: qualified name of its module.
        role: its role.
        sqnr: signal to quantization noise ratio in dB; Inf where both are equal, NaN where it is undefined.
        shape: shape of the value, as text.
    """

    node: str
    module: str
    role: str
    sqnr: float
    shape: str


@dataclass(frozen=True)
class PageData:
    """Everything on the page; a part that is left empty becomes a sentence that says so.

    Attributes:
        title: heading of the page, such as the model's name.
        recipe: name of the recipe.
        recipe_text: the recipe as text, line by line.
        batches: number of calibration batches.
        tokens: number of calibration tokens, or 0 where the inputs are no tokens.
        sample: the data that `ranges` and `nodes` were taken on, in words.
        versions: library -> version.
        blocks: what was matched, as text.
        transforms: rewrites, in the order in which they were tried.
        decisions: of the quantizer, in graph order.
        sizes: weights of every part.
        variances: one profile a rotated place; the first, best the residual stream, is shown whatever its values.
        ranges: by role, and by layer in each.
        nodes: in graph order.
    """

    title: str
    recipe: str
    recipe_text: str
    batches: int
    tokens: int
    sample: str = "the calibration data"
    versions: Mapping[str, str] = field(default_factory=dict)
    blocks: str = ""
    transforms: tuple[Transform, ...] = ()
    decisions: tuple[Decision, ...] = ()
    sizes: tuple[Size, ...] = ()
    variances: tuple[VarianceProfile, ...] = ()
    ranges: tuple[RangeRow, ...] = ()
    nodes: tuple[NodeQuality, ...] = ()


def _check_channels(values: Tensor, what: str) -> None:
    if values.dim() != 1 or values.numel() == 0:
        raise MqAoError(f"{what} have shape {tuple(values.shape)}: give one value a channel.")
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise MqAoError(f"{what} hold NaN, Inf or negative values: look for NaN in the calibration data or weights.")
