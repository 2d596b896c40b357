"""How a part says that it did not pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class CheckFailed(Exception):
    """Figures are there, and are not as they have to be.

    Args:
        reason: what is wrong.
        result: the figures.
    """

    def __init__(self, reason: str, result: Mapping[str, Any]) -> None:
        super().__init__(reason)
        self.result = result


class Skipped(Exception):
    """A part cannot run here, for a reason that is no failure: the device is too small for it, say."""
