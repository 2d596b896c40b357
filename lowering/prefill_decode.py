"""The two programs of a compiled language model: prefill and decode."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from mq_ao.lowering.language_graphs import export, flat, with_positions
from mq_ao.models.states import States

Dynamic = Mapping[int, Dim | None]
_ROWS = 3
"""Of states that grow, in examples: a size that torch.export does not take for a constant."""


def both(module: GraphModule, states: States) -> dict[str, ExportedProgram]:
    """The programs of a graph `(input_ids, *states) -> (logits, *states)`."""
    return {
        "prefill": export_prefill(with_positions(module), states),
        "decode": export_decode(flat(module), states),
    }


def export_prefill(module: GraphModule, states: States) -> ExportedProgram:
    """Exports `(input_ids, *states, positions)` with any batch, length and count."""
    batch, length = Dim("batch", min=1), Dim("length", min=1)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    first: Dynamic = {0: batch, 1: length}
    dynamic = (first, *_dynamic(states, batch), {0: Dim("count", min=1)})
    args = (ids, *states.examples(2, _ROWS), torch.arange(3))
    return export(module, args, dynamic)


def export_decode(module: GraphModule, states: States) -> ExportedProgram:
    """Exports `(input_ids, *states)` at length 1, with any batch."""
    batch = Dim("batch", min=1)
    args = (torch.zeros(2, 1, dtype=torch.int64), *states.examples(2, _ROWS))
    first: Dynamic = {0: batch}
    return export(module, args, (first, *_dynamic(states, batch)))


def _dynamic(states: States, batch: Dim) -> list[Dynamic]:
    past = Dim("past", min=0)
    return [{item.batch_axis: batch, **({0: past} if item.grows else {})} for item in states.items]
