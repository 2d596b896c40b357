"""The graph of one decode step: states are overwritten where they lie, and fewer kernels do the same.

A step waits for memory and for kernels to start, so each kernel less counts: the convolution joins in_proj, which gives
its input, and the scan dt_proj.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mq_ao.graph import walk
from mq_ao.lowering.language_graphs import flat
from mq_ao.models.states import States
from mq_ao.ops.in_place import STATEFUL

aten = torch.ops.aten
mq = torch.ops.mq_ao

_TWINS: dict[object, Any] = {getattr(mq, name).default: getattr(mq, f"{name}_").default for name in STATEFUL}


def one_token(module: GraphModule, states: States) -> GraphModule:
    """Makes the graph of a step from that of any length, on the same tensors.

    Args:
        module: graph `(input_ids, *states, positions) -> (logits, *states)`, lowered or in float; it is not changed.
        states: its states.

    Returns:
        A graph `(input_ids, *states, positions) -> (logits, *rows)` that overwrites its states but for those that grow,
        of which it gives the new rows. Where what carries one has no operator that does so, it is computed and then
        copied. Where a convolution or a scan does not read a linear on integers, the two stay apart.
    """
    step = flat(module)
    graph = step.graph
    (output,) = graph.find_nodes(op="output")
    logits, *results = output.args[0]
    given = graph.find_nodes(op="placeholder")[1 : 1 + len(results)]
    triples = list(zip(states.items, given, results, strict=True))
    output.args = ((logits, *[result for item, _, result in triples if item.grows]),)
    for item, state, result in triples:
        if item.grows:
            continue
        carriers = _carried(state, result)
        for carrier in carriers:
            _overwrite(step, carrier)
        if not carriers:
            with graph.inserting_before(output):
                graph.call_function(aten.copy_.default, (state, result))
    graph.eliminate_dead_code()
    for conv in walk.calls(step, {mq.qcausal_conv1d_.default}):
        _join_convolution(step, conv)
    for scan in walk.calls(step, {mq.qselective_scan_.default}):
        _join_scan(step, scan)
    step.recompile()
    return step


def _carried(state: Node, result: Node) -> list[Node]:
    """The operators that read a state, or its layers, and give the result; none where that is not all."""
    stacked = result.target == aten.stack.default
    carriers: list[Node] = []
    for layer, last in enumerate(walk.inputs(result) if stacked else [result]):
        carrier = walk.argument(last, 0) if walk.is_result(last, 1) else None
        if carrier is None or carrier.target not in _TWINS:
            return []
        first = walk.arguments(carrier)["initial_state"]
        if first is None or (stacked and (first.target != aten.select.int or first.args != (state, 0, layer))):
            return []
        if (not stacked and first is not state) or len(_readers(first)) != 1 or len(last.users) != stacked:
            return []
        carriers.append(carrier)
    return carriers if len(_readers(state)) == len(carriers) else []


def _readers(node: Node) -> list[Node]:
    """What reads values of a node, not its sizes alone."""
    return [user for user in node.users if user.target != aten.sym_size.int]


def _overwrite(step: GraphModule, carrier: Node) -> None:
    """The operator's twin in its place."""
    with step.graph.inserting_before(carrier):
        twin = step.graph.call_function(_TWINS[carrier.target], tuple(walk.arguments(carrier).values()))
    for user in list(carrier.users):
        if walk.is_result(user, 0):
            twin.meta = dict(user.meta)
            user.replace_all_uses_with(twin)


def _join_convolution(step: GraphModule, conv: Node) -> None:
    """`linears_rows` and the convolution of one of its pieces as one operator, in the place of the linear."""
    x, x_scale, x_zero_point, *taps = walk.arguments(conv).values()
    linears: Any = x.args[0] if x.target == walk.getitem else None
    if linears is None or linears.target != mq.linears_rows.default or walk.only_user(x) is not conv:
        return
    piece, given = x.args[1], walk.arguments(linears)
    if (given["out_scales"][piece], given["out_zero_points"][piece]) != (x_scale, x_zero_point):
        return
    operands = [item for item in taps if isinstance(item, Node)]
    if not all(_depends_on_inputs_alone(item) for item in operands):
        return
    for item in operands:
        if item > linears:  # what comes before it may have other readers in between
            linears.prepend(item)
    with step.graph.inserting_before(linears):
        joined = step.graph.call_function(mq.int8_conv_step_.default, (*given.values(), piece, *taps))
    joined.meta = {key: value for key, value in linears.meta.items() if key != "val"}
    x.meta = dict(conv.meta)
    conv.replace_all_uses_with(x)
    linears.replace_all_uses_with(joined)
    step.graph.erase_node(conv)
    step.graph.erase_node(linears)


def _depends_on_inputs_alone(node: Node) -> bool:
    """Whether a node is a tensor of the module, an input or a layer of one, which can be had anywhere."""
    if node.op in ("get_attr", "placeholder"):
        return True
    return node.target == aten.select.int and walk.argument(node, 0).op == "placeholder"


def _join_scan(step: GraphModule, scan: Node) -> None:
    """dt_proj and the scan as one operator, in the place of the scan."""
    rest = walk.arguments(scan)
    linear = rest["delta"]
    if linear.target != mq.linear_rows.default or walk.only_user(linear) is not scan:
        return
    given = walk.arguments(linear)
    delta_grid = (rest["delta_scale"], rest["delta_zero_point"])
    static = given["token_scale"] is None and not given["group_size"]
    if not static or delta_grid != (given["out_scale"], given["out_zero_point"]):
        return
    before = [given[name] for name in ("q", "weight", "scale", "correction", "bias")]
    u = [rest.pop(name) for name in ("u", "u_scale", "u_zero_point")]
    for name in ("delta", "delta_scale", "delta_zero_point"):
        rest.pop(name)
    with step.graph.inserting_before(scan):
        args = (*before, *delta_grid, *u, *rest.values())
        joined = step.graph.call_function(mq.int8_scan_step_.default, args)
    joined.meta = {**linear.meta, "val": walk.value(scan)}
    scan.replace_all_uses_with(joined)
    step.graph.erase_node(scan)
    step.graph.erase_node(linear)
