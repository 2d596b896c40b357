"""Keys and values of attention in 8 bits: a graph takes, reads and gives integers with a scale a token and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.graph import CodeGen

from mq_ao.graph.views import Attention
from mq_ao.lowering.patterns import Tokens

aten = torch.ops.aten
Quantize = Callable[[Tokens, Node], tuple[Node, Node]]
"""Integers and scales of a value, computed before a node."""


def hold_integers(node: Node, quantize: Quantize) -> None:
    """Edits the graph around attention whose new keys and values are quantized token by token; leaves others alone."""
    attention = Attention.of(node)
    key, value = Tokens.of(attention.key), Tokens.of(attention.value)
    past_key, past_value = attention.past_key, attention.past_value
    if key is None or value is None or past_key is None or past_value is None:
        return
    keys = _held(node, attention.key, past_key, quantize)
    values = _held(node, attention.value, past_value, quantize)
    attention.key, attention.key_scale, attention.past_key_scale = keys
    attention.value, attention.value_scale, attention.past_value_scale = values
    # Its inputs and outputs are others now than those that were captured.
    node.graph.set_codegen(CodeGen())


def _held(node: Node, rows: Node, past: Node, quantize: Quantize) -> tuple[Node, Node, Node]:
    """New rows as integers, their scales, and those of the rows before, as `node` reads them."""
    graph, tokens = node.graph, Tokens.of(rows)
    assert tokens is not None
    integers, scale = quantize(tokens, rows)
    example = tokens.source.meta["val"]
    integers.meta["val"], scale.meta["val"] = example.to(torch.uint8), example[..., :1]
    with graph.inserting_after(past):
        past_scale = graph.placeholder(f"{past.target}_scale")
    past_scale.meta["val"] = past.meta["val"][..., :1]
    past.meta["val"] = past.meta["val"].to(torch.uint8)
    (output,) = graph.find_nodes(op="output")
    results: list[Any] = []
    for result in output.args[0]:
        results += [integers, scale] if Tokens.of(result) == tokens else [result]
    output.args = (tuple(results),)
    with graph.inserting_before(node):
        flat, flat_past = (graph.call_function(aten.squeeze.dim, (item, -1)) for item in (scale, past_scale))
    return integers, flat, flat_past
