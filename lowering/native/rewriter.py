"""Rewrites a converted graph for programs without a compiler: what Inductor would fuse is an operator here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.fx import GraphModule

from mq_ao.graph import edit, walk
from mq_ao.lowering.graph_rewriter import Step, each
from mq_ao.lowering.inductor import rewriter as linked
from mq_ao.lowering.patterns import DQ_STATIC, Q_STATIC, Quantized
from mq_ao.quantizer.kernels import UINT8

aten = torch.ops.aten
mq = torch.ops.mq_ao

INTEGER_KERNELS = linked.INTEGER_KERNELS | {mq.qrms_norm.default, mq.qgated_norm.default}


class Rewriter(linked.Rewriter):
    """Edits one converted GraphModule in place.

    Args:
        module: result of `convert_pt2e`.
    """

    @property
    def steps(self) -> Sequence[Step]:
        """Norms are known by what reads them."""
        quantizes = {Q_STATIC, mq.quantize_per_token.default}
        gated_norms = each(quantizes, partial(self.gated_norm, mq.qgated_norm.default))
        return (*super().steps, gated_norms, each(quantizes, partial(self.norm, mq.qrms_norm.default)))


def own_kernels(module: GraphModule) -> None:
    """Replaces what is left of q/dq steps, for which a program would need Python, by operators with kernels."""
    for node in walk.calls(module, {Q_STATIC, DQ_STATIC}):
        given = Quantized.of(node)
        with module.graph.inserting_before(node):
            if node.target == DQ_STATIC:
                value = module.graph.call_function(aten.to.dtype, (given.x, torch.float32))
                value = module.graph.call_function(aten.sub.Scalar, (value, given.zero_point))
                edit.replace(node, module.graph.call_function(aten.mul.Scalar, (value, given.scale)))
            elif given.limits == UINT8.limits:
                args = (given.x, given.scale, given.zero_point)
                edit.replace(node, module.graph.call_function(mq.quantize_per_tensor.default, args))
    module.recompile()
