"""Recipes: ordered exact rewrites, then a quantization scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mq_ao.errors import MqAoError
from mq_ao.quantizer import Activation, QuantizationConfig, w8a8


@dataclass(frozen=True)
class Recipe:
    """How a float graph becomes a quantized one.

    Attributes:
        name: what reports and saved programs call it.
        scheme: spec of every role that is quantized.
        passes: names of the exact float rewrites of `mq_ao.passes`, in the order in which they are applied.
    """

    name: str
    scheme: QuantizationConfig = field(default_factory=w8a8)
    passes: tuple[str, ...] = ()

    def __str__(self) -> str:
        passes = ", ".join(self.passes) or "none"
        return f"recipe {self.name}\npasses: {passes}\n{self.scheme}"


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("rtn-w8a8", w8a8(Activation.STATIC)),
            Recipe("rtn-w8a8-dynamic", w8a8(Activation.PER_TOKEN)),
        )
    }
)
"""The named recipes. rtn: round to nearest, no rewrites."""


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Returns the recipe of that name, or the recipe itself.

    Raises:
        MqAoError: there is none of that name; the message lists the known ones.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise MqAoError(f"unknown recipe {recipe!r}: the recipes are {', '.join(RECIPES)}.")
    return RECIPES[recipe]
