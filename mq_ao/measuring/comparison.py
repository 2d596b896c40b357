"""Recipes set against the float model and against each other, on one text and several draws of calibration data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.measuring.engine import Job, measure
from mq_ao.measuring.measured import Loss, Measured, difference, loss
from mq_ao.measuring.metric import TextMetric
from mq_ao.passes.plant_outliers import PlantOutliers
from mq_ao.recipes import Recipe


@dataclass(frozen=True)
class RecipeComparison:
    """What several recipes do to one model.

    Attributes:
        draws: measurements by recipe, one a draw of calibration data, the same draws for all.
    """

    draws: Mapping[str, Sequence[Measured]]

    @cached_property
    def losses(self) -> dict[str, Loss]:
        """Every recipe against the float model."""
        return {name: loss(found) for name, found in self.draws.items()}

    @cached_property
    def differences(self) -> dict[tuple[str, str], Loss]:
        """Every recipe against every other one: by (recipe, other), below 0 where the recipe loses less."""
        return {(a, b): difference(self.draws[a], self.draws[b]) for a, b in itertools.permutations(self.draws, 2)}

    @property
    def best_cost(self) -> str:
        """The recipe of least cost."""
        return min(self.losses, key=lambda name: self.losses[name].cost.value)

    @property
    def best_divergence(self) -> str:
        """The recipe of least divergence."""
        return min(self.losses, key=lambda name: self.losses[name].divergence.value)

    def among_best_cost(self, name: str) -> bool:
        """Whether a recipe's cost is the least, or the interval of its difference to the least holds 0."""
        best = self.best_cost
        return name == best or self.differences[name, best].cost.low <= 0

    def among_best_divergence(self, name: str) -> bool:
        """Whether a recipe's divergence is the least, or the interval of its difference to the least holds 0."""
        best = self.best_divergence
        return name == best or self.differences[name, best].divergence.low <= 0

    def agreement(self, name: str) -> float:
        """Share of tokens whose likeliest prediction is the float model's, over all draws."""
        return sum(one.agreement for one in self.draws[name]) / len(self.draws[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every recipe with its draws, then the pairs."""
        recipes = [
            {
                "recipe": name,
                **found.to_dict(),
                "agreement": self.agreement(name),
                "among_best": {"cost": self.among_best_cost(name), "divergence": self.among_best_divergence(name)},
                "draws": [vars(one) for one in self.draws[name]],
            }
            for name, found in self.losses.items()
        ]
        pairs = [
            {"recipe": a, "against": b, **self.differences[a, b].to_dict()}
            for a, b in itertools.combinations(self.draws, 2)
        ]
        return {"recipes": recipes, "pairs": pairs}


def with_outliers(recipe: Recipe, factor: float | None) -> Recipe:
    """The recipe for a model in which outliers of this factor are planted first; None: as it is.

    Raises:
        MqAoError: the factor is not above 1.
    """
    if factor is None:
        return recipe
    if not 1 < factor < math.inf:
        raise MqAoError(f"--outliers is {factor:g}: give a factor above 1, such as 30 or 100.")
    return replace(recipe, passes=(PlantOutliers(factor=factor), *recipe.passes))


def compare_recipes(
    metric: TextMetric,
    recipes: Mapping[str, Recipe],
    draws: Sequence[Sequence[Tensor]],
    *,
    resume: Path | None = None,
    progress: Callable[[int, str | None], object] | None = None,
) -> RecipeComparison:
    """Quantizes the metric's model by every recipe on every draw of calibration data, and measures it.

    Args:
        metric: model and text.
        recipes: by what they are to be called.
        draws: calibration batches of each draw, not of the metric's text.
        resume: see `measure`.
        progress: see `measure`.

    Raises:
        MqAoError: see `measure`.
    """
    jobs = [
        Job(f"{name}, draw {number} of {len(draws)}", recipe, batches)
        for name, recipe in recipes.items()
        for number, batches in enumerate(draws, start=1)
    ]
    found = iter(measure(metric.model, metric, jobs, resume=resume, progress=progress))
    return RecipeComparison({name: [next(found) for _ in draws] for name in recipes})
