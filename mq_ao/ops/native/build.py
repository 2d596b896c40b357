"""Builds the native kernels on the user's machine and caches the result.

The cache key covers everything that changes the binary: the sources, the compiler, its flags, the CPU's vector
extensions and the torch version. `MQ_AO_CACHE` moves the cache; `CXX` chooses the compiler.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mq_ao.errors import MqAoError

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
# No -ffast-math: NaN must reach the output, results must not depend on what the compiler reorders, and some compilers
# let it switch off denormals for the whole process. The kernels ask for the two things they need: fused multiply-add,
# and mathematics without errno and traps.
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
ARCH_FLAG = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def cache_dir() -> Path:
    """Folder that holds builds: `$MQ_AO_CACHE`, else `$XDG_CACHE_HOME/mq_ao`, else `~/.cache/mq_ao`."""
    if "MQ_AO_CACHE" in os.environ:
        return Path(os.environ["MQ_AO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mq_ao"


def compiler() -> str:
    """Path of the C++ compiler.

    Raises:
        MqAoError: there is none.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        found = shutil.which(name)
        if found:
            return found
    raise MqAoError(
        f"no C++ compiler found (looked for {', '.join(wanted)}): install g++ (Debian: apt install g++) "
        "or set CXX to one."
    )


def _sources() -> list[Path]:
    return sorted(_HERE.glob("*.cpp"))


def _key(cxx: str) -> str:
    digest = hashlib.sha256()
    for path in [*_sources(), *sorted(_HERE.glob("*.h"))]:
        digest.update(path.name.encode() + path.read_bytes())
    # The macros of -march=native tell apart compiler versions, and machines that share a home folder.
    target = subprocess.run(
        [cxx, ARCH_FLAG, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
    )
    digest.update("".join(sorted(target.stdout.splitlines(keepends=True))).encode())
    digest.update(repr((cxx, FLAGS, ARCH_FLAG, torch.__version__, sys.platform)).encode())
    return digest.hexdigest()[:16]


def _library(cxx: str) -> Path:
    return cache_dir() / _key(cxx) / "libmq_ao_ops.so"


def cached() -> str | None:
    """Path of an up-to-date build in the cache, or None."""
    try:
        path = _library(compiler())
    except MqAoError:
        return None
    return str(path) if path.is_file() else None


def build(*, force: bool = False) -> str:
    """Builds the kernels unless an up-to-date build is cached (about half a minute on two cores).

    Args:
        force: build even if a cached build exists.

    Returns:
        Path of the shared library.

    Raises:
        MqAoError: no compiler, the compiler failed, or the cache folder is not writable.
    """
    cxx = compiler()
    path = _library(cxx)
    if path.is_file() and not force:
        return str(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=path.parent))
    except OSError as error:
        raise MqAoError(
            f"cannot write kernels to {path.parent}: {error}; set MQ_AO_CACHE to a folder you own."
        ) from error
    try:
        _compile(cxx, work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return str(path)


def _compile(cxx: str, work: Path, path: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    include = [f"-I{p}" for p in (*include_paths(), str(_HERE))]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    objects = []
    running = []
    for source in _sources():
        target = work / (source.stem + ".o")
        objects.append(str(target))
        command = [cxx, *FLAGS, ARCH_FLAG, abi, "-fPIC", *include, "-c", str(source), "-o", str(target)]
        running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    # All compilers run side by side; each is waited for, so that none outlives a failure of another.
    results = [(command, process, process.communicate()[1]) for command, process in running]
    for command, process, stderr in results:
        _check(command, process.returncode, stderr)
    libs = [f"-L{p}" for p in library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
    rpath = [f"-Wl,-rpath,{p}" for p in library_paths()]
    built = work / path.name
    # No -fopenmp here: it would bring a second OpenMP runtime, which knows nothing of torch.set_num_threads. The
    # symbols come from torch's own, which libtorch_cpu brings along.
    link = [cxx, "-shared", *objects, *libs, *rpath, "-o", str(built)]
    done = subprocess.run(link, capture_output=True, text=True, check=False)
    _check(link, done.returncode, done.stderr)
    os.replace(built, path)


def _check(command: list[str], returncode: int, stderr: str) -> None:
    if returncode == 0:
        return
    tail = "\n".join(stderr.splitlines()[-30:])
    raise MqAoError(
        f"building the native kernels failed with exit code {returncode}; choose another compiler with CXX, or mend "
        f"what this says:\n{shlex.join(command)}\n{tail}\n"
    )
