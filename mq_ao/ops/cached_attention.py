"""`mq_ao::cached_attention`: causal attention of new tokens to a cache of keys and values, and to each other.

The cache is read where it lies, as float or in 8 bits with a scale a token and head: neither copied, repeated for heads
that share keys, nor joined with the new rows. For inference: there is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mq_ao.ops.library import require
from mq_ao.ops.linear_packed import TOKEN_ZERO_POINT
from mq_ao.ops.operator import Operands, like, operator

_PAIRS = ("key", "value", "past_key", "past_value")


def _check_rows(a: Operands, name: str, shape: tuple[int, ...]) -> None:
    rows, scale = getattr(a, name), getattr(a, f"{name}_scale")
    if rows is None:
        require(scale is None, f"cached_attention: {name}_scale is given without {name}.")
        return
    require(
        rows.dtype == a.key.dtype and tuple(rows.shape) == shape,
        f"cached_attention: {name} must be {a.key.dtype} {shape} like the query and the key, it is {rows.dtype} "
        f"{tuple(rows.shape)}.",
    )
    if rows.dtype != torch.uint8:
        require(scale is None, f"cached_attention: {name} is {rows.dtype}, so it takes no scale.")
        return
    require(
        scale is not None and scale.dtype == torch.float32 and tuple(scale.shape) == shape[:3],
        f"cached_attention: {name} is uint8, so its scale must be float32 {shape[:3]}.",
    )


def _results(a: Operands) -> Tensor:
    for name in ("query", "key"):
        dim = getattr(a, name).dim()
        require(dim == 4, f"cached_attention: {name} must have 4 dimensions, it has {dim}.")
    require(a.query.is_floating_point(), f"cached_attention: the query must be floating point, it is {a.query.dtype}.")
    require(
        a.key.dtype in (a.query.dtype, torch.uint8),
        f"cached_attention: keys must be {a.query.dtype} like the query or uint8, they are {a.key.dtype}.",
    )
    batch, heads, length, width = a.query.shape
    groups = a.key.shape[2]
    require(heads % groups == 0, f"cached_attention: {heads} heads cannot share the keys of {groups}.")
    require(
        (a.past_key is None) == (a.past_value is None),
        "cached_attention: past_key and past_value come together.",
    )
    for name in _PAIRS:
        rows = a.past_key if name.startswith("past") else a.query
        tokens = length if rows is a.query or rows is None else rows.shape[0]
        _check_rows(a, name, (tokens, batch, groups, width))
    if a.starts is not None:
        require(
            a.starts.dtype == torch.int64 and tuple(a.starts.shape) == (batch,),
            f"cached_attention: starts must be int64 ({batch},), it is {a.starts.dtype} {tuple(a.starts.shape)}.",
        )
    return like(a.query, (batch, length, heads, width))


@operator(results=_results)
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    past_key_scale: Tensor | None = None,
    past_value_scale: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """`softmax(scaling * query . keys) . values` over the tokens before each token and itself.

    Scores, weights and sums are float32 (float64 for float64 queries). The native kernel holds the scores of a few keys
    at a time; it errs by about 1e-6 of the largest value.

    Args:
        query: (batch, heads, length, width), floating point.
        key: (length, batch, groups, width), of the new tokens, the query's dtype, or uint8 as from
            `quantize_per_token`; head h reads group `h // (heads // groups)`.
        value: like key.
        scaling: of the scores, usually width to the power of -1/2.
        past_key: (tokens before, batch, groups, width), of key's dtype; None: there are none.
        past_value: likewise.
        key_scale: float32 (length, batch, groups), with uint8: a row is `(key - 128) * key_scale`.
        value_scale: likewise.
        past_key_scale: float32 (tokens before, batch, groups), with uint8.
        past_value_scale: likewise.
        starts: int64 (batch,), where a sequence begins, counted from the first token before; no token sees what lies
            before it. None: all begin at 0.

    Returns:
        (batch, length, heads, width), contiguous, of the query's dtype; zeros for tokens that lie before their start.

    Raises:
        MqAoError: shapes or dtypes do not fit together.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, width = query.shape
    groups = key.shape[2]

    def joined(past: Tensor | None, past_scale: Tensor | None, rows: Tensor, scale: Tensor | None) -> Tensor:
        """(batch, groups, tokens, width)."""
        parts = [(rows, scale)] if past is None else [(past, past_scale), (rows, scale)]
        floats = [
            part.to(dtype) if by is None else (part.to(dtype) - TOKEN_ZERO_POINT) * by[..., None] for part, by in parts
        ]
        return torch.cat(floats).permute(1, 2, 0, 3)

    keys = joined(past_key, past_key_scale, key, key_scale)
    values = joined(past_value, past_value_scale, value, value_scale)
    # Heads that share keys are rows of one product: keys are not repeated.
    rows = query.to(dtype).reshape(batch, groups, heads // groups * length, width)
    places = torch.arange(keys.shape[2], device=query.device)
    hidden = places > places[-length:].repeat(heads // groups)[:, None]
    if starts is not None:
        hidden = hidden | (places < starts[:, None, None, None])
    weights = (rows @ keys.mT * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
    # A token that sees nothing has no weights.
    result = weights.masked_fill(hidden, 0.0) @ values
    return result.unflatten(2, (heads // groups, length)).flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()
