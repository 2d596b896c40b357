"""What reads a norm."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from mq_ao.graph import walk
from mq_ao.graph.edit import channels
from mq_ao.graph.residual import MOVING, NORM, SELECTING, keeps_channels, looks_only, normalised
from mq_ao.graph.views import Norm

_ONWARD = SELECTING | MOVING | {walk.aten.mean.dim, walk.aten.flip.default, walk.aten.index.Tensor}
"""With these along other axes than the channels, weight and bias of a norm may still be applied afterwards."""


def norms(module: GraphModule) -> list[Node]:
    """RMSNorm and LayerNorm nodes over the last axis, in graph order."""
    return [node for node in walk.calls(module, NORM) if len(normalised(node)) == 1]


def readers_of(norm: Node) -> list[Node] | str:
    """The linears and experts that read the norm's output, perhaps in part; or the reason why something else does."""
    readers: dict[Node, None] = {}
    # A bias would have to be scaled on its way into the linear.
    biased = Norm.of(norm).bias is not None
    pending = [norm]
    while pending:
        value = pending.pop()
        for reader in value.users:
            if looks_only(reader, value):
                continue
            moves = reader.target in _ONWARD and keeps_channels(reader, channels(norm))
            if reader.target in walk.EXPERTS and biased:
                return f"{norm.name} has a bias, and is also read by {reader.name}, which takes none"
            if reader.target in walk.LINEAR | walk.EXPERTS:
                readers[reader] = None
            elif moves or ((walk.is_scaling(reader) or walk.is_tokenwise(reader)) and not biased):
                pending.append(reader)
            else:
                return f"{norm.name} is also read by {reader.name}, which is not a linear"
    return list(readers)
