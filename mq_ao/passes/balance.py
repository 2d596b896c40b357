"""SmoothQuant's balance between an activation and the weight that reads it (docs/method.md, section 2)."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

LIMIT = 100.0


class Size(StrEnum):
    """How large a channel is."""

    LARGEST = "largest"
    """Its largest magnitude, which sets the step of an integer range."""
    POWER = "power"
    """Its root mean square, which sets the step where the channel is mixed with others afterwards."""


def balance(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Scales s = a^alpha / w^(1 - alpha), divided by their geometric mean and clamped to [1/100, 100].

    One common factor changes no quantized value, so the scales are centred before they are clamped.

    Args:
        activation: (channels,), sizes of the activation's channels.
        weight: (channels,), sizes of the weights that multiply each channel.
        alpha: in [0, 1]; 1 makes the activation flat, 0 the weight.

    Returns:
        (channels,), float64, positive; 1 for dead channels (where either size is 0).
    """
    alive = (activation > 0) & (weight > 0)
    if not alive.any():
        return torch.ones_like(activation)
    log = torch.where(alive, alpha * activation.log() - (1 - alpha) * weight.log(), 0.0)
    log = torch.where(alive, log - log[alive].mean(), 0.0)
    return log.exp().clamp(1 / LIMIT, LIMIT)


def describe(scales: Tensor) -> str:
    """Range of the scales, in words."""
    return f"scales {scales.min():.3g} to {scales.max():.3g}"
