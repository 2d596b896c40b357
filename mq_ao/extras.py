"""Packages that not every installation has: those of an extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mq_ao.errors import MqAoError


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """To import within what an extra brings.

    Args:
        what: needs it; the beginning of a sentence.
        extra: one of those in `pyproject.toml`.

    Raises:
        MqAoError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise MqAoError(f'{what} needs {package}: run pip install "mq-ao[{extra}]".') from error
