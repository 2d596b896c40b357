"""Tokenizers of transformers: found beside a model, loaded, and kept in programs as the text of their files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mq_ao.errors import MqAoError, first_line

INFO = "tokenizer"
"""Under which a program's info has the files."""
_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def is_beside(source: str | Path) -> bool:
    """Whether a model's folder has a tokenizer."""
    return any((Path(source) / name).is_file() for name in _FILES)


def load(source: str | Path) -> Any:
    """Loads a tokenizer from a folder or hub id.

    Raises:
        MqAoError: transformers is not installed, or there is no tokenizer that it can load.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MqAoError('a tokenizer needs transformers: run pip install "mq-ao[hf]".') from error
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # its errors have no base class in common
        reason = first_line(error)
        raise MqAoError(
            f"the tokenizer {source} cannot be loaded ({reason}): give the folder or hub id of one."
        ) from error


def files(tokenizer: Any) -> dict[str, str]:
    """What a tokenizer saves, by file name.

    Args:
        tokenizer: one of transformers, or its folder or hub id.

    Raises:
        MqAoError: see `load`; or it is no tokenizer, or does not save itself as text.
    """
    given = load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if not hasattr(given, "save_pretrained") or not hasattr(given, "encode"):
        raise MqAoError(f"{type(given).__name__} is no tokenizer of transformers: give one, or its folder or hub id.")
    with tempfile.TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        try:
            return {path.name: path.read_text("utf-8") for path in sorted(Path(folder).iterdir()) if path.is_file()}
        except UnicodeDecodeError as error:
            raise MqAoError(
                f"{type(given).__name__} is not saved as text, so programs cannot keep it: give a fast tokenizer, or "
                "name it where the program is used."
            ) from error


def restored(content: Mapping[str, str]) -> Any:
    """The tokenizer of which these are the files.

    Raises:
        MqAoError: they are not those of a tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, text in content.items():
            if name in ("", ".", "..") or Path(name).name != name:
                raise MqAoError(f"the program's tokenizer has a file {name!r}, which is no plain name: make it again.")
            (Path(folder) / name).write_text(text, "utf-8")
        return load(folder)
