"""One dtype for a model's floating parts while it is captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mq_ao.capture.frames import tensors
from mq_ao.compat.trees import tree_map_only
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
    """Checks that every parameter and buffer is there, plain and finite; buffers may hold Inf, as masks do.

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
        if tensor.is_floating_point() and tensor.numel():
            extremes = torch.stack(torch.aminmax(tensor))
            if extremes.isnan().any() or (isinstance(tensor, nn.Parameter) and extremes.isinf().any()):
                raise MqAoError(f"weight {name} holds NaN or Inf: the checkpoint is broken, load another one.")


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While it lasts, a model's floating parameters, buffers and other tensors are float32; the old ones come back.

    Tied weights stay tied, and what is float32 already is not copied. The model is changed for all threads meanwhile.
    """
    with _converted(model, torch.float32):
        yield


@contextmanager
def outside_inference(model: nn.Module) -> Iterator[None]:
    """The same for tensors that were made in inference mode, which cannot become parameters of a graph."""
    with _converted(model, None):
        yield


@contextmanager
def _converted(model: nn.Module, floats: torch.dtype | None) -> Iterator[None]:
    """Floating tensors of another dtype than `floats`, and those of inference mode, are replaced."""
    changed: list[tuple[nn.Module, str, Any]] = []
    known: dict[int, Tensor] = {}

    def differs(tensor: Tensor) -> bool:
        return tensor.is_inference() or (floats is not None and tensor.is_floating_point() and tensor.dtype != floats)

    def converted(tensor: Tensor) -> Tensor:
        if not differs(tensor):
            return tensor
        if id(tensor) not in known:
            known[id(tensor)] = _copy(tensor, floats)
        return known[id(tensor)]

    try:
        for part in model.modules():
            # Parameters and buffers are dictionaries among the attributes.
            for name, value in list(vars(part).items()):
                if any(map(differs, tensors(value))):
                    changed.append((part, name, value))
                    vars(part)[name] = tree_map_only(Tensor, converted, value)
        yield
    finally:
        for part, name, value in changed:
            vars(part)[name] = value


@torch.no_grad()
def _copy(tensor: Tensor, floats: torch.dtype | None) -> Tensor:
    with torch.inference_mode(False):
        value = tensor.to(floats if floats and tensor.is_floating_point() else tensor.dtype, copy=True)
        return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
