"""Bits per byte of a byte-level model: the figure to set beside a general compressor's."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.models.generate import Step

SEPARATOR = 0
"""Byte between documents, and the context of a document's first byte."""


@torch.no_grad()
def bits_per_byte(step: Step, text: bytes, chunk: int = 1024, progress: Callable[[int], object] | None = None) -> float:
    """Mean cost of `text`'s bytes in bits, each predicted from those before it in its document.

    Documents are separated by 0 bytes; a separator ends its document (and is predicted too), and the state
    starts again from zeros after it.

    Args:
        step: byte-level model or lowered program, see `generate.Step`.
        text: what is predicted, every byte of it.
        chunk: bytes a call; bounds memory and does not change the result.
        progress: called with the number of bytes done after every call.

    Raises:
        MqAoError: the text is empty or chunk is below 1.
    """
    if not text:
        raise MqAoError("the text is empty: give at least one byte.")
    if chunk < 1:
        raise MqAoError(f"chunk is {chunk}: give at least 1 byte a call.")
    nats = 0.0
    for document in split_documents(text):
        targets = torch.frombuffer(bytearray(document), dtype=torch.uint8).long()
        inputs = torch.cat([torch.tensor([SEPARATOR]), targets[:-1]])
        states: tuple[Tensor | None, Tensor | None] = (None, None)
        for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
            logits, *states = step(x[None], *states)  # type: ignore[assignment]  # a list of two is a pair
            nats += torch.nn.functional.cross_entropy(logits[0].float(), y, reduction="sum").item()
            if progress is not None:
                progress(len(x))
    return nats / math.log(2) / len(text)


def split_documents(text: bytes) -> list[bytes]:
    """Splits after every separator, which stays with its document; joined again they are `text`."""
    parts = text.split(bytes([SEPARATOR]))
    documents = [part + bytes([SEPARATOR]) for part in parts[:-1]] + [parts[-1]]
    return [document for document in documents if document]


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9e` needs for the same bytes."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
