"""mq-ao: quantization backend for Mamba-family models on PyTorch 2 Export."""

from __future__ import annotations

import os

# torchao prints two lines about CUDA binaries on a CPU build of torch; this package does not use them.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

from typing import TYPE_CHECKING, Any

from mq_ao.checkout import find_packages_beside
from mq_ao.errors import MqAoError
from mq_ao.version import __version__

__all__ = ["MqAoError", "__version__", "export", "load", "prepare_qat", "quantize"]

if TYPE_CHECKING:
    from mq_ao.api import prepare_qat as prepare_qat
    from mq_ao.api import quantize as quantize
    from mq_ao.capture import export as export
    from mq_ao.loading import load as load

find_packages_beside()

_HOMES = {"export": "mq_ao.capture", "load": "mq_ao.loading", "prepare_qat": "mq_ao.api", "quantize": "mq_ao.api"}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `mq-ao --help` should not wait for torch.
    from importlib import import_module
    from importlib.util import find_spec

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if find_spec(f"mq_ao.{name}") is None:
        raise AttributeError(f"module 'mq_ao' has no attribute {name!r}")
    # It is there; if something that it needs is not, that error is the one to see.
    return import_module(f"mq_ao.{name}")
