"""What quantizing costs: seconds and memory of `mq_ao.quantize`, in a process of its own."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from mq_ao.bench.worker import call_alone, peak, resident


@dataclass(frozen=True)
class QuantizingCost:
    """What it took to quantize a model: capture, statistics, rewrites, calibration and conversion.

    Attributes:
        model: what was quantized.
        recipe: name of the recipe.
        tokens: calibration tokens.
        seconds: time of `mq_ao.quantize`; the model was open already.
        float_bytes: the float weights, tied ones once.
        libraries: resident bytes before the model was opened.
        peak: most resident bytes of the process, libraries and opening the model included.
    """

    model: str
    recipe: str
    tokens: int
    seconds: float
    float_bytes: int
    libraries: int
    peak: int

    @property
    def ratio(self) -> float:
        """All memory of the process against the float weights."""
        return self.peak / self.float_bytes

    @property
    def own_ratio(self) -> float:
        """What the process took beyond interpreter and libraries, against the float weights."""
        return (self.peak - self.libraries) / self.float_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {**asdict(self), "peak_of_float": self.ratio, "peak_without_libraries_of_float": self.own_ratio}


def measure_quantizing(source: str, recipe: str, tokens: int, threads: int) -> QuantizingCost:
    """Quantizes a model in a fresh process, in which nothing else was loaded before.

    Args:
        source: see `prepare.open_model`.
        recipe: name of a recipe, or a recipe file.
        tokens: calibration tokens: text or random ones, see `prepare.calibration_of`.
        threads: threads to use.

    Raises:
        MqAoError: the model cannot be opened or quantized.
    """
    return call_alone(f"{source}, {recipe}", _quantize, source, recipe, tokens, threads)


def _quantize(source: str, recipe: str, tokens: int, threads: int) -> QuantizingCost:
    import torch

    from mq_ao import api, ops
    from mq_ao.bench.prepare import calibration_of, open_model
    from mq_ao.recipes import get_recipe

    torch.set_num_threads(threads)
    ops.load_native()
    chosen = get_recipe(recipe)
    libraries = resident()
    model = open_model(source)
    batches = calibration_of(model, tokens)
    started = time.perf_counter()
    api.quantize(model, batches, chosen)
    seconds = time.perf_counter() - started
    given = sum(batch.numel() for batch in batches)
    float_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return QuantizingCost(source, chosen.name, given, seconds, float_bytes, libraries, peak())
