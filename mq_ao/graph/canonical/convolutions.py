"""SiLU into the convolution before it, and zeros around a sequence that the causal convolution knows of."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mq_ao.graph import walk
from mq_ao.graph.canonical.spelling import Spelling
from mq_ao.graph.views import Conv

aten = walk.aten
CONV = torch.ops.mq_ao.causal_conv1d.default

_SEQUENCE = 1


def activated(spelling: Spelling, node: Node) -> None:
    """SiLU of a convolution, all of it or a range of its steps."""
    if node.target not in walk.ACTIVATION:
        return
    y = source = walk.argument(node, 0)
    while source.target == aten.slice.Tensor and len(source.users) == 1:
        source = walk.argument(source, 0)
    conv = _convolution(source)
    if conv is None or len(source.users) != 1:
        return
    if conv.activation is None:
        conv.activation = "silu"
        spelling.substitute(node, y)


def trimmed(spelling: Spelling, node: Node) -> None:
    """A convolution of x with zeros before and behind it, cut to the steps of x, is that of x alone."""
    if node.target != aten.slice.Tensor:
        return
    y, axis, start, stop, step = walk.arguments(node).values()
    conv = _convolution(y)
    if conv is None or axis not in (_SEQUENCE, -2) or step != 1 or len(conv.node.users) != 1:
        return
    padded = conv.x
    if conv.initial_state is not None or padded.target not in walk.PADDED or not walk.is_tokenwise(padded):
        return
    x, pad = walk.argument(padded, 0), walk.arguments(padded)["pad"]
    if len(pad) != 4:
        return
    _, _, before, behind = pad
    whole = padded.meta["val"].shape[_SEQUENCE]
    length = x.meta["val"].shape[_SEQUENCE]
    first, last = (_value(item, default) for item, default in ((start, 0), (stop, whole)))
    # A stop behind the end is the end: INT64_MAX where none was written.
    open_end = behind == 0 and (stop is None or (isinstance(last, int) and last == _INT64_MAX))
    if not (walk.same_size(first, before) and (open_end or walk.same_size(last, before + length))):
        return
    new = spelling.call(CONV, (x, conv.weight, conv.bias, None, conv.activation), conv.node)
    spelling.substitute(node, spelling.call(walk.getitem, (new, 0), conv.node))


_INT64_MAX = 2**63 - 1


def _convolution(y: Node) -> Conv | None:
    """The convolution whose output y is, as nobody else reads it."""
    if not walk.is_result(y, 0) or len(y.users) != 1:
        return None
    conv = walk.argument(y, 0)
    return Conv.of(conv) if conv.target == CONV else None


def _value(size: Any, default: Any) -> Any:
    return size.meta["val"] if isinstance(size, Node) else default if size is None else size
