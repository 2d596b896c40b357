"""Triton's interpreter, with bfloat16 as chips have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch


@contextmanager
def bfloat16_as_on_chips() -> Iterator[None]:
    """Within it, conversions to bfloat16 round to nearest and products of bfloat16 are those of the values.

    The interpreter of Triton 3.9 cuts numbers off, and multiplies the bits in `tl.dot`.
    """
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    plain_convert, plain_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return plain_convert(data, source, target, mode)
        bits = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.bfloat16)
        return bits.view(torch.int16).numpy().view(np.uint16)

    def values(x: Any) -> Any:
        if not x.dtype.scalar.is_bf16():
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, values(a), values(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield
