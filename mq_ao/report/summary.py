"""The report of a quantization as text."""

from __future__ import annotations

from dataclasses import dataclass

from mq_ao.passes import Status, Transform
from mq_ao.quantizer import QuantizationReport
from mq_ao.recipe import Recipe


@dataclass(frozen=True)
class Report:
    """What was matched, rewritten, quantized and left out, and why.

    Attributes:
        recipe: the recipe that was applied.
        backend: whose integers the activations are.
        match: blocks, head and embeddings of the float graph, as text.
        transforms: what the rewrites did, and where they were left out.
        quantization: the quantizer's decisions.
        batches: number of calibration batches.
        tokens: number of calibration tokens, padding left out, or 0 where the inputs are no token ids.
        dtype: floating dtype of most of the model's weights as it was given. What is not quantized runs in float32.
    """

    recipe: Recipe
    backend: str
    match: str
    transforms: tuple[Transform, ...]
    quantization: QuantizationReport
    batches: int
    tokens: int = 0
    dtype: str = "float32"

    def __str__(self) -> str:
        left_out = [str(item) for item in self.transforms if item.status is Status.LEFT_OUT]
        lines = [str(self.recipe), f"for {self.backend}, calibrated on {self.batches} batches"]
        if self.dtype != "float32":
            lines.append(f"the model came in {self.dtype}; what is not quantized runs in float32")
        if self.transforms:
            lines.append(f"{len(self.transforms) - len(left_out)} rewrites applied, {len(left_out)} left out")
        return "\n".join([*lines, *left_out, str(self.quantization)])
