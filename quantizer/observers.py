"""Observers, and the torchao specs that hold them."""

from __future__ import annotations

import torch
from torchao.quantization import PerToken
from torchao.quantization.pt2e import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedPlaceholderObserver
from torchao.quantization.pt2e.observer import MappingType
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from mq_ao.quantizer.specs import Activation, Range, RoleSpec

_RANGES = {
    Range.HISTOGRAM: HistogramObserver,
    Range.MIN_MAX: MinMaxObserver,
    Range.MOVING_AVERAGE: MovingAverageMinMaxObserver,
}


PER_TOKEN_EPS = torch.finfo(torch.float32).tiny
"""Smallest scale of a token: a token of zeros is quantized to zeros. As in `mq_ao::qlinear_dynamic`."""


def activation_spec(spec: RoleSpec) -> QuantizationSpec | None:
    """torchao spec of the role's input, or None where it stays in float."""
    if spec.activation is Activation.NONE:
        return None
    if spec.activation is Activation.PER_TOKEN:
        observer = AffineQuantizedPlaceholderObserver.with_args(
            target_dtype=torch.int8,
            mapping_type=MappingType.SYMMETRIC,
            granularity=PerToken(),
            eps=PER_TOKEN_EPS,
            is_dynamic=True,
        )
        return QuantizationSpec(torch.int8, observer, quant_min=-127, quant_max=127, is_dynamic=True)
    return QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=_RANGES[spec.range],
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
    )


def weight_spec() -> QuantizationSpec:
    """int8, symmetric, one scale for every row (output channel)."""
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
