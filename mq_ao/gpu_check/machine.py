"""What results depend on: versions and the device. It needs nothing but PyTorch, so that it can say what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from mq_ao.errors import MqAoError
from mq_ao.gpu_check.settings import Setting
from mq_ao.version import __version__

NEEDED = ("torch", "triton", "torchao", "numpy", "safetensors")
"""Packages without which stages fail."""

_PACKAGES = (*NEEDED, "transformers")


def versions() -> dict[str, str | None]:
    """Of everything; None: it cannot be found."""
    found: dict[str, str | None] = {"python": platform.python_version(), "mq_ao": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    # The build of PyTorch, which its package's version need not tell.
    return {**found, "torch": torch.__version__, "cuda": torch.version.cuda}


def described(setting: Setting) -> dict[str, Any]:
    """The device in words and numbers.

    Raises:
        MqAoError: there is none.
    """
    if setting.rehearsal:
        return {"device": "cpu", "name": "none: a rehearsal on the CPU, interpreted"}
    count = torch.cuda.device_count()
    if (torch.device(setting.device).index or 0) >= count:
        raise MqAoError(
            f"PyTorch sees {count} GPUs here, and {setting.device} is not among them: give another --device, or "
            "--device cpu to rehearse without one."
        )
    found = torch.cuda.get_device_properties(setting.device)
    return {
        "device": setting.device,
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
    }
