"""The exceptions that this package raises on bad input."""

from __future__ import annotations


class MqAoError(ValueError):
    """Something the caller gave cannot be used; the message says what and what to do about it."""


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """The first line of what another library's error says; `otherwise`, or its type, where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else otherwise or type(error).__name__


class Unsuitable(MqAoError):
    """A rewrite cannot be made at one place of a graph: passes leave it out there, with this reason."""
