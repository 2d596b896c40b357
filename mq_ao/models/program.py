"""What every lowered language model can do, whatever runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.models.generate import Sampling


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Checks what a program is to read: compiled code would read outside the embedding.

    Raises:
        MqAoError: the ids are not (batch, length) int64, empty, or outside the vocabulary.
    """
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise MqAoError(f"input_ids must be (batch, length) int64; got {tuple(input_ids.shape)} {input_ids.dtype}.")
    if input_ids.numel() == 0:
        raise MqAoError(f"input_ids is empty, of shape {tuple(input_ids.shape)}: give at least one token.")
    least, most = torch.stack(torch.aminmax(input_ids)).tolist()  # a GPU is waited for once
    if least < 0 or most >= vocab_size:
        raise MqAoError(f"input_ids holds {least}..{most}, outside the vocabulary of {vocab_size} tokens.")


class Program(Protocol):
    """A lowered language model; see `InductorProgram` and `ExecutorchProgram`."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Recipe, versions, shapes and kernel counts."""

    @property
    def integer_kernels(self) -> Mapping[str, int]:
        """Calls of integer kernels in one forward pass; empty for a float program."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights and scales."""

    def __call__(self, input_ids: Tensor, conv_state: Any = None, ssm_state: Any = None) -> tuple[Tensor, Any, Any]:
        """Logits of all tokens (batch, length, vocab_size), and the states after them."""

    def prefill(self, input_ids: Tensor, conv_state: Any = None, ssm_state: Any = None) -> tuple[Tensor, Any, Any]:
        """Logits of the last token (batch, 1, vocab_size), and the states after it."""

    def decode(self, input_ids: Tensor, conv_state: Any, ssm_state: Any) -> tuple[Tensor, Any, Any]:
        """One token a sequence: (batch, 1) -> logits (batch, 1, vocab_size), and the states."""

    def stream(self, input_ids: Tensor, max_new_tokens: int, sampling: Sampling | None = None) -> Iterator[Tensor]:
        """Yields the next tokens one by one."""

    def generate(self, input_ids: Tensor, max_new_tokens: int = 64, sampling: Sampling | None = None) -> Tensor:
        """Prompt and continuation."""

    def save(self, path: str | Path) -> None:
        """Writes the program to a file."""
