"""One spelling for what models write in many: exact rewrites of a captured program, before anything is matched.

Every rule looks at one node and at what computes it, and leaves the values as they are. Nodes change their operator in
place where that is possible, so that they keep their names, which a program's signature holds.
"""

from __future__ import annotations

from torch.export import ExportedProgram

from mq_ao.graph.canonical import convolutions, in_place, pointwise, products, scans
from mq_ao.graph.canonical.spelling import Spelling

__all__ = ["canonicalise"]

_RULES = (
    pointwise.masked,
    products.linear,
    products.biased,
    products.merged,
    pointwise.silu,
    pointwise.rms_norm,
    pointwise.weighted,
    convolutions.activated,
    convolutions.trimmed,
    scans.softplus,
    scans.skip,
)


def canonicalise(program: ExportedProgram) -> None:
    """Rewrites a program in place: products with parameters become linears, spelled-out RMSNorms a node, and so on."""
    in_place.undo(program.graph)
    spelling = Spelling(program)
    for rule in _RULES:
        for node in list(program.graph.nodes):
            # A rule may have erased it.
            if node.op == "call_function" and not node._erased:
                rule(spelling, node)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.graph_module.recompile()
