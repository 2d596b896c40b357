"""One dtype for a model's floating parts while it is captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mq_ao.errors import MqAoError

_CONVERTED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's floating parameters and buffers; float32 where there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in _tensors(model):
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def check_weights(model: nn.Module) -> None:
    """Checks that every parameter and buffer is there, plain and finite.

    Raises:
        MqAoError: one is on the meta device, quantized already, or holds NaN or Inf; it is named.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise MqAoError(
                f"weight {name} is on the meta device, without values: load the checkpoint into memory first "
                "(with transformers, without device_map)."
            )
        if type(tensor) not in (Tensor, nn.Parameter) or (
            tensor.is_floating_point() and tensor.dtype not in _CONVERTED
        ):
            raise MqAoError(
                f"weight {name} is {type(tensor).__name__} {tensor.dtype}: give the float model, before any other "
                "quantization."
            )
        # The extremes tell, without a temporary of the tensor's size.
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            raise MqAoError(f"weight {name} holds NaN or Inf: the checkpoint is broken, load another one.")


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While it lasts, a model's floating parameters, buffers and other tensors are float32; the old ones come back.

    Tied weights stay tied, and what is float32 already is not copied.
    """
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    known: dict[int, Tensor] = {}
    try:
        for part in model.modules():
            holders: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, part.__dict__)
            for holder in holders:
                for name, value in list(holder.items()):
                    if isinstance(value, Tensor) and _differs(value):
                        changed.append((holder, name, value))
                        if id(value) not in known:
                            known[id(value)] = _converted(value)
                        holder[name] = known[id(value)]
        yield
    finally:
        for holder, name, value in changed:
            holder[name] = value


def _differs(tensor: Tensor) -> bool:
    # What was made in inference mode cannot become a parameter of a graph.
    return (tensor.is_floating_point() and tensor.dtype != torch.float32) or tensor.is_inference()


@torch.no_grad()
def _converted(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    with torch.inference_mode(False):
        value = tensor.to(dtype, copy=True)
        return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
