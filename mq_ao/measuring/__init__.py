"""Measuring what recipes do to a model, paired token by token with the float model and with each other."""

from __future__ import annotations

from mq_ao.measuring.bootstrap import Estimate
from mq_ao.measuring.comparison import RecipeComparison, compare_recipes
from mq_ao.measuring.engine import Job, measure
from mq_ao.measuring.measured import Loss, Measured, difference, loss
from mq_ao.measuring.metric import Metric, TextMetric

__all__ = [
    "Estimate",
    "Job",
    "Loss",
    "Measured",
    "Metric",
    "RecipeComparison",
    "TextMetric",
    "compare_recipes",
    "difference",
    "loss",
    "measure",
]
