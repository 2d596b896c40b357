"""Captures channel-first code as the channel-last graph that it stands for.

Mamba's public implementations hold activations as (batch, channels, length), or as (channels, batch * length) around a
`weight @ x`, for the sake of their CUDA kernels. Written out, such a graph hides linears in matmuls between transposes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.nn.functional import linear, silu
from torch.overrides import TorchFunctionMode

from mq_ao.capture import depthwise, grouped
from mq_ao.capture.tensor_views import View, identity, merged

_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


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
        self._views: dict[int, tuple[Tensor, View]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = _PROPERTIES.get(func) or str(getattr(func, "__name__", ""))
        if _writes(name, kwargs):
            # What is written to may be a copy of what it is a view of, or the other way round.
            self._views.clear()
        elif name == "einsum" and len(args) == 3:
            product = self._einsum(*args)
            if product is not NotImplemented:
                return product
        elif name in _JOINING and args and not kwargs.keys() - {"dim"}:
            joined = self._cat(*args, **kwargs)
            if joined is not NotImplemented:
                return joined
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

    def _known(self, x: Tensor) -> View | None:
        entry = self._views.get(id(x))
        return None if entry is None else entry[1]

    def _remember(self, x: Tensor, view: View) -> Tensor:
        self._views[id(x)] = (x, view)
        return x

    def _give(self, view: View) -> Tensor:
        """The tensor that a view describes: `base` itself where nothing is reordered."""
        base, groups = view.base, view.groups
        if groups == identity(base.dim()):
            return base if view.product is None else self._remember(base, view)
        x = base if view.axes == tuple(range(base.dim())) else base.permute(view.axes)
        if any(len(group) != 1 for group in groups):
            x = x.reshape([math.prod(base.shape[axis] for axis in group) for group in groups])
        return self._remember(x, view)

    def _reordered(self, func: Callable[..., Tensor], x: Tensor, order: Sequence[int]) -> Tensor:
        known = self._known(x)
        if known is None:
            groups = tuple((axis % x.dim(),) for axis in order)
            return x if groups == identity(x.dim()) else self._remember(func(x), View(x, groups))
        return self._give(View(known.base, tuple(known.groups[axis] for axis in order), known.product))

    def _permute(self, name: str, x: Tensor, *order: Any) -> Any:
        if len(order) == 1 and not isinstance(order[0], int):
            (order,) = order
        return self._reordered(lambda x: x.permute(order), x, order)

    def _transpose(self, name: str, x: Tensor, dim0: int, dim1: int) -> Any:
        order = list(range(x.dim()))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self._reordered(lambda x: x.transpose(dim0, dim1), x, order)

    def _t(self, name: str, x: Tensor) -> Any:
        return self._transpose(name, x, -2, -1) if x.dim() == 2 or name == "mT" else NotImplemented

    def _reshape(self, name: str, x: Tensor, *shape: Any) -> Any:
        if len(shape) == 1 and isinstance(shape[0], Sequence):
            (shape,) = shape
        if not all(isinstance(size, int | torch.SymInt) for size in shape):
            return NotImplemented
        known = self._known(x) or View(x, identity(x.dim()))
        groups = merged(known, shape)
        if groups is None:
            return NotImplemented
        if known.base is x:
            return x if groups == known.groups else self._remember(x.reshape(shape), View(x, groups))
        return self._give(View(known.base, groups, known.product))

    def _split(self, name: str, x: Tensor, sizes: Any, dim: int = 0) -> Any:
        known = self._known(x)
        if known is None or len(known.groups[dim]) != 1:
            return NotImplemented
        parts = getattr(known.base, name)(sizes, dim=known.groups[dim][0])
        return tuple(self._give(View(part, known.groups)) for part in parts)

    def _contiguous(self, name: str, x: Tensor) -> Any:
        known = self._known(x)
        return NotImplemented if known is None else self._remember(x.contiguous(), known)

    def _silu(self, name: str, x: Tensor, inplace: bool = False) -> Any:
        if inplace:
            self._views.clear()
        known = self._known(x)
        return NotImplemented if known is None else self._give(View(silu(known.base), known.groups))

    def _pointwise(self, name: str, x: Tensor, *options: float) -> Any:
        """A function of every value by itself."""
        known = self._known(x)
        return (
            NotImplemented if known is None else self._give(View(_POINTWISE[name](known.base, *options), known.groups))
        )

    def _binary(self, name: str, x: Tensor, other: Any) -> Any:
        """A sum or product of a view with a number, with a view alike, or with what broadcasts against it."""
        function = torch.add if "add" in name else torch.mul
        known = self._known(x)
        if known is None:
            # Sums and products commute.
            known, x, other = self._known(other) if isinstance(other, Tensor) else None, other, x
        if known is None:
            return NotImplemented
        if isinstance(other, int | float):
            return self._give(View(function(known.base, other), known.groups))
        if not isinstance(other, Tensor) or other.dim() > x.dim() or any(len(group) != 1 for group in known.groups):
            return NotImplemented
        while other.dim() < x.dim():
            other = other.unsqueeze(0)
        return self._give(View(function(known.base, self._permute("permute", other, known.order)), known.groups))

    def _cat(self, tensors: Sequence[Tensor], dim: int = 0) -> Any:
        """Views of one order, or a view and what is given that order."""
        known = next((view for x in tensors if (view := self._known(x)) is not None), None)
        if known is None or any(len(group) != 1 for group in known.groups):
            return NotImplemented
        if any(x.dim() != len(known.groups) for x in tensors):
            return NotImplemented
        bases = [self._permute("permute", x, known.order) for x in tensors]
        return self._give(View(torch.cat(bases, known.groups[dim][0]), known.groups))

    def _slice(self, name: str, x: Tensor, dim: int = 0, start: Any = None, stop: Any = None, step: Any = 1) -> Any:
        """What torch.export makes of ranges in square brackets."""
        known = self._known(x)
        if known is None or len(known.groups[dim]) != 1:
            return torch.ops.aten.slice.Tensor(x, dim, start, stop, step)
        part = torch.ops.aten.slice.Tensor(known.base, known.groups[dim][0], start, stop, step)
        return self._give(View(part, known.groups))

    def _narrow(self, name: str, x: Tensor, dim: int, start: Any, length: Any) -> Any:
        if not isinstance(start, int) or start < 0:
            return NotImplemented
        return self._slice(name, x, dim, start, start + length)

    def _pad(self, name: str, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
        """Zeros around a view."""
        known = self._known(x)
        if known is None or mode != "constant" or value:
            return NotImplemented
        sizes = [(0, 0)] * known.base.dim()
        for index, group in enumerate(known.groups[::-1][: len(pad) // 2]):
            pair = (pad[2 * index], pad[2 * index + 1])
            if len(group) == 1:
                sizes[group[0]] = pair
            elif pair != (0, 0):
                return NotImplemented
        flat = [size for pair in sizes[::-1] for size in pair]
        return self._give(View(functional.pad(known.base, flat), known.groups))

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
        return self._give(View(known.base.to(wanted), known.groups))

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        known = self._known(x)
        if known is None or known.groups[-1] != known.last:
            return NotImplemented
        return self._give(View(linear(known.base, weight, bias), known.groups))

    def _matmul(self, name: str, first: Tensor, second: Tensor) -> Any:
        """`x @ weight` and `weight @ x`."""
        weight = self._weight(second)
        if weight is not None and first.dim() >= 2 and self._weight(first) is None:
            product = self._linear(name, first, weight)
            return linear(first, weight) if product is NotImplemented else product
        if first.dim() != 2 or second.dim() < 2:
            return NotImplemented
        if self._known(second) is None and isinstance(first, Parameter) and second.dim() > 2:
            second = self._transpose(name, self._transpose(name, second, -1, -2), -1, -2)
        known = self._known(second)
        if known is None or known.groups[-2] != known.last:
            return NotImplemented
        return self._give(View(linear(known.base, first), known.groups, (known.base, first)))

    def _weight(self, matrix: Tensor) -> Tensor | None:
        """The weight (out, in) of the linear that a product with a parameter (in, out) from the right is."""
        known = self._known(matrix)
        parameter = matrix if known is None else known.base
        if not isinstance(parameter, Parameter) or matrix.dim() != 2 or parameter.dim() != 2:
            return None
        return self._transpose("t", matrix, 0, 1)

    def _einsum(self, equation: str, first: Tensor, second: Tensor) -> Any:
        product = grouped.einsum(equation, first, second)
        if product is not None:
            return product
        plan = grouped.plain(equation, first, second)
        if plan is None:
            return NotImplemented
        x = self._permute("permute", plan.x, plan.before)
        weight = plan.weight.t() if plan.transposed else plan.weight
        product = self._linear("linear", x, weight)
        return self._permute("permute", linear(x, weight) if product is NotImplemented else product, plan.after)

    def _conv1d(
        self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """A convolution of kernel size 1 is a linear, and a depthwise one causal."""
        given = {**dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False)), **kwargs}
        groups = given.pop("groups", 1)
        changed = {key: value for key, value in given.items() if value not in (_CONV1D[key], (_CONV1D[key],))}
        product = grouped.pointwise_conv1d(x, weight, bias, groups, changed)
        if product is not None:
            return product
        padding = depthwise.padding(x, weight, groups, changed)
        if padding is None:
            return NotImplemented
        y = depthwise.conv1d(self._transpose("transpose", x, 1, 2), weight, bias, padding)
        return self._transpose("transpose", y, 1, 2)

    def _add(self, name: str, x: Tensor, other: Any) -> Any:
        """`weight @ x + bias[:, None]` is one linear."""
        known = self._known(x)
        if known is None or known.product is None or not isinstance(other, Tensor) or known.last not in known.groups:
            return self._binary(name, x, other)
        after = len(known.groups) - 1 - known.groups.index(known.last)
        if other.shape != (known.base.shape[-1], *[1] * after):
            return self._binary(name, x, other)
        return self._give(View(linear(*known.product, other.flatten()), known.groups))


_POINTWISE: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
}
_CONV1D = {"stride": 1, "padding": 0, "dilation": 1}
_OPERATORS = "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift"
# What __torch_function__ is given for a property, which torch's stubs declare as a plain tensor.
_PROPERTIES: dict[Any, str] = {Tensor.mT.__get__: "mT", Tensor.T.__get__: "T"}  # type: ignore[attr-defined]
_JOINING = frozenset({"cat", "concat", "concatenate"})
_WRITING = frozenset({"__setitem__", *(f"__i{name}__" for name in _OPERATORS.split())})


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function changes a tensor that it is given."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITING or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


_HANDLERS: dict[str, Callable[..., Any]] = {
    "permute": ChannelLast._permute,
    "transpose": ChannelLast._transpose,
    "swapaxes": ChannelLast._transpose,
    **dict.fromkeys(("t", "T", "mT"), ChannelLast._t),
    "reshape": ChannelLast._reshape,
    "view": ChannelLast._reshape,
    "chunk": ChannelLast._split,
    "split": ChannelLast._split,
    "split_with_sizes": ChannelLast._split,
    "contiguous": ChannelLast._contiguous,
    "silu": ChannelLast._silu,
    **dict.fromkeys(_POINTWISE, ChannelLast._pointwise),
    "slice": ChannelLast._slice,
    "narrow": ChannelLast._narrow,
    "pad": ChannelLast._pad,
    "to": ChannelLast._cast,
    "type_as": ChannelLast._cast,
    **dict.fromkeys(_CASTS, ChannelLast._cast),
    "linear": ChannelLast._linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm"), ChannelLast._matmul),
    "conv1d": ChannelLast._conv1d,
    **dict.fromkeys(("add", "__add__", "__radd__"), ChannelLast._add),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply"), ChannelLast._binary),
}
