"""A model named on the command line: a float model or a saved program, and how it reads text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mq_ao.cli.console import ready_kernels, step
from mq_ao.errors import MqAoError
from mq_ao.files import PROGRAM_SUFFIXES

if TYPE_CHECKING:
    from mq_ao.models import MambaLM
    from mq_ao.models.program import LanguageProgram
    from mq_ao.text import Codec

MODEL_HELP = '"demo", a folder (transformers, mamba_ssm or mq-ao layout), or a hub id.'
ANY_HELP = f"A saved .pt2, .pte or .ptc program, {MODEL_HELP}"
TOKENIZER_HELP = "Folder or hub id of the tokenizer, where the model is not byte-level and brings none."


@dataclass(frozen=True)
class Opened:
    """A model or program that is ready to run.

    Attributes:
        source: as the user named it.
        run: callable as `models.generate.Step`.
        vocab_size: tokens it knows.
        tokenizer: tokenizer that the user named, or None.
    """

    source: str
    run: MambaLM | LanguageProgram
    vocab_size: int
    tokenizer: str | None

    @cached_property
    def codec(self) -> Codec | None:
        """How it reads text; None if there is no way to tell."""
        from mq_ao.text import codec_for

        return codec_for(self.vocab_size, self.tokenizer, self.source)

    @property
    def needed_codec(self) -> Codec:
        """How it reads text.

        Raises:
            MqAoError: there is no way to tell.
        """
        if self.codec is None:
            raise MqAoError(
                f"{self.source} has {self.vocab_size} tokens that are not bytes, and no tokenizer: name one "
                "with --tokenizer (a folder or hub id)."
            )
        return self.codec

    @property
    def known_tokens(self) -> int | None:
        """Tokens of its vocabulary before it was padded, where it tells."""
        from mq_ao.models import MambaLM

        return self.run.known_tokens if isinstance(self.run, MambaLM) else self.run.info.get("known_tokens")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, tied ones once."""
        from mq_ao.models import MambaLM

        if isinstance(self.run, MambaLM):
            return sum(parameter.nbytes for parameter in self.run.parameters())
        return self.run.weight_bytes


def is_program(source: str) -> bool:
    """Whether a name means a saved program."""
    return Path(source).suffix in PROGRAM_SUFFIXES.values()


def open_float(source: str) -> MambaLM:
    """Loads a float model.

    Raises:
        MqAoError: it is a saved program, or cannot be loaded.
    """
    if is_program(source):
        raise MqAoError(f"{source} is a saved program: give the float model, {MODEL_HELP}")
    ready_kernels()
    with step(f"loading {source}"):
        from mq_ao.models import MambaLM

        return MambaLM.from_pretrained(source)


def open_any(source: str, tokenizer: str | None = None) -> Opened:
    """Loads a float model or a saved program.

    Raises:
        MqAoError: it cannot be loaded.
    """
    if not is_program(source):
        model = open_float(source)
        return Opened(source, model, model.config.vocab_size, tokenizer)
    if Path(source).suffix == PROGRAM_SUFFIXES["inductor"]:
        ready_kernels()
    with step(f"loading {source}"):
        from mq_ao.api import load
        from mq_ao.models.program import is_language_program

        program = load(source)
    if not is_language_program(program):
        raise MqAoError(f"{source} is not the program of a language model: call it from Python, with mq_ao.load.")
    return Opened(source, program, int(program.info["vocab_size"]), tokenizer)
