"""`.pt2` archives of several compiled programs on one copy of the weights, which the public functions cannot make."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.export.pt2_archive._package import AOTICompiledModel, load_pt2, package_pt2

__all__ = ["AOTICompiledModel", "load_pt2", "package_pt2", "run"]


def run(program: AOTICompiledModel, inputs: Iterable[Tensor]) -> list[Tensor]:
    """Outputs of a program of tensors alone.

    Calling it would read its tree structures from JSON each time, and operators with a gradient in Python would be
    entered through Python: 0.07 ms of a token of the bundled model, which takes 0.6.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return program.loader.boxed_run(list(inputs))
