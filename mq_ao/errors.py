"""The one exception type that this package raises on bad input."""

from __future__ import annotations


class MqAoError(ValueError):
    """Something the caller gave cannot be used; the message says what and what to do about it."""
