"""Observers, and the torchao specs that hold them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization import PerAxis, PerGroup, PerToken
from torchao.quantization.pt2e import MinMaxObserver, MovingAverageMinMaxObserver
from torchao.quantization.pt2e.observer import AffineQuantizedObserverBase, MappingType
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.quantization.pt2e.utils import get_new_attr_name_with_prefix

from mq_ao.compat.observers import AffineQuantizedPlaceholderObserver, HistogramObserver
from mq_ao.ops.linear_packed import TOKEN_REACH
from mq_ao.quantizer.kernels import Kernels
from mq_ao.quantizer.specs import Activation, Range, RoleSpec
from mq_ao.quantizer.weights import LIMITS, QuantizedWeight

mq = torch.ops.mq_ao

CHOOSE = torch.ops.torchao.choose_qparams_affine

_RANGES = {
    Range.HISTOGRAM: HistogramObserver,
    Range.MIN_MAX: MinMaxObserver,
    Range.MOVING_AVERAGE: MovingAverageMinMaxObserver,
}


PER_TOKEN_EPS = torch.finfo(torch.float32).tiny
"""Smallest scale of a token: a token of zeros is quantized to zeros. As in `mq_ao::quantize_per_token`."""


def activation_spec(spec: RoleSpec, kernels: Kernels, channels: int = 0) -> QuantizationSpec | None:
    """torchao spec of the role's input in the backend's integers, or None where it stays in float.

    Args:
        spec: of the role.
        kernels: of the backend.
        channels: of the input; as with weights, groups that do not divide them are left out.
    """
    if spec.activation is Activation.NONE:
        return None
    if spec.activation is not Activation.STATIC:
        size = spec.group_size if spec.activation is Activation.PER_GROUP else None
        integers = kernels.per_token[spec.activation_bits]
        observer = TokenObserver.with_args(
            target_dtype=integers.dtype,
            mapping_type=integers.mapping,
            granularity=PerGroup(size) if size is not None and channels % size == 0 else PerToken(),
            eps=PER_TOKEN_EPS,
            is_dynamic=True,
        )
        return QuantizationSpec(
            integers.dtype, observer, quant_min=integers.low, quant_max=integers.high, is_dynamic=True
        )
    integers = kernels.static
    return QuantizationSpec(
        dtype=integers.dtype,
        observer_or_fake_quant_ctr=_RANGES[spec.range],
        quant_min=integers.low,
        quant_max=integers.high,
        qscheme=torch.per_tensor_affine,
    )


class TokenObserver(AffineQuantizedPlaceholderObserver):
    """A value with a range for each token, which reaches as far as `mq_ao::quantize_per_token` has it."""

    @property
    def bits(self) -> int:
        """Of the integers."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def group_size(self) -> int:
        """Channels that share a scale; 0: all of a token."""
        return self.granularity.group_size if isinstance(self.granularity, PerGroup) else 0

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        """Writes choose, quantize and dequantize nodes."""
        value = observer_node.args[0]
        assert isinstance(value, Node)
        others = set(value.users)
        super().convert(model, observer_node)
        if self.mapping_type is not MappingType.SYMMETRIC:
            return
        reach = TOKEN_REACH[self.bits]
        for node in set(value.users) - others:
            if node.target == CHOOSE:
                node.update_arg(4, -reach)
                node.update_arg(5, reach)


def weight_spec(planned: QuantizedWeight) -> QuantizationSpec:
    """A weight whose integers are known."""
    observer = PlannedWeight.with_args(weight=planned)
    return QuantizationSpec(torch.int8, observer, qscheme=torch.per_channel_symmetric, ch_axis=0)


def state_spec(scale: Tensor) -> QuantizationSpec:
    """A carried state with known scales, (channels, d_state)."""
    observer = PlannedState.with_args(scale=scale)
    return QuantizationSpec(torch.int8, observer, quant_min=-127, quant_max=127, qscheme=torch.per_channel_symmetric)


class _Planned(AffineQuantizedObserverBase):
    """Stands for a value whose scales are known before calibration, and writes its own nodes afterwards."""

    def __init__(self, scale: Tensor, axis: int) -> None:
        super().__init__(MappingType.SYMMETRIC, torch.int8, PerAxis(axis))
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Returns the float value: ranges of activations are those of the float program."""
        return input

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales, and zero points of 0."""
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int64)

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        """Puts the quantized value in the place of the float one."""
        with model.graph.inserting_before(observer_node):
            node = self._write(model, observer_node.args[0])
        observer_node.replace_all_uses_with(node)
        model.graph.erase_node(observer_node)

    @abstractmethod
    def _write(self, model: GraphModule, value: Any) -> Node:
        """Adds nodes for the quantized value; returns the last."""


class PlannedWeight(_Planned):
    """A weight whose integers are known too."""

    def __init__(self, weight: QuantizedWeight, **_: Any) -> None:
        super().__init__(weight.scale, axis=0)
        self.weight = weight

    def _write(self, model: GraphModule, value: Any) -> Node:
        weight = self.weight
        scale, zero_point = self.calculate_qparams()
        constants = [
            _constant(model, kind, item)
            for kind, item in (("values", weight.values), ("scales", scale), ("zeros", zero_point))
        ]
        operator, args = _dequantize(weight, *constants)
        return model.graph.call_function(operator, args)


class PlannedState(_Planned):
    """A carried state, rounded as `mq_ao::qselective_scan` carries it."""

    def __init__(self, scale: Tensor, **_: Any) -> None:
        super().__init__(scale, axis=1)

    def _write(self, model: GraphModule, value: Any) -> Node:
        scale = _constant(model, "scales", self.scale)
        rounded = model.graph.call_function(mq.quantize_state.default, (value, scale))
        return model.graph.call_function(mq.dequantize_state.default, (rounded, scale))


def _constant(model: GraphModule, kind: str, value: Tensor) -> Node:
    """A get_attr node for a tensor that is registered as it is: torchao's helper would copy it."""
    name = get_new_attr_name_with_prefix(f"_planned_{kind}_")(model)
    model.register_buffer(name, value)
    return model.graph.get_attr(name)


def _dequantize(weight: QuantizedWeight, *constants: Node) -> tuple[Any, tuple[Any, ...]]:
    limits = LIMITS[weight.bits]
    if weight.group_size is None:
        operator = torch.ops.quantized_decomposed.dequantize_per_channel.default
        return operator, (*constants, 0, *limits, torch.int8)
    values, scales, zeros = constants
    return torch.ops.torchao.dequantize_affine, (
        values,
        [1, weight.group_size],
        scales,
        zeros,
        torch.int8,
        *limits,
    )
