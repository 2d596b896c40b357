"""A language model lowered for CUDA: saved as an exported graph, compiled on the machine that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from mq_ao.compat.compiling import keep_address
from mq_ao.errors import MqAoError
from mq_ao.lowering.cuda.compiled import compiled
from mq_ao.lowering.cuda.decode_graph import one_token
from mq_ao.lowering.cuda.saved import (
    WITH_GRAPHS,
    Mode,
    SavedGraph,
    parse_mode,
    placed,
    read,
    wanted_device,
    without_graphs,
)
from mq_ao.lowering.stateful_program import StatefulProgram
from mq_ao.models.states import Value, tensors

_GPU_TOKENS = 65536
"""Tokens that a GPU runs at once: it needs more rows than a CPU, and has the memory for them. Not measured."""


class CudaProgram(SavedGraph, StatefulProgram):
    """A language model for GPUs. On the CPU it runs the operators' references, for checking and not for speed.

    Compiled, prefill serves any batch and length; decode is compiled for each batch size, and in the modes
    "reduce-overhead" and "max-autotune" replayed as one CUDA graph. None of this was run on a GPU.

    Decode keeps the states of each batch size in memory of its own and overwrites them: the states that it returns are
    those, and hold until the next step of the same sequences. Clone them to come back to them later. Sequences of one
    batch size may take turns, which costs a copy of their states each. Keys and values of attention grow; where there
    are some, decode is one compiled program for all batch sizes and is not replayed as a CUDA graph.

    Args:
        exported: `(input_ids, *states, positions) -> (logits, *states)`.
        info: what the program says of itself.
        device: where it runs; None: on the GPU if there is one, else on the CPU.
        mode: how; None: with CUDA graphs on a GPU, eager on the CPU.

    Raises:
        MqAoError: a GPU was asked for and there is none that can run it, or the mode is unknown.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        info: Mapping[str, Any],
        device: torch.device | str | None = None,
        mode: Mode | str | None = None,
    ) -> None:
        wanted = wanted_device(device)
        super().__init__(info, wanted, *((_GPU_TOKENS,) if wanted.type == "cuda" else ()))
        self._exported = exported
        self.mode = parse_mode(mode, Mode.CUDA_GRAPHS if wanted.type == "cuda" else Mode.EAGER)
        module = self._module = placed(exported, wanted)
        self._last = torch.zeros(1, dtype=torch.int64, device=wanted)
        self._held: dict[int, _Held] = {}
        self._prefill: Any = module
        self._decode: Any = one_token(module, self.states)
        self._grows = [item.grows for item in self.states.items]
        self._replays = self.mode in WITH_GRAPHS and not any(self._grows)
        if self._replays:
            # Kernels are tuned, and constants that they keep are made, outside of a CUDA graph's memory.
            with torch.no_grad():
                self._decode(self._last[None], *tensors(self.states.zeros(1, wanted)), self._last)
        if self.mode is not Mode.EAGER:
            self._prefill = compiled(self._prefill, without_graphs(self.mode), dynamic=True)
            way = without_graphs(self.mode) if any(self._grows) else str(self.mode)
            self._decode = compiled(self._decode, way, dynamic=any(self._grows))

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str | None = None, mode: Mode | str | None = None
    ) -> CudaProgram:
        """Loads a program saved by `save`, on a machine with or without a GPU.

        Raises:
            MqAoError: the file is missing, damaged, not ours, of another version, or not a language model's; or see the
                class.
        """
        exported, info = read(Path(path))
        if "states" not in info:
            raise MqAoError(f"{path} is not the program of a language model: load it with mq_ao.load.")
        return cls(exported, info, device, mode)

    def on(self, device: torch.device | str, mode: Mode | str | None = None) -> CudaProgram:
        """The same program on another device, with weights of its own there."""
        return CudaProgram(self._exported, self._info, device, mode)

    def _call(
        self, name: str, ids: Tensor, states: Sequence[Value], *positions: Tensor
    ) -> tuple[Tensor, tuple[Value, ...]]:
        # Before parts of states become tensors of their own.
        for held in self._held.values():
            held.check(self._fixed(tensors(states)))
        return super()._call(name, ids, states, *positions)

    def run(self, name: str, *inputs: Tensor) -> Sequence[Tensor]:
        """See `StatefulProgram.run`."""
        with torch.no_grad():
            if name == "prefill":
                return self._prefill(*inputs)
            ids, *given = inputs
            held = self._memory(len(ids))
            fixed = iter(held.take(self._fixed(given)))
            inputs = tuple(value if grows else next(fixed) for value, grows in zip(given, self._grows, strict=True))
            logits, *rows = self._decode(ids, *inputs, self._last)
            if self._replays:
                logits = logits.clone()  # the next replay writes to the same memory
            new, kept = iter(rows), iter(held.give())
            return logits, *(next(new) if grows else next(kept) for grows in self._grows)

    def _fixed(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Those states that do not grow."""
        return [state for state, grows in zip(states, self._grows, strict=True) if not grows]

    def _memory(self, batch: int) -> _Held:
        """The memory of so many sequences, which is made once."""
        if batch not in self._held:
            # What is made in inference mode could not be overwritten outside of it.
            with torch.inference_mode(False):
                self._held[batch] = _Held(self._fixed(tensors(self.states.zeros(batch, self._device))))
        return self._held[batch]


class _Held:
    """States that steps overwrite, at addresses that stay: a CUDA graph need not copy them."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        self._states = states
        self._latest: tuple[Tensor, ...] = ()
        for state in states:
            keep_address(state)

    def check(self, given: Sequence[Tensor]) -> None:
        """Raises MqAoError if states lie here that are not those of the last step."""
        for state, value in zip(self._states, given, strict=True):
            here = value.numel() and value.untyped_storage().data_ptr() == state.untyped_storage().data_ptr()
            if here and not self._knows(value):
                raise MqAoError(
                    "these states are of an earlier step, and a later one has overwritten them, or they are a part of "
                    "others: clone what decode returns to come back to it or to take parts of it."
                )

    def take(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        """The memory, with these states in it."""
        if not all(map(self._knows, given)):
            # Those of other sequences, which may go on later, in memory of their own from now on.
            with torch.inference_mode(False):
                for latest in self._latest:
                    latest.data = latest.clone()
                for state, value in zip(self._states, given, strict=True):
                    state.copy_(value)
        self._latest = ()  # until the step is done
        return self._states

    def give(self) -> tuple[Tensor, ...]:
        """The states as they are now, as tensors that `take` knows again until it gives others."""
        with torch.inference_mode(False):
            self._latest = tuple(state.view_as(state) for state in self._states)
        return self._latest

    def _knows(self, value: Tensor) -> bool:
        return any(value is latest for latest in self._latest)
