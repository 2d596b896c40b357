"""`mq_ao::causal_conv1d`: depthwise causal convolution, channel-last, with bias and SiLU fused.

y[t] = act(bias + sum_k weight[k] x[t - (d_conv - 1) + k]),   x before the first step from `initial_state`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mq_ao.ops.library import require, schemas
from mq_ao.ops.operator import Operands, like, operator


def check_shapes(a: Operands) -> None:
    """Raises MqAoError on operands, of any dtype, that do not fit together."""
    x, weight = a.x, a.weight
    require(x.dim() == 3, f"causal_conv1d: x must be (batch, length, channels), it has {x.dim()} dimensions.")
    batch, length, channels = x.shape
    if isinstance(length, int):
        require(length > 0, "causal_conv1d: the sequence is empty (length 0); give at least one step.")
    require(
        a.activation in (None, "silu"),
        f"causal_conv1d: unknown activation {a.activation!r}; it must be None or 'silu'.",
    )
    require(weight.dim() == 2, f"causal_conv1d: weight must be (channels, d_conv), it has {weight.dim()} dimensions.")
    d_conv = weight.shape[1]
    require(d_conv > 0, "causal_conv1d: weight has no taps (d_conv 0).")
    shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [("weight", weight, (channels, d_conv))]
    if a.bias is not None:
        shapes.append(("bias", a.bias, (channels,)))
    if a.initial_state is not None:
        shapes.append(("initial_state", a.initial_state, (batch, d_conv - 1, channels)))
    for name, value, shape in shapes:
        message = f"causal_conv1d: {name} must have shape {tuple(shape)}, it has {tuple(value.shape)}."
        require(value.dim() == len(shape), message)
        for size, wanted in zip(value.shape, shape, strict=True):
            require(size == wanted, message)


def _check(a: Operands) -> None:
    check_shapes(a)
    require(a.x.is_floating_point(), f"causal_conv1d: x must be floating point, it is {a.x.dtype}.")


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def state_of(a: Operands, dtype: torch.dtype) -> Tensor:
    """An empty last state."""
    return like(a.x, (a.x.shape[0], a.weight.shape[1] - 1, a.x.shape[2]), dtype)


def _results(a: Operands) -> tuple[Tensor, Tensor]:
    _check(a)
    return like(a.x), state_of(a, _state_dtype(a.x))


def _padded(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    """x with the d_conv - 1 inputs before it, in the state's dtype."""
    dtype = _state_dtype(x)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=dtype)
    return torch.cat((initial_state.to(dtype), x.to(dtype)), dim=1)


def _pre_activation(padded: Tensor, weight: Tensor, bias: Tensor | None, length: int) -> Tensor:
    y = sum(padded[:, k : k + length] * weight[:, k].to(padded.dtype) for k in range(weight.shape[1]))
    assert isinstance(y, Tensor)
    return y if bias is None else y + bias.to(padded.dtype)


@operator(results=_results)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution and the state after it, computed in float32 (float64 for float64 inputs).

    Args:
        x: (batch, length, channels); float32, bfloat16, or any other floating dtype.
        weight: (channels, d_conv), the last tap meets the newest input.
        bias: (channels,).
        initial_state: (batch, d_conv - 1, channels), the inputs before x, oldest first; zeros if None.
        activation: None or "silu".

    Returns:
        y like x, contiguous; and the last d_conv - 1 inputs, (batch, d_conv - 1, channels), oldest first, float32
        (float64 for float64 inputs).

    Raises:
        MqAoError: shapes do not fit together, the length is 0, or the activation is unknown.
    """
    padded = _padded(x, weight, initial_state)
    y = _pre_activation(padded, weight, bias, x.shape[1])
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    last_state = padded[:, x.shape[1] :].clone(memory_format=torch.contiguous_format)
    return y.to(x.dtype).contiguous(), last_state


def _gradients(a: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(a)
    bias, initial_state = (like(a.x, (0,)) if v is None else like(v) for v in (a.bias, a.initial_state))
    return like(a.x), like(a.weight), bias, initial_state


@operator(results=_gradients)
def causal_conv1d_backward(
    dy: Tensor,
    dlast_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `causal_conv1d`.

    Args:
        dy: (batch, length, channels), gradient of y.
        dlast_state: (batch, d_conv - 1, channels), gradient of the last state.
        x, weight, bias, initial_state, activation: as in `causal_conv1d`.

    Returns:
        Gradients of x, weight, bias and initial_state, each of its operand's shape and dtype; an empty tensor for an
        operand that is None.

    Raises:
        MqAoError: as `causal_conv1d`.
    """
    length, taps = x.shape[1], weight.shape[1]
    padded = _padded(x, weight, initial_state)
    dpre = dy.to(padded.dtype)
    if activation == "silu":
        pre = _pre_activation(padded, weight, bias, length)
        gate = torch.sigmoid(pre)
        dpre = dpre * gate * (1 + pre * (1 - gate))
    dpadded = torch.zeros_like(padded)
    dpadded[:, length:] += dlast_state
    for k in range(taps):
        dpadded[:, k : k + length] += dpre * weight[:, k].to(padded.dtype)
    dweight = torch.stack([(dpre * padded[:, k : k + length]).sum((0, 1)) for k in range(taps)], dim=1)
    dbias = x.new_empty(0) if bias is None else dpre.sum((0, 1)).to(bias.dtype)
    dinit = dpadded[:, : taps - 1].clone(memory_format=torch.contiguous_format)
    return (
        dpadded[:, taps - 1 :].to(x.dtype).clone(memory_format=torch.contiguous_format),
        dweight.to(weight.dtype).contiguous(),
        dbias,
        x.new_empty(0) if initial_state is None else dinit.to(initial_state.dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state = ctx.saved_tensors
    dx, dweight, dbias, dinit = causal_conv1d_backward(dy, dlast_state, x, weight, bias, initial_state, ctx.activation)
    return dx, dweight, None if bias is None else dbias, None if initial_state is None else dinit, None


torch.library.register_autograd("mq_ao::causal_conv1d", _autograd, setup_context=_setup_context, lib=schemas)
