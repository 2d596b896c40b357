"""Every Triton kernel against its reference, each at a few drawn shapes and with another configuration each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mq_ao.gpu_check.checks import CheckFailed
from mq_ao.gpu_check.devices import engaged, on_the_cpu
from mq_ao.gpu_check.drawn import DRAWN, drawn, shapes_of
from mq_ao.gpu_check.settings import Setting

_ROUNDED = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""Error that a result may have, relative to its largest value: that of a few roundings."""

_NARROW = frozenset({"linear_rows_weight_only"})
"""Operators whose activations of many rows are rounded to bfloat16."""

_TWICE = frozenset({"int8_conv_step_", "int8_scan_step_"})
"""Operators that round in between: a value at a border goes the other way, and what it feeds is off by more."""

_SHARE, _MOST_OFF = 1e-2, 2e-3
"""Of integers that may be one step off, and of results of `_TWICE` that may be off at all."""


def parts(setting: Setting) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """See `stages`."""
    from mq_ao.ops.triton import IMPLEMENTATIONS

    names = [*DRAWN, *(name for name in IMPLEMENTATIONS if name not in DRAWN)]
    return {name: partial(_checked, setting, name) for name in names}


def _checked(setting: Setting, name: str) -> dict[str, Any]:
    """How far the kernel is off.

    Raises:
        CheckFailed: further than its roundings explain.
    """
    from mq_ao.ops.triton import IMPLEMENTATIONS
    from mq_ao.ops.triton.launch import using

    on_the_cpu()
    device, sizes = engaged(setting), setting.sizes
    shapes, wrong = [], []
    for index, length in enumerate(sizes.lengths):
        args = drawn(name, setting.seed + index, sizes.widths, length)
        here = _copies(args, device)
        with using(index):
            got = _results(IMPLEMENTATIONS[name].run(*here), here, name)
        wanted_args = _copies(args, torch.device("cpu"))
        reference = getattr(torch.ops.mq_ao, f"{name}_reference")
        wanted = _results(reference(*wanted_args), wanted_args, name)
        compared = [
            {**_compared(one, other, name), "result": place}
            for place, (one, other) in enumerate(zip(got, wanted, strict=True))
            if other.numel()
        ]
        shapes.append({"arguments": shapes_of(args), "configuration": index, "results": compared})
        wrong += [f"shape {index}, result {item['result']}" for item in compared if not item["passes"]]
    if wrong:
        raise CheckFailed(f"{name} is off: {'; '.join(wrong)}", {"shapes": shapes})
    return {"shapes": shapes}


def _copies(args: Sequence[Any], device: torch.device) -> list[Any]:
    return [arg.to(device, copy=True) if isinstance(arg, Tensor) else arg for arg in args]


def _results(given: Any, args: Sequence[Any], name: str) -> list[Tensor]:
    """All that a call gave, and what it overwrote, on the CPU."""
    results = [given] if isinstance(given, Tensor) else list(given)
    schema: Any = getattr(torch.ops.mq_ao, name).default._schema
    changed = [
        arg for arg, item in zip(args, schema.arguments, strict=True) if item.alias_info and item.alias_info.is_write
    ]
    return [result.cpu() for result in (*results, *changed)]


def _compared(got: Tensor, wanted: Tensor, name: str) -> dict[str, Any]:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        kinds = [f"{tuple(x.shape)} {x.dtype}" for x in (got, wanted)]
        return {"passes": False, "is": kinds[0], "should be": kinds[1]}
    share = _MOST_OFF if name in _TWICE else 0.0
    off = (got.double() - wanted.double()).abs()
    if got.is_floating_point():
        near = 2.0**-8 if name in _NARROW else _ROUNDED[got.dtype]
        size = float(wanted.double().abs().max())
        beyond = float((~(off <= near * size)).double().mean())  # NaN is beyond
        return {"passes": beyond <= share, "off": float(off.max()) / (size or 1.0), "allowed": near, "beyond": beyond}
    beyond, different = float((off > 1).double().mean()), float((off > 0).double().mean())
    # Of few values, one may be.
    passes = beyond <= share and different <= max(_SHARE, 1 / off.numel())
    return {"passes": passes, "steps_off": float(off.max()), "different": different, "beyond": beyond}
