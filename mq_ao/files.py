"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from mq_ao.errors import MqAoError

Owner = TypeVar("Owner")


def check_output(path: str | Path, suffix: str | None = None) -> Path:
    """Returns `path` if a file can be written there; to be called before long work.

    Raises:
        MqAoError: wrong suffix, a folder, no such folder, or no permission.
    """
    path = Path(path)
    if suffix is not None and path.suffix != suffix:
        raise MqAoError(f"{path} must end in {suffix}.")
    if path.is_dir():
        raise MqAoError(f"{path} is a folder: give a file name.")
    if not path.parent.is_dir():
        raise MqAoError(f"the folder {path.parent} does not exist: create it first.")
    try:
        # Permission bits say nothing to root or on a read-only disk, so try.
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, which takes its place when the block ends without an error.

    Raises:
        MqAoError: the file cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)  # temporary files are 0600; what is kept is for everyone who may read the folder
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path` in one step; folders on the way are made.

    Raises:
        MqAoError: the folder cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def owned(name: str, make: Callable[[Path], Owner]) -> Owner:
    """What `make` makes of a temporary file of this name, which stays on disk while it lives."""
    folder = tempfile.mkdtemp(prefix="mq_ao_")
    try:
        owner = make(Path(folder) / name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return owner


def _unwritable(path: Path, error: OSError) -> MqAoError:
    reason = error.strerror or str(error)
    return MqAoError(f"{path} cannot be written ({reason}): choose a folder that you may write to.")
