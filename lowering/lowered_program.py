"""What all lowered programs have in common, and what those that generate have besides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mq_ao.models.generate import Sampling, generate, stream
from mq_ao.models.states import States


class LoweredProgram(ABC):
    """Something that runs, and says of itself what it is.

    Args:
        info: what it says.
    """

    def __init__(self, info: Mapping[str, Any]) -> None:
        self._info = info

    @property
    def info(self) -> Mapping[str, Any]:
        """Recipe, versions, shapes and kernel counts."""
        return self._info

    @property
    def integer_kernels(self) -> Mapping[str, int]:
        """Calls of integer kernels in one forward pass, by name; empty for a float program."""
        return self._info["integer_kernels"]

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of the weights and scales."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Writes the program to a file that `mq_ao.load` reads."""


class GeneratingProgram(LoweredProgram):
    """A language model that generates token by token."""

    @abstractmethod
    def step(self, ids: Tensor, *states: Any) -> tuple[Any, ...]:
        """Logits of the last of some tokens, and the states after them; without states, the tokens are a prompt."""

    @property
    def carried(self) -> States | None:
        """The states that `step` takes and gives, where rows of several calls can be put together."""
        return None

    def stream(
        self, input_ids: Any, max_new_tokens: int, sampling: Sampling | None = None, *, attention_mask: Any = None
    ) -> Iterator[Tensor]:
        """Yields the next tokens one by one; see `models.generate.stream`."""
        return stream(self.step, input_ids, max_new_tokens, self._within(sampling), **self._masked(attention_mask))

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        *,
        attention_mask: Any = None,
    ) -> Tensor:
        """Prompt and continuation; see `models.generate.generate`."""
        return generate(self.step, input_ids, max_new_tokens, self._within(sampling), **self._masked(attention_mask))

    def _masked(self, attention_mask: Any) -> dict[str, Any]:
        """How rows are told that begin later than others."""
        return {"attention_mask": attention_mask, "states": self.carried}

    def _within(self, sampling: Sampling | None) -> Sampling:
        """Sampling that keeps to the tokens that a tokenizer knows, where the program tells their number."""
        return (sampling or Sampling()).within(self._info.get("known_tokens"))
