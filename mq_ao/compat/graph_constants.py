"""Constants of graphs, by the dotted names that nodes have them under."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx.graph_module import _get_attr

__all__ = ["attribute"]


def attribute(module: nn.Module, name: str) -> Any:
    """What lies under a dotted name such as "layers.0.weight"; `nn.Module` has it for parameters and buffers apart."""
    return _get_attr(module, name)
