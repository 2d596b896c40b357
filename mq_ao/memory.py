"""How much memory there is, and whether freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from mq_ao.errors import MqAoError

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (
    # A container's own limit, in both versions of control groups: limit, use, and where the reclaimable part is told.
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def release() -> None:
    """Returns the free pages of the C heap, where the C library can do that.

    glibc keeps freed tensors of up to 32 MB for later. Rewriting a model's weights one by one leaves gigabytes of them.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed() -> None:
    """Has glibc keep what this process frees, for what it allocates next; to be called before threads are started.

    Otherwise every tensor over 32 MB is mapped anew, and each of its pages is a fault. The states of 16 sequences of a
    model of 130 million parameters are as large, and new in each decode step.
    """
    set_option = _of_glibc("mallopt")
    if set_option is None:
        return
    trim_threshold, most_mapped, most_arenas = -1, -4, -8  # of malloc.h
    # An arena of a thread's own is limited to 64 MB: the first one serves all.
    for option, value in ((trim_threshold, 2**31 - 1), (most_mapped, 0), (most_arenas, 1)):
        set_option(option, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or a GPU."""
    # The CPU's allocator has no exception of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def available() -> int | None:
    """Bytes that this process can still use: free and reclaimable memory and swap, within its container's limit.

    None where the system does not tell.
    """
    meminfo = _table(_MEMINFO)
    if "MemAvailable" in meminfo:
        free = 1024 * (meminfo["MemAvailable"] + meminfo.get("SwapFree", 0))
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return None
    return min([free, *_left_in_cgroups()])


def check_room(model: nn.Module, what: str) -> None:
    """Checks that a model's weights fit into memory in float32; to be called before they are read.

    Args:
        model: the model, on the meta device.
        what: the model in words.

    Raises:
        MqAoError: they do not fit; both numbers are named.
    """
    needed, room = 4 * sum(parameter.numel() for parameter in model.parameters()), available()
    if room is not None and needed > room:
        raise MqAoError(
            f"{what} needs {needed / 1e9:.1f} GB for its weights in float32, and {room / 1e9:.1f} GB of memory are "
            "available: use a machine with more memory, or close other programs."
        )


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where that is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _left_in_cgroups() -> Iterable[int]:
    for limit, used, stat, reclaimable in _CGROUPS:
        try:
            most, now = (int((_CGROUP_ROOT / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # not this version, or "max": no limit
            continue
        yield max(0, most - now + _table(_CGROUP_ROOT / stat).get(reclaimable, 0))


def _table(path: Path) -> dict[str, int]:
    """The numbers in a file of lines `name: number`, with or without the colon; empty if it cannot be read."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0].removesuffix(":"): int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
