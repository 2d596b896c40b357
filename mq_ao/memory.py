"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys


def release() -> None:
    """Returns the free pages of the C heap, where the C library can do that.

    glibc keeps freed tensors of up to 32 MB for later. Rewriting a model's weights one by one leaves gigabytes of them.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
