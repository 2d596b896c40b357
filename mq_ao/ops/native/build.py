"""PyTorch's native kernels: those of the wheel, else built on the user's machine (`shared_library` has the cache)."""

from __future__ import annotations

from pathlib import Path

import torch

from mq_ao.ops.native import prebuilt
from mq_ao.ops.native.shared_library import ARCH_FLAG, CORE_FLAGS, SharedLibrary, Toolkit, cache_dir, compiler

__all__ = ["ARCH_FLAG", "FLAGS", "build", "cache_dir", "cached", "compiler"]

_HERE = Path(__file__).parent
FLAGS = (*CORE_FLAGS, "-fopenmp")


def _toolkit() -> Toolkit:
    from torch.utils.cpp_extension import include_paths, library_paths

    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # No -fopenmp here: it would bring a second OpenMP runtime, which knows nothing of torch.set_num_threads. The
    # symbols come from torch's own, which libtorch_cpu brings along.
    link = [f"-L{p}" for p in library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
    return Toolkit(
        compile=(abi, *(f"-I{p}" for p in (*include_paths(), str(_HERE)))),
        link=(*link, *(f"-Wl,-rpath,{p}" for p in library_paths())),
    )


def library() -> SharedLibrary:
    """The kernels for this machine."""
    return SharedLibrary(
        name=prebuilt.NAME,
        sources=tuple(sorted(_HERE.glob("*.cpp"))),
        headers=tuple(sorted(_HERE.glob("*.h"))),
        flags=FLAGS,
        versions=(torch.__version__,),
        toolkit=_toolkit,
        common=_HERE / "glue.h",
    )


def cached() -> str | None:
    """Path of the wheel's kernels or of an up-to-date build in the cache, or None."""
    return prebuilt.found() or library().cached()


def build(*, force: bool = False) -> str:
    """Builds the kernels unless they came with the wheel, or an up-to-date build is cached (minutes on two cores).

    Args:
        force: build even so.

    Returns:
        Path of the shared library.

    Raises:
        MqAoError: no compiler, the compiler failed, or the cache folder is not writable.
    """
    ahead = None if force else prebuilt.found()
    return ahead or library().build(force=force)
