"""What compiled language models have in common: states that come and go, prefill, decode and generation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mq_ao.lowering.lowered_program import GeneratingProgram
from mq_ao.models.states import States, Value, tensors
from mq_ao.models.token_inputs import one_token, refuse_mask, token_ids

Result = tuple[Any, ...]
"""Logits, and the states after them."""


class StatefulProgram(GeneratingProgram):
    """A language model whose states are inputs and outputs.

    Callable as `(input_ids, *states) -> (logits, *states)`. `states` says which there are; of a `MambaLM` they are
    conv_state and ssm_state. They are to be given back as they came: keys and values of attention as `Rows`, an int8
    ssm_state where the scheme has a `carried_state`. Without states, or with None for all, sequences are new. Token ids
    are (batch, length) integers: a tensor of any width, a numpy array, or lists. Every input is checked here, before
    compiled code reads it.

    A long input is run in pieces, which carry the states. So memory beyond that of the logits does not grow with the
    length. Without pieces the bundled demo took 10 kB a token; the logits of all tokens are 4 bytes times vocab_size a
    token, those of `prefill` one row.

    Args:
        info: what the program says of itself.
        device: where it runs; inputs are moved there.
        piece_tokens: tokens of all sequences of a batch that run at once; more do not run faster on a CPU.
    """

    def __init__(self, info: Mapping[str, Any], device: torch.device | None = None, piece_tokens: int = 2048) -> None:
        super().__init__(info)
        self._device = device or torch.device("cpu")
        self.states = States.read(info["states"])
        self._vocab_size = int(info["vocab_size"])
        self._piece_tokens = piece_tokens

    @abstractmethod
    def run(self, name: str, *inputs: Tensor) -> Sequence[Tensor]:
        """Calls "prefill" on ids, states and the positions of wanted logits, or "decode" on all but the last.

        All are contiguous, of the right types, and on the program's device. Of states that grow it gives the new rows.
        """

    def __call__(self, input_ids: Any, *states: Any, attention_mask: None = None) -> Result:
        """Logits of all tokens: (batch, length, vocab_size), and the states after the last token.

        Raises:
            MqAoError: ids or states are not what `token_inputs.token_ids` and `States.check` ask for, or there is an
                attention mask.
        """
        ids, given = self._given(input_ids, states, attention_mask)
        pieces = self._pieces(ids)
        logits, given = self._run_piece(pieces[0], given, torch.arange(pieces[0].shape[1]))
        if len(pieces) == 1:
            return logits, *given
        # One tensor from the start: no copy of all when the pieces are done.
        every = logits.new_empty(*ids.shape, logits.shape[-1])
        places = every.split([piece.shape[1] for piece in pieces], dim=1)
        places[0].copy_(logits)
        for piece, place in zip(pieces[1:], places[1:], strict=True):
            logits, given = self._run_piece(piece, given, torch.arange(piece.shape[1]))
            place.copy_(logits)
        return every, *given

    def prefill(self, input_ids: Any, *states: Any, attention_mask: None = None) -> Result:
        """Logits of the last token only: (batch, 1, vocab_size), and the states after it.

        Raises:
            MqAoError: as for `__call__`.
        """
        ids, given = self._given(input_ids, states, attention_mask)
        for piece in self._pieces(ids):
            logits, given = self._run_piece(piece, given, torch.tensor([piece.shape[1] - 1]))
        return logits, *given

    def decode(self, input_ids: Any, *states: Any) -> Result:
        """One token a sequence: input_ids (batch, 1) -> logits (batch, 1, vocab_size), and the states.

        Raises:
            MqAoError: as for `__call__`; or there is more than one token a sequence, or a state is missing.
        """
        ids = token_ids(input_ids, self._vocab_size)
        one_token(ids)
        logits, given = self._call("decode", ids, self.states.check(len(ids), states))
        return logits, *given

    @property
    def carried(self) -> States:
        """See `GeneratingProgram.carried`."""
        return self.states

    def step(self, ids: Tensor, *states: Any) -> Result:
        """See `GeneratingProgram.step`: after the prompt, tokens and states came from here and are not checked."""
        if not states:
            return self.prefill(ids)
        logits, given = self._call("decode", ids, states)
        return logits, *given

    def _given(self, input_ids: Any, states: Sequence[Any], attention_mask: Any) -> tuple[Tensor, tuple[Value, ...]]:
        refuse_mask(attention_mask)
        ids = token_ids(input_ids, self._vocab_size)
        return ids, self.states.given(len(ids), states, self._device)

    def _pieces(self, ids: Tensor) -> list[Tensor]:
        """Pieces of about `piece_tokens`.

        They begin at multiples of 64, with which Mamba-2's scan sums as in one piece, and the last is long enough to
        run as the others do. So the results are the same bits where all linears are integer kernels.
        """
        length = ids.shape[1]
        size = max(64, self._piece_tokens // len(ids) // 64 * 64)
        starts = range(0, max(1, length - size // 2), size)
        return [ids[:, start : length if start == starts[-1] else start + size] for start in starts]

    def _run_piece(self, ids: Tensor, states: Sequence[Value], positions: Tensor) -> tuple[Tensor, tuple[Value, ...]]:
        if ids.shape[1] == 1:
            return self._call("decode", ids, states)
        return self._call("prefill", ids, states, positions)

    def _call(
        self, name: str, ids: Tensor, states: Sequence[Value], *positions: Tensor
    ) -> tuple[Tensor, tuple[Value, ...]]:
        # Compiled code reads memory as if it were contiguous and of the right type, whatever the tensor says.
        inputs = (ids, *tensors(states), *positions)
        logits, *new = self.run(name, *(_plain(tensor).to(self._device).contiguous() for tensor in inputs))
        return logits, self.states.after(states, new)


def _plain(tensor: Tensor) -> Tensor:
    """Without a history; the tensor itself where it has none."""
    return tensor.detach() if tensor.requires_grad else tensor
