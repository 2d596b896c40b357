"""Digests of what a measurement depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torchao
from torch import Tensor, nn

from mq_ao import __version__
from mq_ao.recipe import Recipe, Roles

Batch = Tensor | tuple[Any, ...]
"""Inputs of a model, positional where there are several."""


def digest(parts: Iterable[Tensor | str]) -> str:
    """Of tensors and strings in their order, 64 hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            sha.update(part.encode())
        else:
            sha.update(f"{part.dtype} {tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        sha.update(b"\0")
    return sha.hexdigest()


def of_model(model: nn.Module) -> str:
    """Of a model's tensors, and of the versions that quantize it."""
    parts: list[Tensor | str] = [__version__, torch.__version__, torchao.__version__]
    for name, tensor in model.state_dict().items():
        parts += [name, tensor]
    return digest(parts)


def of_batches(batches: Sequence[Batch]) -> str:
    """Of calibration data."""
    parts: list[Tensor | str] = []
    for batch in batches:
        parts += ["batch", *(batch if isinstance(batch, tuple) else (batch,))]
    return digest(parts)


def of_recipe(recipe: Recipe) -> str:
    """Of everything about a recipe but its name, defaults of its passes included."""
    modules = sorted((name, _sorted(roles)) for name, roles in recipe.modules.items())
    # Without modules as ever, so that what is kept of such recipes stays good.
    return digest([repr(recipe.passes), repr(_sorted(recipe.scheme.roles)), *([repr(modules)] if modules else [])])


def _sorted(roles: Roles) -> list[tuple[str, str]]:
    return sorted((str(role), repr(spec)) for role, spec in roles.items())
