"""Quantizes and measures step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from mq_ao.ablation.steps import Group, Step
from mq_ao.measuring import Job, Loss, Measured, Metric, loss, measure
from mq_ao.measuring.digests import Batch


@dataclass(frozen=True)
class Row:
    """A finished step.

    Attributes:
        name: the step's.
        group: the step's.
        bits: of the weights.
        measured: what came out.
    """

    name: str
    group: Group
    bits: int
    measured: Measured

    @cached_property
    def loss(self) -> Loss:
        """Against the float model, with intervals over pieces of the text; there is one draw of calibration data."""
        return loss([self.measured])

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        about = {"name": self.name, "group": str(self.group), "bits": self.bits}
        return {**about, **self.loss.to_dict(), "agreement": self.measured.agreement}


def ablate(
    model: nn.Module,
    calibration: Sequence[Batch],
    metric: Metric,
    steps: Iterable[Step],
    *,
    resume: Path | None = None,
    progress: Callable[[int, str | None], object] | None = None,
) -> list[Row]:
    """Quantizes the model by every step's recipe and measures it; equal recipes are measured once.

    Args:
        model: float model in eval mode; it is not changed.
        calibration: batches as for `mq_ao.quantize`, not of the data that `metric` measures on.
        metric: what is measured.
        steps: what to do, see `all_steps`.
        resume: folder of finished measurements, see `mq_ao.measuring.measure`.
        progress: called with 0 and the step's name before a step, and with 1 and None after it.

    Returns:
        One row a step, in the order of the steps.

    Raises:
        MqAoError: see `mq_ao.measuring.measure`.
    """
    chosen = list(steps)
    jobs = [Job(f"{step.name}, W{step.bits}A8", step.recipe, calibration) for step in chosen]
    found = measure(model, metric, jobs, resume=resume, progress=progress)
    return [Row(step.name, step.group, step.bits, one) for step, one in zip(chosen, found, strict=True)]
