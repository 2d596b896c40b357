"""Captures channel-first code as the channel-last graph that it stands for.

Mamba's public implementations hold activations as (batch, channels, length), or as (channels, batch * length) around a
`weight @ x`, for the sake of their CUDA kernels. Written out, such a graph hides linears in matmuls between transposes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import linear, silu
from torch.overrides import TorchFunctionMode

from mq_ao.capture import grouped

Groups = tuple[tuple[int, ...], ...]

_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _View:
    """A tensor as another one with its axes reordered and merged.

    Attributes:
        base: the other tensor.
        groups: for each axis of the view, the axes of `base` that it runs over, as in einops' "b l d -> d (b l)":
            ((2,), (0, 1)).
        product: (x, weight) if `base` is their linear, without a bias.
    """

    base: Tensor
    groups: Groups
    product: tuple[Tensor, Tensor] | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of `base` in the view's order."""
        return tuple(axis for group in self.groups for axis in group)

    @property
    def last(self) -> tuple[int, ...]:
        """The group of an axis that is the last axis of `base`."""
        return (self.base.dim() - 1,)


def _identity(dims: int) -> Groups:
    return tuple((axis,) for axis in range(dims))


class ChannelLast(TorchFunctionMode):
    """While active, operators on a reordered view of a tensor act on the tensor itself, and their result is the view.

    The values of every tensor stay what they are: only which nodes make them changes. `weight @ x` with x
    (channels, batch * length) becomes a linear of (batch, length, channels); the reordering back finds the linear's
    own output; and the reorderings in between are dead code, which torch.export drops. Casts to the dtype that a
    tensor already has are left out. Anything else runs as written.
    """

    def __init__(self) -> None:
        super().__init__()
        # By id, with the tensor itself so that the id stays its own.
        self._views: dict[int, tuple[Tensor, _View]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if _writes(name, kwargs):
            # What is written to may be a copy of what it is a view of, or the other way round.
            self._views.clear()
        elif name == "einsum" and len(args) == 3:
            product = grouped.einsum(*args)
            if product is not None:
                return product
        elif name in _HANDLERS and args and isinstance(args[0], Tensor):
            handler = _HANDLERS[name]
            try:
                inspect.signature(handler).bind(self, name, *args, **kwargs)
            except TypeError:  # Spelled with keywords that the handler does not know.
                return func(*args, **kwargs)
            result = handler(self, name, *args, **kwargs)
            if result is not NotImplemented:
                return result
            if name == "view" and not kwargs and not isinstance(args[1], torch.dtype):
                # The tensor may be a view where the code's own would have been contiguous.
                func = Tensor.reshape
        return func(*args, **kwargs)

    def _known(self, x: Tensor) -> _View | None:
        entry = self._views.get(id(x))
        return None if entry is None else entry[1]

    def _remember(self, x: Tensor, view: _View) -> Tensor:
        self._views[id(x)] = (x, view)
        return x

    def _give(self, view: _View) -> Tensor:
        """The tensor that a view describes: `base` itself where nothing is reordered."""
        base, groups = view.base, view.groups
        if groups == _identity(base.dim()):
            return base if view.product is None else self._remember(base, view)
        x = base if view.axes == tuple(range(base.dim())) else base.permute(view.axes)
        if any(len(group) != 1 for group in groups):
            x = x.reshape([math.prod(base.shape[axis] for axis in group) for group in groups])
        return self._remember(x, view)

    def _reordered(self, func: Callable[..., Tensor], x: Tensor, order: Sequence[int]) -> Tensor:
        known = self._known(x)
        if known is None:
            return self._remember(func(x), _View(x, tuple((axis % x.dim(),) for axis in order)))
        return self._give(_View(known.base, tuple(known.groups[axis] for axis in order), known.product))

    def _permute(self, name: str, x: Tensor, *order: Any) -> Any:
        if len(order) == 1 and not isinstance(order[0], int):
            (order,) = order
        return self._reordered(lambda x: x.permute(order), x, order)

    def _transpose(self, name: str, x: Tensor, dim0: int, dim1: int) -> Any:
        order = list(range(x.dim()))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self._reordered(lambda x: x.transpose(dim0, dim1), x, order)

    def _t(self, name: str, x: Tensor) -> Any:
        return self._transpose(name, x, 0, 1) if x.dim() == 2 else NotImplemented

    def _reshape(self, name: str, x: Tensor, *shape: Any) -> Any:
        if len(shape) == 1 and isinstance(shape[0], Sequence):
            (shape,) = shape
        if not all(isinstance(size, int | torch.SymInt) for size in shape):
            return NotImplemented
        known = self._known(x) or _View(x, _identity(x.dim()))
        groups = _merged(known, shape)
        if groups is None:
            return NotImplemented
        if known.base is x:
            return x if groups == known.groups else self._remember(x.reshape(shape), _View(x, groups))
        return self._give(_View(known.base, groups, known.product))

    def _split(self, name: str, x: Tensor, sizes: Any, dim: int = 0) -> Any:
        known = self._known(x)
        if known is None or len(known.groups[dim]) != 1:
            return NotImplemented
        parts = getattr(known.base, name)(sizes, dim=known.groups[dim][0])
        return tuple(self._give(_View(part, known.groups)) for part in parts)

    def _contiguous(self, name: str, x: Tensor) -> Any:
        known = self._known(x)
        return NotImplemented if known is None else self._remember(x.contiguous(), known)

    def _silu(self, name: str, x: Tensor, inplace: bool = False) -> Any:
        if inplace:
            self._views.clear()
        known = self._known(x)
        return NotImplemented if known is None else self._give(_View(silu(known.base), known.groups))

    def _cast(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if name in _CASTS:
            wanted = _CASTS[name]
        elif len(args) + len(kwargs) == 1:
            (wanted,) = (*args, *kwargs.values())
            wanted = wanted.dtype if name == "type_as" else wanted
        else:
            return NotImplemented
        known = self._known(x)
        if wanted is x.dtype:
            return x
        if known is None or not isinstance(wanted, torch.dtype):
            return NotImplemented
        return self._give(_View(known.base.to(wanted), known.groups))

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        known = self._known(x)
        if known is None or known.groups[-1] != known.last:
            return NotImplemented
        return self._give(_View(linear(known.base, weight, bias), known.groups))

    def _matmul(self, name: str, weight: Tensor, x: Tensor) -> Any:
        known = self._known(x)
        if known is None or weight.dim() != 2 or x.dim() < 2 or known.groups[-2] != known.last:
            return NotImplemented
        return self._give(_View(linear(known.base, weight), known.groups, (known.base, weight)))

    def _conv1d(
        self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """A convolution of kernel size 1 is a linear."""
        given = {**dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False)), **kwargs}
        groups = given.pop("groups", 1)
        changed = {key: value for key, value in given.items() if value not in (_CONV1D[key], (_CONV1D[key],))}
        product = grouped.pointwise_conv1d(x, weight, bias, groups, changed)
        return NotImplemented if product is None else product

    def _add(self, name: str, x: Tensor, other: Any) -> Any:
        """`weight @ x + bias[:, None]` is one linear."""
        known = self._known(x)
        if known is None or known.product is None or not isinstance(other, Tensor):
            return NotImplemented
        if known.last not in known.groups:
            return NotImplemented
        after = len(known.groups) - 1 - known.groups.index(known.last)
        if other.shape != (known.base.shape[-1], *[1] * after):
            return NotImplemented
        return self._give(_View(linear(*known.product, other.flatten()), known.groups))


def _merged(view: _View, shape: Sequence[Any]) -> Groups | None:
    """Groups of a view after a reshape that merges whole axes or takes merged ones apart; None for any other."""
    base, axes = view.base, list(view.axes)
    if sum(isinstance(size, int) and size == -1 for size in shape) > 1:
        return None
    after = 0
    for size in reversed(shape):
        if isinstance(size, int) and size == -1:
            break
        after += 1
    back = _take(base, axes[::-1], list(shape)[::-1][:after])
    if back is None:
        return None
    if after == len(shape):
        return tuple(group[::-1] for group in reversed(back)) if sum(map(len, back)) == len(axes) else None
    tail = tuple(group[::-1] for group in reversed(back))
    axes = axes[: len(axes) - sum(map(len, back))]
    front = _take(base, axes, list(shape)[: len(shape) - after - 1])
    if front is None:
        return None
    return (*front, tuple(axes[sum(map(len, front)) :]), *tail)


def _take(base: Tensor, axes: Sequence[int], sizes: Sequence[Any]) -> list[tuple[int, ...]] | None:
    """Divides the first `axes` into groups of these sizes, in order."""
    groups, start = [], 0
    for size in sizes:
        stop, product = start, 1
        while not statically_known_true(product == size):
            if stop == len(axes):
                return None
            product = product * base.shape[axes[stop]]
            stop += 1
        groups.append(tuple(axes[start:stop]))
        start = stop
    return groups


_CONV1D = {"stride": 1, "padding": 0, "dilation": 1}
_OPERATORS = "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift"
_WRITING = frozenset({"__setitem__", *(f"__i{name}__" for name in _OPERATORS.split())})


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function changes a tensor that it is given."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITING or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


_HANDLERS: dict[str, Callable[..., Any]] = {
    "permute": ChannelLast._permute,
    "transpose": ChannelLast._transpose,
    "swapaxes": ChannelLast._transpose,
    "t": ChannelLast._t,
    "reshape": ChannelLast._reshape,
    "view": ChannelLast._reshape,
    "chunk": ChannelLast._split,
    "split": ChannelLast._split,
    "split_with_sizes": ChannelLast._split,
    "contiguous": ChannelLast._contiguous,
    "silu": ChannelLast._silu,
    "to": ChannelLast._cast,
    "type_as": ChannelLast._cast,
    **dict.fromkeys(_CASTS, ChannelLast._cast),
    "linear": ChannelLast._linear,
    "matmul": ChannelLast._matmul,
    "__matmul__": ChannelLast._matmul,
    "conv1d": ChannelLast._conv1d,
    "add": ChannelLast._add,
    "__add__": ChannelLast._add,
}
