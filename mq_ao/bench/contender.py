"""What a bench compares: one model, opened and run in different ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from mq_ao.models import MambaLM
    from mq_ao.models.program_interface import LanguageProgram


class Contender(Protocol):
    """One way to run a language model. It keeps the state of one sequence, or of one batch."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that are needed to run."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Starts with ids (batch, length) int64; logits of the first sequence's last token (vocab_size,)."""

    def decode(self, ids: Tensor) -> Tensor:
        """Goes on with ids (batch, length), one token of each a call; logits as of `prefill`."""


class Eager:
    """Our float module, run by PyTorch operator by operator."""

    def __init__(self, model: MambaLM) -> None:
        self._model = model.eval()
        self._states = model.initial_states(1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, tied ones once."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Contender`; the head sees the last token only, as in every contender."""
        self._states = self._model.initial_states(len(ids))
        return self._run(ids)

    def decode(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        for token in ids.split(1, dim=1):
            logits = self._run(token)
        return logits

    def _run(self, ids: Tensor) -> Tensor:
        hidden, *states = self._model.backbone(ids, *self._states)
        self._states = (states[0], states[1])
        return self._model.lm_head(hidden[:, -1])[0]


class Program:
    """A compiled program of ours, float or quantized."""

    def __init__(self, program: LanguageProgram) -> None:
        self._program = program
        self._states: tuple[Any, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and scales."""
        return self._program.weight_bytes

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        logits, *states = self._program.prefill(ids)
        self._states = tuple(states)
        return logits[0, -1]

    def decode(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        for token in ids.split(1, dim=1):
            logits, *states = self._program.decode(token, *self._states)
            self._states = tuple(states)
        return logits[0, -1]
