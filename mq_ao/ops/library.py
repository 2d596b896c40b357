"""The `mq_ao` operator library: schemas, and the choice between native and reference kernels.

Schemas are defined in Python, so that graphs can be captured on a machine without a compiler. CPU kernels come from
the C++ library in `mq_ao/ops/native`, which registers itself with the dispatcher when it is loaded, and CUDA kernels
from `mq_ao/ops/triton`. Below them lies a kernel for every device, written in Python: on its first CPU or CUDA call it
builds (or finds) the library, or registers the Triton kernels, and calls the operator again, which then reaches the
device's kernel. Where there is none, it runs the reference.

`mq_ao::<name>_reference` is the reference as an operator of its own. A native kernel calls it for inputs that it does
not take itself (float64, or bad input, for which the reference raises the error).

`mq_ao::<name>.out` writes into tensors that the caller gives: ExecuTorch puts it in the place of `mq_ao::<name>` when
it plans a program's memory, and its runtime then finds the kernel of `native/executorch` by that name. Operators whose
names end in `_` have no such variant: ExecuTorch knows no operators of such names.
"""

from __future__ import annotations

import logging
import string
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import SymBool

from mq_ao.compat.operators import parse_schema
from mq_ao.errors import MqAoError
from mq_ao.ops.native import build

logger = logging.getLogger(__name__)

schemas = torch.library.Library("mq_ao", "DEF")
_kernels = torch.library.Library("mq_ao", "IMPL", "CompositeExplicitAutograd")
_loaders: dict[str, Callable[[], bool]] = {}


class NativeState:
    """What is known of the native library in this process."""

    loaded = False
    failure: str | None = None


def define(name: str, schema: str, *, fake: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """Defines `mq_ao::name` with its shape function and its plain PyTorch reference.

    Args:
        name: operator name without namespace.
        schema: argument and return part of the schema, for example `(Tensor x) -> Tensor`; an argument that is
            changed is a `Tensor(a!)`.
        fake: shape function for FakeTensors.
        reference: obviously right implementation in PyTorch; runs on any device and dtype.
    """
    schemas.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    schemas.define(f"{name}_reference{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"mq_ao::{name}", fake, lib=schemas)
    torch.library.register_fake(f"mq_ao::{name}_reference", fake, lib=schemas)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        load_new = _loaders.get(args[0].device.type)
        if load_new is not None and load_new():
            return getattr(torch.ops.mq_ao, name).default(*args, **kwargs)
        return reference(*args, **kwargs)

    _kernels.impl(name, kernel)
    _kernels.impl(f"{name}_reference", reference)
    if not name.endswith("_"):
        _define_out(name, schema)


def _define_out(name: str, schema: str) -> None:
    """Defines `mq_ao::name.out`: the same arguments, and a tensor for each result, which is resized and written."""
    parsed = parse_schema(f"mq_ao::{name}{schema}")
    count = len(parsed.returns)
    names = ["out"] if count == 1 else [f"out{i}" for i in range(count)]
    # Arguments that are changed have the first letters.
    letters = string.ascii_lowercase[schema.count("!") :]
    aliases = [f"Tensor({letter}!)" for letter in letters[:count]]
    outs = ", ".join(f"{alias} {out}" for alias, out in zip(aliases, names, strict=True))
    results = aliases[0] if count == 1 else f"({', '.join(aliases)})"
    arguments = schema[: schema.rindex("->")].rstrip().removesuffix(")")
    schemas.define(f"{name}.out{arguments}, *, {outs}) -> {results}")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        targets = [kwargs.pop(out) for out in names]
        values = getattr(torch.ops.mq_ao, name).default(*args, **kwargs)
        for target, value in zip(targets, [values] if count == 1 else values, strict=True):
            require(
                target.dtype == value.dtype,
                f"{name}: the tensor for a result of {value.dtype} must have that dtype, it has {target.dtype}.",
            )
            target.resize_(value.shape).copy_(value)
        return targets[0] if count == 1 else tuple(targets)

    _kernels.impl(f"{name}.out", kernel)


def loads_kernels(device: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    """Enters a function as the one that loads the kernels of a device when an operator is first called there.

    It returns whether there are kernels now that were not there before.
    """

    def enter(load_new: Callable[[], bool]) -> Callable[[], bool]:
        _loaders[device] = load_new
        return load_new

    return enter


def require(condition: bool | SymBool, message: str) -> None:
    """Raises MqAoError with `message` unless `condition` holds; a symbolic condition becomes a guard."""
    if isinstance(condition, SymBool):
        torch._check(condition, lambda: message)
    elif not condition:
        raise MqAoError(message)


def native_available() -> bool:
    """Whether the native kernels are loaded in this process."""
    return NativeState.loaded


def load_native() -> bool:
    """Loads the native kernels, building them if needed; on failure warns once and returns False."""
    if not NativeState.loaded and NativeState.failure is None:
        try:
            _load(build.build())
        except (MqAoError, OSError) as error:
            NativeState.failure = str(error)
            warnings.warn(
                f"mq_ao runs its slow reference operators: {error} Run `mq-ao build-kernels` after mending that.",
                stacklevel=2,
            )
    return NativeState.loaded


@loads_kernels("cpu")
def _load_new() -> bool:
    return not NativeState.loaded and load_native()


def use_references(reason: str) -> None:
    """Builds no native kernels in this process: where none are loaded yet, the CPU runs the references."""
    NativeState.failure = NativeState.failure or reason


def load_cached() -> None:
    """Loads the native kernels if an up-to-date build lies in the cache; never builds."""
    path = build.cached()
    if path is None:
        return
    try:
        _load(path)
    except OSError as error:
        logger.warning("cached native kernels cannot be loaded: %s", error)


def _load(path: str) -> None:
    torch.ops.load_library(path)
    NativeState.loaded = True
    logger.info("native kernels loaded from %s", path)
