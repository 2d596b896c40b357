"""How a quantized model is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from mq_ao.evaluate import compare
from mq_ao.measuring.digests import digest
from mq_ao.measuring.measured import Measured
from mq_ao.measuring.pieces import Pieces, pieces
from mq_ao.models import MambaLM
from mq_ao.quantized import QuantizedModel
from mq_ao.text import TokenText


class Metric(Protocol):
    """How a quantized model is measured."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the evaluation data or the way of measuring does."""

    def __call__(self, quantized: QuantizedModel) -> Measured:
        """Measures a quantized model against its float model."""


@dataclass(frozen=True)
class TextMetric:
    """Cost of a text under a language model, and how far its predictions are from the float model's.

    Attributes:
        model: the float model.
        text: what is predicted; not the calibration text.
        lowered: measure the program, in real integers, instead of the graph that simulates them.
    """

    model: MambaLM
    text: TokenText
    lowered: bool = False

    @cached_property
    def pieces(self) -> Pieces:
        """How the text is cut up."""
        return pieces(self.text)

    @cached_property
    def fingerprint(self) -> str:
        """Of the text's tokens and pieces, and of what is run."""
        return digest([self.pieces.what, str(self.lowered), *self.text.documents])

    def level(self, nats: float) -> float:
        """A cost of the whole text in bits per byte, or as perplexity where only the text's tokens are known."""
        if self.text.text_bytes is None:
            return math.exp(nats / self.text.predicted)
        return nats / math.log(2) / self.text.text_bytes

    @property
    def unit(self) -> str:
        """Of `level`."""
        return "perplexity" if self.text.text_bytes is None else "bits per byte"

    def __call__(self, quantized: QuantizedModel) -> Measured:
        """Measures a language model with explicit states."""
        run: Any = quantized.lower() if self.lowered else quantized.converted

        def step(ids: Tensor, *states: Tensor) -> Any:
            return run(ids, *(states or self.model.initial_states(len(ids))))

        tokens = compare(self.model, step, self.text).tokens
        columns = (tokens.reference, tokens.other, tokens.divergence, tokens.same)
        return Measured(tuple(map(float, self.pieces.sizes)), *map(self.pieces.sums, columns))
