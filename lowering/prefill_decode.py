"""The two programs of a compiled language model: prefill and decode."""

from __future__ import annotations

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from mq_ao.lowering.language_graphs import export
from mq_ao.models.states import StateShapes


def export_prefill(module: GraphModule, shapes: StateShapes) -> ExportedProgram:
    """Exports `(input_ids, conv_state, ssm_state, positions)` with any batch, length and count."""
    batch, length = Dim("batch", min=1), Dim("length", min=1)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    dynamic = ({0: batch, 1: length}, {1: batch}, {1: batch}, {0: Dim("count", min=1)})
    args = (ids, *shapes.zeros(2), torch.arange(3))
    return export(module, args, dynamic)


def export_decode(module: GraphModule, shapes: StateShapes) -> ExportedProgram:
    """Exports `(input_ids, conv_state, ssm_state)` at length 1, with any batch."""
    batch = Dim("batch", min=1)
    args = (torch.zeros(2, 1, dtype=torch.int64), *shapes.zeros(2))
    return export(module, args, ({0: batch}, {1: batch}, {1: batch}))
