"""Recipes: ordered exact rewrites, then a quantization scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mq_ao.errors import MqAoError
from mq_ao.passes import Pass
from mq_ao.passes.registry import write_pass
from mq_ao.quantizer import Activation, QuantizationConfig, Rounding, w8a8


@dataclass(frozen=True)
class Recipe:
    """How a float graph becomes a quantized one.

    Attributes:
        name: what reports and saved programs call it.
        scheme: spec of every role that is quantized.
        passes: exact float rewrites, in the order in which they are applied.
    """

    name: str
    scheme: QuantizationConfig = field(default_factory=w8a8)
    passes: tuple[Pass, ...] = ()

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration data is run through the float graph before it is prepared."""
        gptq = any(spec.rounding is Rounding.GPTQ for spec in self.scheme.roles.values())
        return bool(self.passes) or gptq

    def __str__(self) -> str:
        """A table: the passes with their options, then the scheme by role."""
        lines = [f"recipe {self.name}"]
        for index, item in enumerate(self.passes):
            lines.append(f"{'passes' if index == 0 else '':<10} {_in_words(item)}")
        return "\n".join([*lines, str(self.scheme)])


def _in_words(item: Pass) -> str:
    written = write_pass(item)
    options = next(iter(written.values())) if isinstance(written, dict) else {}
    step = f" ({item.step})" if item.step else ""
    return item.name + step + "".join(f" {name}={value}" for name, value in options.items())


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
