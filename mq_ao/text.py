"""Text to tokens and back: bytes for byte-level models, a tokenizer or stored token ids for the others."""

from __future__ import annotations

import codecs
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mq_ao import tokenizer as tokenizers
from mq_ao.errors import MqAoError

logger = logging.getLogger(__name__)

BYTE_VOCABULARY = 256
SEPARATOR = 0
"""Byte between documents, and the context of a document's first byte."""
_CONTEXT = 8
"""Tokens behind which others are decoded: the longest character has 4 bytes."""
TOKEN_FILES = frozenset({".npy", ".safetensors"})
_LONGEST_NAME = 255
"""Characters of a file's name; a longer string without such a file is text."""


def split_documents(text: bytes) -> list[bytes]:
    """Splits after every separator, which stays with its document; joined again they are `text`."""
    parts = text.split(bytes([SEPARATOR]))
    documents = [part + bytes([SEPARATOR]) for part in parts[:-1]] + [parts[-1]]
    return [document for document in documents if document]


class Codec(Protocol):
    """Turns text into a model's tokens and back."""

    @property
    def known_tokens(self) -> int:
        """Tokens that have a text: the ids below this number. A model's vocabulary may be padded to more."""

    @property
    def start_token(self) -> int | None:
        """The token that starts a document; None: there is none."""

    @property
    def end_token(self) -> int | None:
        """The token with which what a model writes ends; None: there is none."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, and none besides."""

    def conversation(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str | None:
        """The text of messages by role and content, up to where an `answer` begins; None: there is no template."""

    def documents(self, text: bytes) -> list[list[int]]:
        """The text's documents as tokens, each behind the token that starts a document."""

    def pieces(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """The text of `tokens` that follow those `before`, as soon as each piece of it is certain."""


class ByteCodec:
    """Tokens are bytes; a 0 byte starts a document and ends it."""

    known_tokens = BYTE_VOCABULARY
    start_token = SEPARATOR
    end_token = None

    def encode(self, text: str) -> list[int]:
        """See `Codec`."""
        return list(text.encode())

    def conversation(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> None:
        """See `Codec`: bytes have no template."""

    def documents(self, text: bytes) -> list[list[int]]:
        """See `Codec`: documents are separated by 0 bytes."""
        return [[SEPARATOR, *document] for document in split_documents(text)]

    def pieces(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
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
    def tokenizer(self) -> Any:
        """The tokenizer itself."""
        return self._tokenizer

    @cached_property
    def known_tokens(self) -> int:
        """See `Codec`; to make a table of all tokens takes as long as some steps of a model."""
        return 1 + max(self._tokenizer.get_vocab().values())

    @property
    def end_token(self) -> int | None:
        """See `Codec`."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    @property
    def start_token(self) -> int | None:
        """See `Codec`: a tokenizer without such a token starts with the one that ends."""
        start: int | None = self._tokenizer.bos_token_id
        return self.end_token if start is None else start

    def encode(self, text: str) -> list[int]:
        """See `Codec`."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def conversation(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str | None:
        """See `Codec`."""
        if not getattr(self._tokenizer, "chat_template", None):
            return None
        options = {"add_generation_prompt": answer, "continue_final_message": not answer}
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text

    def documents(self, text: bytes) -> list[list[int]]:
        """See `Codec`: the whole text is one document."""
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise MqAoError(f"the text is not UTF-8 (byte {error.start}): convert it first.") from error
        tokens = self.encode(decoded)
        return [tokens if self.start_token is None else [self.start_token, *tokens]]

    def pieces(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """See `Codec`.

        A token's text may depend on what it follows: at the start many lose their leading space. So each is decoded
        behind the last tokens whose text was given.
        """
        known = list(before)[-_CONTEXT:]
        new: list[int] = []
        for token in tokens:
            new.append(token)
            piece = self._after(known, new)
            # A character may need several tokens; until the last of them it decodes as U+FFFD.
            if piece and not piece.endswith("\N{REPLACEMENT CHARACTER}"):
                yield piece
                known, new = (known + new)[-_CONTEXT:], []
        if new:
            yield self._after(known, new)

    def _after(self, known: list[int], new: list[int]) -> str:
        text: str = self._tokenizer.decode(known + new)
        return text[len(self._tokenizer.decode(known)) :]


def codec_of_program(program: Any) -> Codec | None:
    """That of the tokenizer that a program keeps, or None if it keeps none."""
    kept = getattr(program, "info", {}).get(tokenizers.INFO)
    return None if kept is None else TokenizerCodec(tokenizers.restored(kept))


def codec_for(vocab_size: int, tokenizer: str | Path | None = None, source: str | Path | None = None) -> Codec | None:
    """The codec of a model, or None if there is no way to tell it.

    Args:
        vocab_size: the model's; 256 without a tokenizer means bytes.
        tokenizer: folder or hub id of a tokenizer, if the user named one.
        source: folder of the model, which may hold a tokenizer.

    Raises:
        MqAoError: the tokenizer cannot be loaded.
    """
    if tokenizer is not None:
        return TokenizerCodec(tokenizers.load(tokenizer))
    if source is not None and tokenizers.is_beside(source):
        return TokenizerCodec(tokenizers.load(source))
    return ByteCodec() if vocab_size == BYTE_VOCABULARY else None


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


def read_tokens(path: str | Path, vocab_size: int | None, codec: Codec | None) -> TokenText:
    """Reads a text file, or a .npy or .safetensors file of token ids (a vector, or one document a row).

    Args:
        path: the file.
        vocab_size: of the model that the tokens are for; None: not known, and not checked.
        codec: turns text into tokens; not needed for stored ids.

    Raises:
        MqAoError: the file is missing, empty, not of token ids or outside the vocabulary, or it is text and
            there is no codec.
    """
    path = Path(path)
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
    _check_range(documents, vocab_size, str(path))
    return TokenText(tuple(documents), size)


def _check_range(documents: Sequence[Tensor], vocab_size: int | None, what: str) -> None:
    if vocab_size is None:
        return
    low, high = min(int(d.min()) for d in documents), max(int(d.max()) for d in documents)
    if low < 0 or high >= vocab_size:
        raise MqAoError(
            f"{what} holds token ids {low}..{high}, outside the model's vocabulary of {vocab_size}: tokenize "
            "it for this model."
        )


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
    windows, wanted = _windows(text, tokens, length)
    return list(_spread(windows, min(len(windows), wanted)).split(batch))


def calibration_draws(
    text: TokenText, tokens: int, draws: int, length: int = 512, batch: int = 4
) -> list[list[Tensor]]:
    """Several sets of calibration batches of different windows, each spread evenly over a text.

    Args:
        text: the calibration text.
        tokens: see `calibration_batches`.
        draws: how many sets; the only one is that of `calibration_batches`.
        length: see `calibration_batches`.
        batch: see `calibration_batches`.

    Raises:
        MqAoError: tokens or draws is below 1, or several draws would have to share windows.
    """
    if draws < 1:
        raise MqAoError(f"--draws is {draws}: calibrate on at least one draw.")
    windows, wanted = _windows(text, tokens, length)
    if draws > 1 and draws * wanted > len(windows):
        raise MqAoError(
            f"{draws} draws of {tokens} tokens need {draws * wanted} windows of {windows.shape[1]}, and the "
            f"calibration text has {len(windows)}: give a longer text, fewer --draws or fewer --tokens."
        )
    chosen = _spread(windows, min(len(windows), draws * wanted))
    return [list(chosen[first::draws].split(batch)) for first in range(draws)]


def _windows(text: TokenText, tokens: int, length: int) -> tuple[Tensor, int]:
    """All windows of a text, and how many make up so many tokens."""
    if tokens < 1:
        raise MqAoError(f"--tokens is {tokens}: calibrate on at least one token.")
    joined = torch.cat(text.documents)
    length = min(length, len(joined))
    return joined[: len(joined) // length * length].reshape(-1, length), -(-tokens // length)


def _spread(windows: Tensor, count: int) -> Tensor:
    """So many of the windows, evenly."""
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def calibration(
    source: str | bytes | Path | Iterable[Any],
    reader: Any,
    *,
    tokens: int = 16384,
    length: int = 512,
    batch: int = 4,
    column: str = "text",
) -> list[Tensor]:
    """Batches of token ids to calibrate on, for `mq_ao.quantize`.

    Args:
        source: a file of text, or of token ids (.npy, .safetensors), of which windows spread evenly are taken; or a
            text, or an iterable of texts or of rows that have one (as those of `datasets`), which is read until there
            are enough tokens. A string that names no file is text if it has several lines or over 255 characters.
        reader: the model's tokenizer (transformers'), or a folder or hub id of it; or the model, where it is byte-level
            or transformers loaded it from a folder with its tokenizer; or a program that keeps one.
        tokens: how many tokens to take, rounded up to a whole window; fewer, with a warning, where there are no more.
        length: tokens in a window; a shorter text is one window.
        batch: windows in a batch.
        column: where a row has its text.

    Returns:
        Batches (at most `batch`, length) int64.

    Raises:
        MqAoError: there is no such file, no text, no way to read it as tokens, or a row has no text.
    """
    for name, value in (("tokens", tokens), ("length", length), ("batch", batch)):
        if value < 1:
            raise MqAoError(f"{name} is {value}: give at least 1.")
    codec, vocab_size = _codec_of(reader)
    if isinstance(source, str | Path) and _is_file(source):
        if codec is None and Path(source).suffix not in TOKEN_FILES:
            raise MqAoError(_NO_CODEC.format(vocab_size))
        text = read_tokens(source, vocab_size, codec)
    else:
        if codec is None:
            raise MqAoError(_NO_CODEC.format(vocab_size))
        wanted = -(-tokens // length) * length
        documents = _first_documents(_texts(source, column), codec, wanted)
        if not documents:
            raise MqAoError("there is no text to calibrate on: give at least one that is not empty.")
        _check_range(documents, vocab_size, "the text")
        text = TokenText(tuple(documents), None)
    batches = calibration_batches(text, tokens, length, batch)
    if (found := sum(map(torch.numel, batches))) < tokens:
        logger.warning("there are %d tokens to calibrate on, and %d were asked for", found, tokens)
    return batches


_NO_CODEC = "the model's {} tokens are not bytes, and its tokenizer is not beside it: give the tokenizer."


def _codec_of(reader: Any) -> tuple[Codec | None, int | None]:
    """The codec, and the size of the vocabulary where `reader` is a model."""
    if isinstance(reader, str | Path):
        return TokenizerCodec(tokenizers.load(reader)), None
    config: Any = getattr(reader, "config", None)
    if isinstance(reader, nn.Module) and hasattr(config, "vocab_size"):
        return codec_for(config.vocab_size, source=getattr(config, "name_or_path", None) or None), config.vocab_size
    if hasattr(reader, "documents"):
        return reader, None
    if (codec := codec_of_program(reader)) is not None:
        return codec, reader.info.get("vocab_size")
    if hasattr(reader, "encode"):
        return TokenizerCodec(reader), None
    raise MqAoError(f"{type(reader).__name__} cannot read text: give the model's tokenizer, or a byte-level model.")


def _is_file(source: str | Path) -> bool:
    """Whether it is a file, and not text."""
    if isinstance(source, Path) or os.path.isfile(source):
        return True
    if "\n" in source or len(source) > _LONGEST_NAME:
        return False
    raise MqAoError(f"there is no file {source}: check the path, or give a short text in a list.")


def _texts(source: Any, column: str) -> Iterator[bytes]:
    if isinstance(source, Mapping):
        if column not in source:
            raise MqAoError(f"the texts are a mapping of {', '.join(map(str, source))}: give the rows of one of them.")
        source = source[column]
    if isinstance(source, str | bytes):
        source = [source]
    if not isinstance(source, Iterable):
        raise MqAoError(f"{type(source).__name__} is no text: give a file, a text, or an iterable of texts or of rows.")
    for index, row in enumerate(source):
        if isinstance(row, Mapping) and column not in row:
            raise MqAoError(f'row {index} has {", ".join(map(str, row))}, and no "{column}": name the text\'s column.')
        text = row[column] if isinstance(row, Mapping) else row
        if not isinstance(text, str | bytes):
            raise MqAoError(f"row {index} is no text but {type(text).__name__}: give strings, or rows that have one.")
        yield text.encode(errors="replace") if isinstance(text, str) else text


def _first_documents(texts: Iterable[bytes], codec: Codec, tokens: int) -> list[Tensor]:
    """Documents of at least `tokens` tokens together, or all."""
    found: list[Tensor] = []
    count = 0
    for text in texts:
        for document in codec.documents(text) if text else []:
            found.append(torch.tensor(document))
            count += len(document)
        if count >= tokens:
            break
    return found
