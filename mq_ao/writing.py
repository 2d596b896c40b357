"""What a model writes behind a prompt, as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mq_ao.errors import MqAoError
from mq_ao.models.generate import Sampling, stream

if TYPE_CHECKING:
    from mq_ao.opening import Opened


def written(opened: Opened, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
    """Text, piece by piece as soon as it is certain, until the tokenizer's end of text.

    Args:
        opened: a model that generates, and how it reads text.
        prompt: tokens, at least one.
        max_new_tokens: how many it writes at most.
        sampling: how each is chosen; only those are that the tokenizer knows.

    Raises:
        MqAoError: the prompt holds tokens beyond the model's vocabulary.
    """
    codec = opened.needed_codec
    if max(prompt) >= opened.vocab_size:
        raise MqAoError(
            f"the tokenizer has token ids beyond the model's vocabulary of {opened.vocab_size}: name its own."
        )
    # A program computes one row of logits for the prompt, the float model all of them.
    run = getattr(opened.run, "prefill", opened.step)
    following = stream(run, torch.tensor([list(prompt)]), max_new_tokens, opened.sampling(sampling))
    return codec.pieces((int(token) for token in following if int(token) != codec.end_token), prompt)


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yields text up to the first of some strings, which is left out.

    Args:
        pieces: of the text.
        stops: where it ends; none are empty.
    """
    held = ""
    for piece in pieces:
        held += piece
        places = [place for stop in stops if (place := held.find(stop)) >= 0]
        if places:
            yield held[: min(places)]
            return
        # What may be the beginning of such a string waits.
        kept = max((size for stop in stops for size in range(1, len(stop)) if held.endswith(stop[:size])), default=0)
        if len(held) > kept:
            yield held[: len(held) - kept]
            held = held[len(held) - kept :]
    if held:
        yield held
