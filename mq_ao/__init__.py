"""mq-ao: quantization backend for Mamba-family models on PyTorch 2 Export."""

from __future__ import annotations

import os
from pathlib import Path

# torchao prints two lines about CUDA binaries on a CPU build of torch; this package does not use them.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

from typing import TYPE_CHECKING, Any

from mq_ao.errors import MqAoError

__version__ = "0.1.0"
__all__ = ["MqAoError", "__version__", "export", "load", "quantize"]

if TYPE_CHECKING:
    from mq_ao.api import load as load
    from mq_ao.api import quantize as quantize
    from mq_ao.capture import export as export

# In a checkout, and in an editable installation, quantizer/ and lowering/ lie beside this folder and not in it. They go
# before what else is installed: parts of two versions must not meet.
if (_checkout := Path(__file__).resolve().parents[1]).joinpath("lowering", "inductor", "lower.py").is_file():
    __path__.append(str(_checkout))

_HOMES = {"export": "mq_ao.capture", "load": "mq_ao.api", "quantize": "mq_ao.api"}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `mq-ao --help` should not wait for torch.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    try:
        return importlib.import_module(f"mq_ao.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"mq_ao.{name}":
            raise  # it is there, and something that it needs is not
        raise AttributeError(f"module 'mq_ao' has no attribute {name!r}") from None
