"""Triton's interpreter, with bfloat16 as chips have it, and for every NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_NAMES = ((interpreter, "_convert_float"), (interpreter, "_patch_lang_tensor"))


@contextmanager
def mended() -> Iterator[None]:
    """Within it, interpreted kernels round to bfloat16 and multiply it as chips do, and count over sizes.

    The interpreters of Triton 3.6 and 3.9 cut numbers off where they become bfloat16, and multiply the bits in
    `tl.dot`. That of 3.6 makes whole numbers of arrays of one dimension, which NumPy 2.5 refuses.
    """
    plain = {name: getattr(owner, name) for owner, name in _NAMES}
    builder = interpreter.InterpreterBuilder
    plain_dot = builder.create_dot

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return plain["_convert_float"](data, source, target, mode)
        bits = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.bfloat16)
        return bits.view(torch.int16).numpy().view(np.uint16)

    def values(x: Any) -> Any:
        if not x.dtype.scalar.is_bf16():
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, values(a), values(b), *rest)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        plain["_patch_lang_tensor"](tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: int(value.handle.data.item()))

    interpreter._convert_float, interpreter._patch_lang_tensor, builder.create_dot = convert, patch_tensor, dot
    try:
        yield
    finally:
        for owner, name in _NAMES:
            setattr(owner, name, plain[name])
        builder.create_dot = plain_dot
