"""The states that a language model carries from token to token: their shapes, and what is given as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.models.token_inputs import is_plain


@dataclass(frozen=True)
class StateShapes:
    """Shapes of a language model's carried states, without the batch.

    Attributes:
        n_layer: number of blocks.
        conv: (d_conv - 1, channels of the convolution).
        ssm: (d_inner, d_state), or (heads, headdim, d_state) in Mamba-2.
        conv_dtype: of the convolutions' states.
        ssm_dtype: of the scans' states: int8 where they are carried as integers.
    """

    n_layer: int
    conv: tuple[int, ...]
    ssm: tuple[int, ...]
    conv_dtype: torch.dtype = torch.float32
    ssm_dtype: torch.dtype = torch.float32

    @classmethod
    def of_values(cls, *values: Tensor) -> StateShapes:
        """From example values of the inputs `(input_ids, conv_state, ssm_state)` of a graph.

        Raises:
            MqAoError: they are others.
        """
        if not are_states(values):
            raise MqAoError(
                "the graph is not that of a language model with states: its inputs must be input_ids (batch, length), "
                "conv_state (n_layer, batch, d_conv - 1, channels) and ssm_state (n_layer, batch, d_inner, d_state) or "
                "(n_layer, batch, heads, headdim, d_state)."
            )
        _, conv, ssm = values
        conv_shape, ssm_shape = (tuple(map(int, state.shape[2:])) for state in (conv, ssm))
        return cls(int(conv.shape[0]), conv_shape, ssm_shape, conv.dtype, ssm.dtype)

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> StateShapes:
        """From what `described` gave."""
        dtypes = (getattr(torch, described[name]) for name in ("conv_dtype", "ssm_dtype"))
        return cls(described["n_layer"], tuple(described["conv"]), tuple(described["ssm"]), *dtypes)

    @property
    def described(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        dtypes = {"conv_dtype": str(self.conv_dtype)[6:], "ssm_dtype": str(self.ssm_dtype)[6:]}
        return {"n_layer": self.n_layer, "conv": self.conv, "ssm": self.ssm, **dtypes}

    def zeros(self, batch: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Initial conv and ssm states."""
        conv = torch.zeros(self.n_layer, batch, *self.conv, dtype=self.conv_dtype, device=device)
        return conv, torch.zeros(self.n_layer, batch, *self.ssm, dtype=self.ssm_dtype, device=device)

    def given(
        self, batch: int, conv_state: Any, ssm_state: Any, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both states of so many sequences: zeros if there is neither, else as `check` has them."""
        if conv_state is None and ssm_state is None:
            return self.zeros(batch, device)
        self.check(batch, conv_state, ssm_state)
        return conv_state, ssm_state

    def check(self, batch: int, conv_state: Any, ssm_state: Any) -> None:
        """Checks states that are given with so many sequences.

        Raises:
            MqAoError: one is missing, of other sequences, of another shape or dtype, or they were swapped.
        """
        for name, state, shape, dtype in (
            ("conv_state", conv_state, self.conv, self.conv_dtype),
            ("ssm_state", ssm_state, self.ssm, self.ssm_dtype),
        ):
            wanted = (self.n_layer, batch, *shape)
            if not isinstance(state, Tensor) or state.shape != wanted or state.dtype != dtype or not is_plain(state):
                raise MqAoError(_complaint(name, state, wanted, dtype))


def are_states(values: Sequence[Any]) -> bool:
    """Whether these may be the inputs `(input_ids, conv_state, ssm_state)` of a graph."""
    return [value.dim() if isinstance(value, Tensor) else 0 for value in values] in ([2, 4, 4], [2, 4, 5])


def _complaint(name: str, state: Any, wanted: tuple[int, ...], dtype: torch.dtype) -> str:
    if state is None:
        return (
            f"{name} is missing: give both states as the last call returned them; a new sequence starts with prefill, "
            "without states."
        )
    if not isinstance(state, Tensor) or not is_plain(state):
        return f"{name} is no tensor of values but a {type(state).__name__}: give what the last call returned."
    shape = tuple(state.shape)
    if shape != wanted:
        if len(shape) == len(wanted) and (shape[0], *shape[2:]) == (wanted[0], *wanted[2:]):
            return (
                f"{name} is of a batch of {shape[1]}, and input_ids of a batch of {wanted[1]}: give the states of the "
                "same sequences."
            )
        return (
            f"{name} has shape {shape}, but {wanted} is needed for a batch of {wanted[1]}: give what the last call "
            "returned, conv_state before ssm_state."
        )
    return f"{name} is {state.dtype}, but this program carries {dtype}: give what it returned."
