"""Inductor and dynamo: their settings, folding of constants, and compiling ahead of time into one archive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor import aot_compile
from torch._inductor.constant_folding import constant_fold
from torch.export.pt2_archive._package import package_pt2

__all__ = ["aot_compile", "constant_fold", "dynamo_settings", "inductor_settings", "keep_address", "package_pt2"]


def inductor_settings(**values: Any) -> Any:
    """A context in which Inductor has these settings. Options of `torch.compile` do not reach all that reads them."""
    return torch._inductor.config.patch(**values)


def dynamo_settings(**values: Any) -> Any:
    """A context in which dynamo has these settings."""
    return torch._dynamo.config.patch(**values)


def keep_address(tensor: Tensor) -> None:
    """Promises that a tensor stays where it lies: a CUDA graph need not copy it."""
    torch._dynamo.mark_static_address(tensor)
