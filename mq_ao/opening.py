"""A model named by a user: a float model or a saved program, and how it reads text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mq_ao.backends import INDUCTOR, NATIVE, backend_of
from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from mq_ao.lowering.stateful_graph import StatefulGraph
    from mq_ao.models import Logits, MambaLM, Sampling
    from mq_ao.models.program_interface import LanguageProgram, Program
    from mq_ao.models.prompts import Step as ModelStep
    from mq_ao.text import Codec

MODEL_HELP = '"demo", a folder (transformers, mamba_ssm or mq-ao layout), or a hub id.'

WINDOW = 1024
"""Tokens that a model without states reads at once, if the user does not say."""

Step = Callable[[str], AbstractContextManager[None]]
"""Shows what is done inside of it."""


@dataclass(frozen=True)
class Opened:
    """A model or program that is ready to run.

    Attributes:
        source: as the user named it.
        run: the model or program.
        vocab_size: tokens it knows.
        tokenizer: tokenizer that the user named, or None.
        has_states: whether it goes on from what it has read; else it gives logits alone, and every call starts from
            nothing.
    """

    source: str
    run: MambaLM | Logits | StatefulGraph | LanguageProgram | Program
    vocab_size: int
    tokenizer: str | None
    has_states: bool = True

    @property
    def step(self) -> ModelStep:
        """What runs it. Without states, every call has to be a whole window."""
        run: Any = self.run
        if self.has_states:
            return run

        def step(ids: Any, *_: Any) -> Any:
            return (run(ids),)

        return step

    @cached_property
    def codec(self) -> Codec | None:
        """How it reads text; None if there is no way to tell."""
        from mq_ao.text import codec_for, codec_of_program

        if self.tokenizer is None and (kept := codec_of_program(self.run)) is not None:
            return kept
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
                "(--tokenizer or tokenizer=, a folder or hub id)."
            )
        return self.codec

    @property
    def known_tokens(self) -> int | None:
        """Tokens of its vocabulary before it was padded, where it tells."""
        from mq_ao.models import MambaLM

        if isinstance(self.run, MambaLM):
            return self.run.known_tokens
        return getattr(self.run, "info", {}).get("known_tokens")

    def sampling(self, asked: Sampling) -> Sampling:
        """As asked, of tokens that model and tokenizer know, to the tokenizer's end of text."""
        codec = self.needed_codec
        return asked.within(self.known_tokens).within(codec.known_tokens).ending(codec.end_token)

    @property
    def window(self) -> int | None:
        """Tokens that it reads at once; None: as many as there are."""
        return None if self.has_states else WINDOW

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, tied ones once."""
        from torch import nn

        if isinstance(self.run, nn.Module):
            return sum(parameter.nbytes for parameter in self.run.parameters())
        return self.run.weight_bytes


def silent(what: str) -> AbstractContextManager[None]:
    """Shows nothing."""
    return nullcontext()


def ready_kernels(step: Step) -> None:
    """Loads the native kernels, building them where needed, so that no timing includes it."""
    with step("readying the native kernels"):
        from mq_ao import ops

        ops.load_native()


def is_program(source: str) -> bool:
    """Whether a name means a saved program."""
    return backend_of(source) is not None


def open_float(source: str, step: Step = silent) -> MambaLM:
    """Loads a float model with states.

    Raises:
        MqAoError: it is a saved program, or cannot be loaded.
    """
    _check_float(source)
    ready_kernels(step)
    with step(f"loading {source}"):
        from mq_ao.models import MambaLM

        return MambaLM.from_pretrained(source)


def open_model(source: str, step: Step = silent) -> MambaLM | Logits:
    """Loads a float model, one without states too.

    Raises:
        MqAoError: it is a saved program, or cannot be loaded.
    """
    _check_float(source)
    ready_kernels(step)
    with step(f"loading {source}"):
        from mq_ao.models import Logits, MambaLM, load

        model = load(source)
    return model if isinstance(model, MambaLM) else Logits(model)


def open_any(source: str, tokenizer: str | None = None, *, states: bool = False, step: Step = silent) -> Opened:
    """Loads a float model or a saved program.

    Args:
        source: as the user named it.
        tokenizer: tokenizer that the user named, or None.
        states: whether it has to have states, as generation needs them.
        step: shows what is done.

    Raises:
        MqAoError: it cannot be loaded, or has no states.
    """
    if not is_program(source):
        model = open_model(source, step)
        from mq_ao.models import MambaLM

        vocab_size, has_states = model.config.vocab_size, isinstance(model, MambaLM)
        if has_states or not states:
            return Opened(source, model, vocab_size, tokenizer, has_states)
        with step("capturing"):
            from mq_ao.api import generating

            return Opened(source, generating(model), vocab_size, tokenizer)
    if backend_of(source) in (INDUCTOR, NATIVE):
        ready_kernels(step)
    with step(f"loading {source}"):
        from mq_ao.loading import load
        from mq_ao.models.program_interface import is_language_program

        program = load(source)
    if is_language_program(program):
        return Opened(source, program, int(program.info["vocab_size"]), tokenizer)
    if states:
        raise MqAoError(f"{source} is a program without states, and cannot generate yet.")
    return Opened(source, program, _vocab_size(source, program), tokenizer, has_states=False)


def _vocab_size(source: str, program: Any) -> int:
    """The vocabulary of a program without states, which only its logits tell."""
    import torch

    refusal = f"{source} is a program of no language model: call it from Python, as mq_ao.load gives it."
    try:
        logits = program(torch.zeros(1, 2, dtype=torch.int64))
    except MqAoError as error:
        raise MqAoError(refusal) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise MqAoError(refusal)
    return logits.shape[-1]


def _check_float(source: str) -> None:
    if is_program(source):
        raise MqAoError(f"{source} is a saved program: give the float model, {MODEL_HELP}")
