"""Which functions of the user's run while a model does: under what name, and whether they look like a scan."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mq_ao.compat.trees import tree_leaves

NAMES: Mapping[str, tuple[str, ...]] = {
    "x": ("x", "u", "hidden_states"),
    "dt": ("dt", "delta", "delta_t", "dts"),
    "A": ("A",),
    "A_log": ("A_log", "A_logs", "log_A"),
    "B": ("B", "Bs"),
    "C": ("C", "Cs"),
    "D": ("D", "Ds"),
    "z": ("z", "gate"),
    "dt_bias": ("dt_bias", "delta_bias"),
    "dt_softplus": ("dt_softplus", "delta_softplus"),
    "initial_state": ("initial_state", "initial_states", "h0"),
    "last_state": ("last_state", "return_last_state", "return_state"),
}
"""What implementations call the parameters of a scan, by ours."""

_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


def _folder(package: str) -> str | None:
    spec = importlib.util.find_spec(package)
    return str(Path(spec.origin).parent) if spec is not None and spec.origin else None


_LIBRARIES = tuple(folder for folder in map(_folder, ("torch", "einops")) if folder)


def is_own(code: CodeType) -> bool:
    """Whether code is the user's, or a model library's, and not that of torch, einops or Python itself."""
    place = code.co_filename
    if place.startswith(_LIBRARIES):
        return False
    return not place.startswith((_STANDARD_LIBRARY, "<")) or "site-packages" in place


def own_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of such code, the innermost first."""
    while frame is not None:
        if is_own(frame.f_code):
            yield frame
        frame = frame.f_back


def find(operand: str, names: Iterable[str]) -> list[str]:
    """Which of a function's parameters are named like an operand: exactly, or else but for case."""
    names = list(names)
    known = NAMES[operand]
    exact = [name for name in names if name in known]
    return exact or [name for name in names if name.casefold() in {item.casefold() for item in known}]


def looks_like_scan(frame: FrameType) -> bool:
    """Whether a function takes x, dt, B and C, and A or has it in its module."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if not all(find(operand, names) for operand in ("x", "dt", "B", "C")):
        return False
    owner = frame.f_locals.get("self")
    return any(find(form, names) or hasattr(owner, form) for form in ("A", "A_log"))


def key_of(frame: FrameType) -> str:
    """What to call a function in `scans`: `Class.method` of a module, `package.function` elsewhere."""
    code = frame.f_code
    owner = frame.f_locals.get("self")
    if isinstance(owner, nn.Module):
        return f"{type(owner).__name__}.{code.co_name}"
    return f"{frame.f_globals.get('__name__', '?')}.{code.co_qualname.rpartition('<locals>.')[2]}"


def run(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Runs a module once, for those who watch; its buffers stay what they are."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    # What the user compiles is not to be compiled for this.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        functional_call(module, buffers, args, dict(kwargs))


def called(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Keys of the functions that run when a module does and belong to the files of its classes, scans first."""
    files = {getattr(sys.modules.get(type(part).__module__), "__file__", None) for part in module.modules()}
    found: dict[str, bool] = {}

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not is_own(frame.f_code):
            return
        likely = looks_like_scan(frame)
        if likely or (frame.f_code.co_filename in files and not frame.f_code.co_name.startswith("<")):
            key = key_of(frame)
            found[key] = found.get(key, False) or likely

    _profiled(lambda: run(module, args, kwargs), watch)
    return sorted(found, key=lambda key: not found[key])


def _profiled(function: Callable[[], None], watch: Callable[[FrameType, str, Any], None]) -> None:
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(before)


def tensors(values: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
