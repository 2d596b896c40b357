"""The exceptions that this package raises on bad input."""

from __future__ import annotations


class MqAoError(ValueError):
    """Something the caller gave cannot be used; the message says what and what to do about it."""


class Unsuitable(MqAoError):
    """A rewrite cannot be made at one place of a graph: passes leave it out there, with this reason."""
