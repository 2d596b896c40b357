"""Tensors of what people hold numbers in."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor


def as_tensor(given: Any) -> Tensor | None:
    """The tensor that is meant by a tensor, an array, a number, or nested lists of those.

    Args:
        given: anything. Tensors are returned as they are; of arrays, read-only ones and those that run backwards too, a
            copy is made.

    Returns:
        The tensor, or None where `given` is no rectangle of numbers that torch has a dtype for.
    """
    if isinstance(given, Tensor):
        return given
    try:
        return torch.from_numpy(numpy.array(given, order="C"))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
