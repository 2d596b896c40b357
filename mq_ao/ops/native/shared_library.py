"""Shared libraries of C++ kernels, built on the user's machine and cached.

The cache key covers everything that changes the binary: the sources, the compiler, its flags, the CPU's vector
extensions and the versions of what is linked. `MQ_AO_CACHE` moves the cache; `CXX` chooses the compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mq_ao.errors import MqAoError

# No -ffast-math: NaN must reach the output, results must not depend on what the compiler reorders, and some compilers
# let it switch off denormals for the whole process. The kernels ask for the two things they need: fused multiply-add,
# and mathematics without errno and traps.
CORE_FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
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


@dataclass(frozen=True)
class Toolkit:
    """What a library needs of the package that it plugs into.

    Attributes:
        compile: flags for every source.
        link: flags after the objects.
    """

    compile: tuple[str, ...]
    link: tuple[str, ...]


@dataclass(frozen=True)
class SharedLibrary:
    """A library to build.

    Attributes:
        name: file name.
        sources: compiled side by side.
        headers: what the sources include, for the key.
        flags: of the compiler, beside those of `toolkit`.
        versions: of the packages that are linked.
        toolkit: called only when something is compiled, for it may be slow.
        common: a header that all sources include, which is compiled once for them; None: there is none.
        arch: flags that choose the processor's instructions; by default this machine's.
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    flags: tuple[str, ...]
    versions: tuple[str, ...]
    toolkit: Callable[[], Toolkit]
    common: Path | None = None
    arch: str = ARCH_FLAG

    def cached(self) -> str | None:
        """Path of an up-to-date build in the cache, or None."""
        try:
            path = self._path(compiler())
        except MqAoError:
            return None
        return str(path) if path.is_file() else None

    def build(self, *, force: bool = False) -> str:
        """Builds the library unless an up-to-date build is cached.

        Args:
            force: build even if a cached build exists.

        Returns:
            Path of the shared library.

        Raises:
            MqAoError: no compiler, the compiler failed, or the cache folder is not writable.
        """
        cxx = compiler()
        path = self._path(cxx)
        if not path.is_file() or force:
            self.write(path)
        return str(path)

    def write(self, path: Path) -> None:
        """Builds the library there, whatever the cache holds.

        Raises:
            MqAoError: no compiler, the compiler failed, or the folder is not writable.
        """
        cxx = compiler()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=path.parent))
        except OSError as error:
            raise MqAoError(
                f"cannot write kernels to {path.parent}: {error}; set MQ_AO_CACHE to a folder you own."
            ) from error
        try:
            self._compile(cxx, work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _path(self, cxx: str) -> Path:
        digest = hashlib.sha256()
        for path in (*self.sources, *self.headers):
            digest.update(path.name.encode() + path.read_bytes())
        # The macros of -march=native tell apart compiler versions, and machines that share a home folder.
        target = subprocess.run(
            [cxx, *self.arch.split(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
        )
        digest.update("".join(sorted(target.stdout.splitlines(keepends=True))).encode())
        digest.update(repr((cxx, self.flags, self.arch, *self.versions, sys.platform)).encode())
        return cache_dir() / digest.hexdigest()[:16] / self.name

    def _compile(self, cxx: str, work: Path, path: Path) -> None:
        toolkit = self.toolkit()
        flags = [*self.flags, *self.arch.split(), *toolkit.compile, "-fPIC"]
        if self.common is not None:
            header = work / "common.h"
            header.write_text(f'#include "{self.common}"\n')
            _run([cxx, *flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
            flags += ["-include", str(header)]
        objects = [str(work / f"{source.stem}.o") for source in self.sources]

        def compile_one(source: Path, target: str) -> None:
            _run([cxx, *flags, "-c", str(source), "-o", target])

        # One a core: each takes up to a gigabyte of memory.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, self.sources, objects))
        built = work / path.name
        _run([cxx, "-shared", *objects, *toolkit.link, "-o", str(built)])
        os.replace(built, path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    tail = "\n".join(done.stderr.splitlines()[-30:])
    raise MqAoError(
        f"building the native kernels failed with exit code {done.returncode}; choose another compiler with CXX, or "
        f"mend what this says:\n{shlex.join(command)}\n{tail}\n"
    )
