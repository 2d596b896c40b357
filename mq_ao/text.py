"""Text to tokens and back: bytes for byte-level models, a tokenizer or stored token ids for the others."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mq_ao.errors import MqAoError

BYTE_VOCABULARY = 256
SEPARATOR = 0
"""Byte between documents, and the context of a document's first byte."""
TOKEN_FILES = frozenset({".npy", ".safetensors"})


def split_documents(text: bytes) -> list[bytes]:
    """Splits after every separator, which stays with its document; joined again they are `text`."""
    parts = text.split(bytes([SEPARATOR]))
    documents = [part + bytes([SEPARATOR]) for part in parts[:-1]] + [parts[-1]]
    return [document for document in documents if document]


class Codec(Protocol):
    """Turns text into a model's tokens and back."""

    @property
    def vocab_size(self) -> int:
        """Token ids that have a text are below it; a model's vocabulary may be padded beyond."""

    def documents(self, text: bytes) -> list[list[int]]:
        """The text's documents as tokens, each behind the token that starts a document."""

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of `tokens`, as soon as each piece of it is certain."""


class ByteCodec:
    """Tokens are bytes; a 0 byte starts a document and ends it."""

    vocab_size = BYTE_VOCABULARY

    def documents(self, text: bytes) -> list[list[int]]:
        """See `Codec`: documents are separated by 0 bytes."""
        return [[SEPARATOR, *document] for document in split_documents(text)]

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """See `Codec`: bytes that are no UTF-8 become U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes([token]))
        yield decoder.decode(b"", final=True)


class TokenizerCodec:
    """A tokenizer of transformers.

    Args:
        tokenizer: for example `AutoTokenizer.from_pretrained(...)`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """See `Codec`: added tokens count."""
        return len(self._tokenizer)

    def documents(self, text: bytes) -> list[list[int]]:
        """See `Codec`: the whole text is one document."""
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise MqAoError(f"the text is not UTF-8 (byte {error.start}): convert it first.") from error
        start = self._tokenizer.bos_token_id
        if start is None:
            start = self._tokenizer.eos_token_id
        tokens = self._tokenizer.encode(decoded, add_special_tokens=False)
        return [tokens if start is None else [start, *tokens]]

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """See `Codec`."""
        seen: list[int] = []
        written = 0
        for token in tokens:
            seen.append(token)
            text = self._tokenizer.decode(seen)
            # A character may need several tokens; until the last of them it decodes as U+FFFD.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[written:]
                written = len(text)
        yield self._tokenizer.decode(seen)[written:]


def codec_for(vocab_size: int, tokenizer: str | None = None, source: str | None = None) -> Codec | None:
    """The codec of a model, or None if there is no way to tell it.

    Args:
        vocab_size: the model's; 256 without a tokenizer means bytes.
        tokenizer: folder or hub id of a tokenizer, if the user named one.
        source: folder of the model, which may hold a tokenizer.

    Raises:
        MqAoError: the tokenizer cannot be loaded.
    """
    if tokenizer is not None:
        return TokenizerCodec(_load_tokenizer(tokenizer))
    if source is not None and any((Path(source) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return TokenizerCodec(_load_tokenizer(source))
    return ByteCodec() if vocab_size == BYTE_VOCABULARY else None


def _load_tokenizer(source: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MqAoError('a tokenizer needs transformers: run pip install "mq-ao[hf]".') from error
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # its errors have no base class in common
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MqAoError(
            f"the tokenizer {source} cannot be loaded ({reason}): give the folder or hub id of one."
        ) from error


@dataclass(frozen=True)
class TokenText:
    """A text as a model's tokens.

    Attributes:
        documents: each (length,) int64, length at least 2; the first token is context and is not predicted.
        text_bytes: size of the text in bytes, or None if only its tokens are known.
    """

    documents: tuple[Tensor, ...]
    text_bytes: int | None

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted."""
        return sum(len(document) - 1 for document in self.documents)


def byte_text(content: bytes) -> TokenText:
    """The tokens of a byte-level model for `content`, every byte of it predicted.

    Raises:
        MqAoError: there is nothing to predict.
    """
    if not content:
        raise MqAoError("the text is empty: give at least one byte.")
    return TokenText(tuple(map(torch.tensor, ByteCodec().documents(content))), len(content))


def read_tokens(path: Path, vocab_size: int, codec: Codec | None) -> TokenText:
    """Reads a text file, or a .npy or .safetensors file of token ids (a vector, or one document a row).

    Args:
        path: the file.
        vocab_size: of the model that the tokens are for.
        codec: turns text into tokens; not needed for stored ids.

    Raises:
        MqAoError: the file is missing, empty, not of token ids or outside the vocabulary, or it is text and
            there is no codec.
    """
    if not path.is_file():
        raise MqAoError(f"there is no file {path}.")
    if path.suffix in TOKEN_FILES:
        documents, size = list(_stored_ids(path)), None
    elif codec is None:
        raise MqAoError(
            f"{path} is text and the model's {vocab_size} tokens are not bytes: name its tokenizer with "
            "--tokenizer, or give a .npy or .safetensors file of token ids."
        )
    else:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise MqAoError(f"{path} cannot be read ({error.strerror}).") from error
        documents, size = [torch.tensor(document) for document in codec.documents(content)], len(content)
    documents = [document for document in documents if len(document) > 1]
    if not documents:
        raise MqAoError(f"{path} is empty: there is no token to predict in it.")
    low, high = min(int(d.min()) for d in documents), max(int(d.max()) for d in documents)
    if low < 0 or high >= vocab_size:
        raise MqAoError(
            f"{path} holds token ids {low}..{high}, outside the model's vocabulary of {vocab_size}: tokenize "
            "it for this model."
        )
    return TokenText(tuple(documents), size)


def _stored_ids(path: Path) -> Tensor:
    """(documents, length) int64."""
    try:
        if path.suffix == ".npy":
            tensors = [torch.from_numpy(numpy.load(path, allow_pickle=False))]
        else:
            tensors = list(load_file(path).values())
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise MqAoError(f"{path} cannot be read as token ids ({error}).") from error
    if len(tensors) != 1:
        raise MqAoError(f"{path} holds {len(tensors)} tensors: keep only the token ids.")
    ids = tensors[0]
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise MqAoError(f"{path} holds {tuple(ids.shape)} {ids.dtype}: token ids are integers in a vector or a matrix.")
    return ids.long().reshape(-1, ids.shape[-1])


def calibration_batches(text: TokenText, tokens: int, length: int = 512, batch: int = 4) -> list[Tensor]:
    """Windows spread evenly over a text.

    Args:
        text: the calibration text.
        tokens: how many tokens to take at most, rounded up to a whole window.
        length: tokens in a window; a shorter text is one window.
        batch: windows in a batch.

    Returns:
        Batches (at most `batch`, length) int64.

    Raises:
        MqAoError: tokens is below 1.
    """
    if tokens < 1:
        raise MqAoError(f"--tokens is {tokens}: calibrate on at least one token.")
    joined = torch.cat(text.documents)
    length = min(length, len(joined))
    windows = joined[: len(joined) // length * length].reshape(-1, length)
    wanted = min(len(windows), -(-tokens // length))
    chosen = windows[torch.linspace(0, len(windows) - 1, wanted).long()]
    return list(chosen.split(batch))
