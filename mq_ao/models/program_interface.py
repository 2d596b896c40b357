"""What every lowered program can do, whatever runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from torch import Tensor

from mq_ao.models.generate import Sampling


class Program(Protocol):
    """A lowered model: it is called with the model's inputs, and gives what the model gives."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Recipe, versions, shapes and kernel counts."""

    @property
    def integer_kernels(self) -> Mapping[str, int]:
        """Calls of integer kernels in one forward pass; empty for a float program."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights and scales."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""

    def save(self, path: str | Path) -> None:
        """Writes the program to a file."""


class LanguageProgram(Program, Protocol):
    """A lowered language model with states; see `NativeProgram`, `InductorProgram` and the others.

    Token ids are (batch, length) integers: a tensor of any width, a numpy array, or lists. All sequences of a batch
    have one length; `generate` and `stream` alone take prompts that are padded on the left, with their mask.
    """

    def __call__(self, input_ids: Any, *states: Any, attention_mask: None = None) -> tuple[Any, ...]:
        """Logits of all tokens (batch, length, vocab_size), and the states after them."""

    def prefill(self, input_ids: Any, *states: Any, attention_mask: None = None) -> tuple[Any, ...]:
        """Logits of the last token (batch, 1, vocab_size), and the states after it."""

    def decode(self, input_ids: Any, *states: Any) -> tuple[Any, ...]:
        """One token a sequence: (batch, 1) -> logits (batch, 1, vocab_size), and the states."""

    def stream(
        self, input_ids: Any, max_new_tokens: int, sampling: Sampling | None = None, *, attention_mask: Any = None
    ) -> Iterator[Tensor]:
        """Yields the next tokens one by one."""

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        *,
        attention_mask: Any = None,
    ) -> Tensor:
        """Prompt and continuation."""


def is_language_program(program: Program) -> TypeGuard[LanguageProgram]:
    """Whether a program is that of a language model with states."""
    return "vocab_size" in program.info
