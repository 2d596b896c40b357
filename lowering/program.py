"""What compiled language models have in common: states that come and go, prefill, decode and generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.lowering.graphs import StateShapes
from mq_ao.models.generate import Sampling, generate, stream
from mq_ao.models.program import check_ids

States = tuple[Tensor, Tensor, Tensor]


class StatefulProgram(ABC):
    """A language model whose states are inputs and outputs.

    Callable like the model: `(input_ids, conv_state=None, ssm_state=None) -> (logits, conv_state, ssm_state)`. States
    are to be given back as they came: an int8 ssm_state where the scheme has a `carried_state`, else float32.

    Args:
        info: what the program says of itself.
        device: where it runs; inputs are moved there.
    """

    def __init__(self, info: Mapping[str, Any], device: torch.device | None = None) -> None:
        self._info = info
        self._device = device or torch.device("cpu")
        self._shapes = StateShapes.read(info["states"])
        self._vocab_size = int(info["vocab_size"])

    @abstractmethod
    def run(self, name: str, *inputs: Tensor) -> States:
        """Calls "prefill" on ids, both states and the positions of wanted logits, or "decode" on the first three.

        All are contiguous, of the right types, and on the program's device.
        """

    @property
    def info(self) -> Mapping[str, Any]:
        """Recipe, versions, shapes and kernel counts."""
        return self._info

    @property
    def integer_kernels(self) -> Mapping[str, int]:
        """Calls of integer kernels in one forward pass, by operator name; empty for a float program."""
        return self._info["integer_kernels"]

    def __call__(self, input_ids: Tensor, conv_state: Tensor | None = None, ssm_state: Tensor | None = None) -> States:
        """Logits of all tokens: (batch, length, vocab_size), and both states after the last token."""
        return self._start(input_ids, conv_state, ssm_state, torch.arange(self._length(input_ids)))

    def prefill(self, input_ids: Tensor, conv_state: Tensor | None = None, ssm_state: Tensor | None = None) -> States:
        """Logits of the last token only: (batch, 1, vocab_size), and both states after it."""
        last = torch.tensor([self._length(input_ids) - 1])
        return self._start(input_ids, conv_state, ssm_state, last)

    def decode(self, input_ids: Tensor, conv_state: Tensor, ssm_state: Tensor) -> States:
        """One token a sequence: input_ids (batch, 1) -> logits (batch, 1, vocab_size), and both states."""
        return self._call("decode", input_ids, conv_state, ssm_state)

    def stream(self, input_ids: Tensor, max_new_tokens: int, sampling: Sampling | None = None) -> Iterator[Tensor]:
        """Yields the next tokens one by one; see `models.generate.stream`."""
        return stream(self.prefill, input_ids, max_new_tokens, sampling)

    def generate(self, input_ids: Tensor, max_new_tokens: int = 64, sampling: Sampling | None = None) -> Tensor:
        """Prompt and continuation; see `models.generate.generate`."""
        return generate(self.prefill, input_ids, max_new_tokens, sampling)

    def _length(self, input_ids: Tensor) -> int:
        check_ids(input_ids, self._vocab_size)
        return input_ids.shape[1]

    def _start(self, ids: Tensor, conv: Tensor | None, ssm: Tensor | None, positions: Tensor) -> States:
        if conv is None or ssm is None:
            zero_conv, zero_ssm = self._shapes.zeros(ids.shape[0], self._device)
            conv = zero_conv if conv is None else conv
            ssm = zero_ssm if ssm is None else ssm
        if ids.shape[1] == 1:
            return self.decode(ids, conv, ssm)
        return self._call("prefill", ids, conv, ssm, positions)

    def _call(self, name: str, *inputs: Tensor) -> States:
        wanted = {"conv_state": self._shapes.conv_dtype, "ssm_state": self._shapes.ssm_dtype}
        for state, (what, dtype) in zip(inputs[1:3], wanted.items(), strict=True):
            if state.dtype != dtype:
                raise MqAoError(f"{what} is {state.dtype}, but this program carries {dtype}: give what it returned.")
        # Compiled code reads memory as if it were contiguous and of the right type, whatever the tensor says.
        return self.run(name, *(tensor.to(self._device).contiguous() for tensor in inputs))
