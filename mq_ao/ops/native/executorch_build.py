"""Builds and loads the operators' kernels for ExecuTorch's runtime on this machine.

Apps, phones and boards take the same sources through `executorch/CMakeLists.txt`.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import threading
import warnings
from pathlib import Path

from mq_ao.errors import MqAoError
from mq_ao.ops.native.shared_library import CORE_FLAGS, SharedLibrary, Toolkit

logger = logging.getLogger(__name__)

_CORES = Path(__file__).parent
_HERE = _CORES / "executorch"


class _Loaded:
    """The library of this process: a second one would enter every operator twice, which ends the process."""

    lock = threading.Lock()
    library: ctypes.CDLL | None = None
    path = ""


def _sdk() -> Path:
    """Folder of the installed executorch, with `include/` and `lib/`."""
    spec = importlib.util.find_spec("executorch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "include" / "executorch" / "runtime").is_dir():
            return Path(folder)
    raise MqAoError('ExecuTorch is not installed: install it with pip install "mq-ao[executorch]".')


def _toolkit() -> Toolkit:
    include, lib = _sdk() / "include", _sdk() / "lib"
    return Toolkit(
        compile=(
            # The kernels share the runtime's threads; its c10 headers stand for themselves.
            *("-DET_USE_THREADPOOL", "-DET_EVENT_TRACER_ENABLED", "-DC10_USING_CUSTOM_GENERATED_MACROS"),
            *(f"-I{_CORES}", f"-I{_HERE}", f"-I{include}"),
            f"-I{include / 'executorch/runtime/core/portable_type/c10'}",
        ),
        link=(f"-L{lib}", "-lexecutorch", "-lexecutorch_threadpool", f"-Wl,-rpath,{lib}"),
    )


def _library() -> SharedLibrary:
    _sdk()
    return SharedLibrary(
        name="libmq_ao_executorch.so",
        sources=tuple(sorted(_HERE.glob("*.cpp"))),
        headers=(*sorted(_HERE.glob("*.h")), *sorted(_CORES.glob("*.h"))),
        flags=CORE_FLAGS,
        versions=(importlib.metadata.version("executorch"),),
        toolkit=_toolkit,
    )


def cached() -> str | None:
    """Path of an up-to-date build in the cache, or None.

    Raises:
        MqAoError: executorch is not installed.
    """
    return _library().cached()


def build(force: bool = False) -> str:
    """Builds the kernels unless an up-to-date build is cached (about 20 seconds on two cores).

    Args:
        force: build even if a cached build exists.

    Returns:
        Path of the shared library.

    Raises:
        MqAoError: executorch is not installed, no compiler, the compiler failed, or the cache folder is not writable.
    """
    return _library().build(force=force)


def load() -> str:
    """Enters the kernels in the operator registry of this process's ExecuTorch runtime, building them if needed.

    Only the first call does; programs with `mq_ao` operators can be loaded after it.

    Returns:
        Path of the library that is loaded.

    Raises:
        MqAoError: as `build`, or the library cannot be loaded.
    """
    with _Loaded.lock:
        if _Loaded.library is None:
            path = build()
            with warnings.catch_warnings():
                # "This API is experimental", once for every user.
                warnings.simplefilter("ignore")
                # Brings libexecutorch.so and XNNPACK into the process, whose registries the kernels and the weights'
                # cache are entered in.
                importlib.import_module("executorch.runtime")
            try:
                _Loaded.library = ctypes.CDLL(path)
            except OSError as error:
                raise MqAoError(
                    f"the ExecuTorch kernels cannot be loaded: {error}; rebuild them with "
                    "`mq-ao build-kernels --executorch --force`."
                ) from error
            _Loaded.path = path
            logger.info("ExecuTorch kernels loaded from %s", path)
    return _Loaded.path


def share_packed_weights(on: bool = True) -> None:
    """Tells XNNPACK to keep one packed copy of weights that several methods of a program use.

    Holds for methods that are loaded afterwards.

    Args:
        on: whether to share.

    Raises:
        MqAoError: as `load`, or this XNNPACK does not know the option.
    """
    load()
    assert _Loaded.library is not None
    error = _Loaded.library.mq_ao_share_packed_weights(int(on))
    if error:
        raise MqAoError(f"XNNPACK cannot share packed weights (ExecuTorch error {error}): install executorch 1.5.")
