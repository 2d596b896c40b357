"""A compiled language model: prefill, decode, generation, saving and loading."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.files import check_output, replacing
from mq_ao.lowering.graphs import StateShapes
from mq_ao.lowering.inductor import package
from mq_ao.models.generate import Sampling, generate, stream
from mq_ao.models.program import check_ids

States = tuple[Tensor, Tensor, Tensor]


class InductorProgram:
    """A language model compiled by AOTInductor: one program for any length, one for a single token.

    Callable like the model: `(input_ids, conv_state=None, ssm_state=None) -> (logits, conv_state, ssm_state)`. States
    are to be given back as they came: an int8 ssm_state where the scheme has a `carried_state`, else float32.

    Args:
        loaded: archive with the programs `prefill` and `decode`.
    """

    def __init__(self, loaded: package.Package) -> None:
        self._package = loaded
        states = loaded.info["states"]
        self._shapes = StateShapes(
            states["n_layer"],
            tuple(states["conv"]),
            tuple(states["ssm"]),
            getattr(torch, states["conv_dtype"]),
            getattr(torch, states["ssm_dtype"]),
        )
        self._vocab_size = int(loaded.info["vocab_size"])

    @classmethod
    def load(cls, path: str | Path) -> InductorProgram:
        """Loads a program saved by `save`, in this or another process.

        Raises:
            MqAoError: the file is missing, damaged, not ours, or of another version.
        """
        return cls(package.read(Path(path)))

    @property
    def info(self) -> Mapping[str, Any]:
        """Recipe, versions, shapes and kernel counts."""
        return self._package.info

    @property
    def integer_kernels(self) -> Mapping[str, int]:
        """Calls of integer kernels in one forward pass, by operator name; empty for a float program."""
        return self._package.info["integer_kernels"]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all resident weights and scales."""
        return sum(tensor.nbytes for tensor in self._package.weights.values())

    def __call__(self, input_ids: Tensor, conv_state: Tensor | None = None, ssm_state: Tensor | None = None) -> States:
        """Logits of all tokens: (batch, length, vocab_size), and both states after the last token."""
        return self._run(input_ids, conv_state, ssm_state, torch.arange(self._length(input_ids)))

    def prefill(self, input_ids: Tensor, conv_state: Tensor | None = None, ssm_state: Tensor | None = None) -> States:
        """Logits of the last token only: (batch, 1, vocab_size), and both states after it."""
        last = torch.tensor([self._length(input_ids) - 1])
        return self._run(input_ids, conv_state, ssm_state, last)

    def decode(self, input_ids: Tensor, conv_state: Tensor, ssm_state: Tensor) -> States:
        """One token a sequence: input_ids (batch, 1) -> logits (batch, 1, vocab_size), and both states."""
        return self._call("decode", input_ids, conv_state, ssm_state)

    def stream(self, input_ids: Tensor, max_new_tokens: int, sampling: Sampling | None = None) -> Iterator[Tensor]:
        """Yields the next tokens one by one; see `models.generate.stream`."""
        return stream(self.prefill, input_ids, max_new_tokens, sampling)

    def generate(self, input_ids: Tensor, max_new_tokens: int = 64, sampling: Sampling | None = None) -> Tensor:
        """Prompt and continuation; see `models.generate.generate`."""
        return generate(self.prefill, input_ids, max_new_tokens, sampling)

    def save(self, path: str | Path) -> None:
        """Writes the program to a `.pt2` file, under a temporary name that is renamed when it is complete.

        Raises:
            MqAoError: the path cannot be written.
        """
        with replacing(check_output(path, ".pt2")) as temporary:
            shutil.copyfile(self._package.path, temporary)

    def _length(self, input_ids: Tensor) -> int:
        check_ids(input_ids, self._vocab_size)
        return input_ids.shape[1]

    def _run(self, ids: Tensor, conv: Tensor | None, ssm: Tensor | None, positions: Tensor) -> States:
        zero_conv, zero_ssm = self._shapes.zeros(ids.shape[0])
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
        logits, conv, ssm = self._package.programs[name](*(tensor.contiguous() for tensor in inputs))
        return logits, conv, ssm
