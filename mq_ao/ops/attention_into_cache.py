"""`mq_ao::attention_into_cache`: `cached_attention` on a cache of fixed size, which it writes the new rows into.

For programs that keep their states in their own memory, where sizes are planned and nothing is appended. The position
is a tensor: such a program's own number of tokens so far.
"""

from __future__ import annotations

from torch import Tensor

from mq_ao.ops.cached_attention import cached_attention
from mq_ao.ops.library import require
from mq_ao.ops.operator import Operands, like, operator


def _results(a: Operands) -> Tensor:
    name = "attention_into_cache"
    require(
        a.query.dim() == 4 and a.query.is_floating_point(),
        f"{name}: the query must be floating point (batch, heads, length, width), it is {a.query.dtype} "
        f"{tuple(a.query.shape)}.",
    )
    require(a.key.dim() == 4, f"{name}: key must have 4 dimensions, it has {a.key.dim()}.")
    batch, heads, length, width = a.query.shape
    groups = a.key.shape[2]
    require(heads % groups == 0, f"{name}: {heads} heads cannot share the keys of {groups}.")
    for kind in ("key", "value", "key_cache", "value_cache"):
        rows = getattr(a, kind)
        size = a.key_cache.shape[0] if kind.endswith("cache") else length
        require(
            rows.dtype == a.query.dtype and tuple(rows.shape) == (size, batch, groups, width),
            f"{name}: {kind} must be {a.query.dtype} {(size, batch, groups, width)} like the query and the other rows, "
            f"it is {rows.dtype} {tuple(rows.shape)}.",
        )
    require(
        a.position.numel() == 1 and not a.position.is_floating_point() and not a.position.is_complex(),
        f"{name}: position must be one integer, it is {a.position.dtype} {tuple(a.position.shape)}.",
    )
    return like(a.query, (batch, length, heads, width))


@operator(results=_results, changes=("key_cache", "value_cache"))
def attention_into_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
) -> Tensor:
    """Writes new keys and values behind those before them, and attends to all.

    Args:
        query: (batch, heads, length, width), floating point.
        key: (length, batch, groups, width), of the query's dtype; head h reads group `h // (heads // groups)`.
        value: like key.
        scaling: of the scores.
        key_cache: (most tokens, batch, groups, width); rows from `position` on are overwritten by `key`.
        value_cache: likewise by `value`.
        position: tokens before the new ones, one integer, int64 in ExecuTorch.

    Returns:
        (batch, length, heads, width), contiguous, as of `cached_attention`.

    Raises:
        MqAoError: shapes or dtypes do not fit together, or the cache has no room for the new rows.
    """
    first = int(position)
    last = first + key.shape[0]
    require(
        first >= 0 and last <= key_cache.shape[0],
        f"attention_into_cache: tokens {first}..{last - 1} do not fit into a cache of {key_cache.shape[0]}.",
    )
    key_cache[first:last] = key
    value_cache[first:last] = value
    return cached_attention.reference(query, key, value, scaling, key_cache[:first], value_cache[:first])
