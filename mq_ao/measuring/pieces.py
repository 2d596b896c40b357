"""The pieces of a text that are resampled: its documents, or blocks of them where there are few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.text import TokenText

FEWEST = 30
"""Pieces that a bootstrap should have."""
BLOCK = 512
"""Tokens in a block, so long that what one token costs hardly tells what the next block's do."""
OVERLAP = 256
"""Tokens in a row that calibration and evaluation text must not share; a licence or an idiom is shorter."""


@dataclass(frozen=True)
class Pieces:
    """How a text is cut up.

    Attributes:
        what: what a piece is, in words.
        sizes: predicted tokens of each, in the order of the text.
    """

    what: str
    sizes: tuple[int, ...]

    def sums(self, tokens: Tensor) -> tuple[float, ...]:
        """Sums over each piece of what every token has, (tokens,)."""
        return tuple(piece.sum().item() for piece in tokens.split(list(self.sizes)))


def pieces(text: TokenText) -> Pieces:
    """Documents, if there are `FEWEST`; else blocks of consecutive tokens, none of which reaches into two documents.

    Blocks have `BLOCK` tokens, or fewer where a short text would not yield `FEWEST` of them; the last of a document
    may be shorter.

    Raises:
        MqAoError: fewer than two tokens are predicted.
    """
    if text.predicted < 2:
        raise MqAoError("one token is predicted: give a text of two at least, for its cost to have an interval.")
    documents = [len(document) - 1 for document in text.documents]
    if len(documents) >= FEWEST:
        return Pieces("documents", tuple(documents))
    size = max(1, min(BLOCK, text.predicted // FEWEST))
    blocks = [min(size, length - start) for length in documents for start in range(0, length, size)]
    return Pieces(f"blocks of {size} tokens", tuple(blocks))


def first_tokens(text: TokenText, count: int | None) -> TokenText:
    """The beginning of a text, in which `count` tokens are predicted at most; a document may be cut off.

    Args:
        text: the text.
        count: None: all of it.

    Raises:
        MqAoError: count is below 1.
    """
    if count is None:
        return text
    if count < 1:
        raise MqAoError(f"--eval-tokens is {count}: predict at least one token.")
    kept, left = [], count
    for document in text.documents:
        if left > 0:
            kept.append(document[: left + 1])
            left -= len(kept[-1]) - 1
    predicted = sum(len(document) - 1 for document in kept)
    bytewise = text.text_bytes == text.predicted
    return TokenText(tuple(kept), predicted if bytewise else None)


def check_disjoint(calibration: list[Tensor], text: TokenText) -> None:
    """Checks that the text that is predicted holds no stretch of calibration tokens, but for short common ones.

    Raises:
        MqAoError: it does.
    """
    joined = _bytes(torch.cat(text.documents))
    for row in (row for batch in calibration for row in batch):
        # The first token of a window may be the context of a document.
        size = min(OVERLAP, len(row) - 1)
        if any(_bytes(stretch) in joined for stretch in row[1:].unfold(0, size, size)):
            raise MqAoError(
                f"{size} calibration tokens in a row stand in the text that is evaluated on too: give other text, "
                "since results on calibration data are better than they should be."
            )


def _bytes(ids: Tensor) -> bytes:
    return ids.to(torch.int32).numpy().tobytes()
