"""The text of one prompt, from the engine's tokens."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

import torch

from mq_ao.opening import Opened
from mq_ao.serving.engine import Engine, Job
from mq_ao.serving.limits import Refused
from mq_ao.serving.requests import Asked
from mq_ao.writing import until


class Answer:
    """The text of one prompt, piece by piece.

    Args:
        opened: the model, and how it reads text.
        engine: runs it.
        prompt: tokens.
        asked: how.
        most: tokens at most.
        seconds: that it may take.

    Raises:
        MqAoError: the engine takes no more; see `Engine.submit`.
    """

    def __init__(
        self, opened: Opened, engine: Engine, prompt: list[int], asked: Asked, most: int, seconds: float
    ) -> None:
        self._codec, self._asked, self._most, self._seconds = opened.needed_codec, asked, most, seconds
        self.prompt, self.count = prompt, 0
        self.finish = "stop"
        self._tokens: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()
        self._job = Job(torch.tensor(prompt), most, opened.sampling(asked.sampling()), self._tokens.put)
        engine.submit(self._job)

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self._job.cancelled.set()

    def pieces(self) -> Iterator[str]:
        """Text as soon as it is certain.

        Raises:
            Refused: it took too long.
        """
        made = written = 0

        def pieces() -> Iterator[str]:
            nonlocal made
            for piece in self._codec.pieces(self._received(), self.prompt):
                made += len(piece)
                yield piece

        try:
            for piece in until(pieces(), self._asked.stops):
                written += len(piece)
                yield piece
            if made > written:
                self.finish = "stop"  # at one of its strings
        finally:
            # After a stop string there is more on its way, which nobody reads.
            self.cancel()

    def whole(self) -> str:
        """All of the text."""
        return "".join(self.pieces())

    def _received(self) -> Iterator[int]:
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                token = self._tokens.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise Refused(504, f"the answer took over {self._seconds:g} s.", "timeout") from None
            if token is None:
                return
            if isinstance(token, Exception):
                raise Refused(500, f"the model failed: {token}", "server_error") from token
            self.count += 1
            if token == self._codec.end_token:
                continue
            if self.count == self._most:
                self.finish = "length"
            yield token
