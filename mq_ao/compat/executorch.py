"""ExecuTorch's reader of program files and its threads; and PyTorch's scan, which a `.pte` can run."""

from __future__ import annotations

from typing import Any

from torch._higher_order_ops.scan import scan

__all__ = ["deserialize_pte_binary", "reset_thread_pool", "scan"]


def reset_thread_pool(count: int) -> None:
    """Gives the runtime of this process so many threads; nothing may be running.

    Raises:
        ModuleNotFoundError: executorch is not installed.
    """
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    _unsafe_reset_threadpool(count)


def deserialize_pte_binary(content: bytes) -> Any:
    """A `.pte` file as data.

    Raises:
        ModuleNotFoundError: executorch is not installed.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary as read

    return read(content)
