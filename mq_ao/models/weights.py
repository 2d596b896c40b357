"""Checks that stored weights are those of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mq_ao.errors import MqAoError


def fitted(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The stored weights in float32.

    Args:
        weights: by the model's names.
        expected: shapes of the model's weights.

    Raises:
        MqAoError: weights are missing, extra, of another shape, integers or not finite; they are named.
    """
    if missing := expected.keys() - weights.keys():
        raise MqAoError(f"weights are missing: {listed(missing)}.")
    if extra := weights.keys() - expected.keys():
        raise MqAoError(f"there are weights that a model of this configuration does not have: {listed(extra)}.")
    wrong = [
        f"{name} is {tuple(weights[name].shape)} and should be {tuple(shape)}"
        for name, shape in expected.items()
        if weights[name].shape != shape
    ]
    if wrong:
        raise MqAoError(f"weights do not fit the configuration: {listed(wrong)}.")
    if whole := [name for name in expected if not weights[name].is_floating_point()]:
        raise MqAoError(f"weights are no floating-point numbers (already quantized?): {listed(whole)}.")
    floats = {name: tensor.float() for name, tensor in weights.items()}
    check_finite(floats)
    return floats


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises MqAoError that names the weights that hold NaN or infinity, if any do."""
    if broken := [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise MqAoError(f"weights hold NaN or infinity: {listed(broken)}.")


def listed(names: Iterable[str], most: int = 6) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - most
    return ", ".join(ordered[:most]) + (f", and {more} more" if more > 0 else "")
