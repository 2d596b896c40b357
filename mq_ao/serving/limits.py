"""What clients may ask for, and the answer where they ask for more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What one client may ask for, and all together.

    Attributes:
        batch: sequences that are decoded at a time.
        queue: requests that may wait besides.
        prompt: tokens of a prompt.
        new_tokens: tokens of an answer.
        body: bytes of a request.
        seconds: that an answer may take.
        prefix_bytes: of states that are kept for beginnings of prompts.
    """

    batch: int = 32
    queue: int = 256
    prompt: int = 32768
    new_tokens: int = 4096
    body: int = 2**20
    seconds: float = 600.0
    prefix_bytes: int = 2**28


class Refused(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        kind: as OpenAI names it.
    """

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind

    @property
    def content(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": None}}
