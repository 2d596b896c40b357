"""`.pt2` archives of several compiled programs on one copy of the weights, which the public functions cannot make."""

from __future__ import annotations

from torch.export.pt2_archive._package import AOTICompiledModel, load_pt2, package_pt2

__all__ = ["AOTICompiledModel", "load_pt2", "package_pt2"]
