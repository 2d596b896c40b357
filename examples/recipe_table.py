"""What recipes keep of a classifier: measured on images, as a table or JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

import mq_ao
from mq_ao.classify import Comparison, compare, log_probabilities
from mq_ao.cli.console import bar, out, write_json
from mq_ao.quantized import QuantizedModel
from mq_ao.recipes import Recipe, get_recipe


@dataclass(frozen=True)
class Result:
    """What one recipe keeps.

    Attributes:
        recipe: its name.
        bits: of the weights.
        kept: accuracy, agreement with float32 and divergence from it.
    """

    recipe: str
    bits: int
    kept: Comparison


@dataclass(frozen=True)
class Results:
    """What recipes keep.

    Attributes:
        right: images that the float model classifies right.
        recipes: in the order in which they were measured.
    """

    right: int
    recipes: tuple[Result, ...]


def named(recipes: Sequence[str]) -> list[tuple[int, Recipe]]:
    """Recipes by name or file, with the fewest bits that their weights have."""
    found = [get_recipe(recipe) for recipe in recipes]
    return [(min(spec.bits for spec in recipe.scheme.roles.values()), recipe) for recipe in found]


def measure(
    model: nn.Module,
    calibration: Sequence[tuple[Any, ...]],
    chosen: Sequence[tuple[int, Recipe]],
    images: Tensor,
    labels: Tensor,
    run: Callable[[QuantizedModel], Callable[[Tensor], Tensor]],
) -> Results:
    """Quantizes and runs a classifier recipe by recipe, with a progress bar.

    Args:
        model: float classifier in eval mode.
        calibration: inputs of the model, one tuple a batch; none of `images`.
        chosen: (bits of the weights, recipe).
        images: inputs to evaluate on.
        labels: (images,) int64.
        run: what runs a quantized graph.
    """
    results = []
    with bar("float32", len(labels) * (len(chosen) + 1)) as advance:
        reference = log_probabilities(model, images, advance)
        right = int((reference.argmax(-1) == labels).sum())
        for bits, recipe in chosen:
            advance(0, recipe.name)
            log_q = log_probabilities(run(mq_ao.quantize(model, calibration, recipe)), images, advance)
            results.append(Result(recipe.name, bits, compare(log_q, reference, labels)))
    return Results(right, tuple(results))


def report(results: Results, json: str | None) -> None:
    """Writes JSON where it was asked for, and prints a table unless JSON goes to stdout."""
    if json is not None:
        write_json(json, _plain(results))
    if json != "-":
        _print(results)


def _plain(results: Results) -> dict[str, Any]:
    rows = [{"recipe": row.recipe, "bits": row.bits, **asdict(row.kept)} for row in results.recipes]
    return {"float32_correct": results.right, "results": rows}


def _print(results: Results) -> None:
    from rich.table import Table

    images, right = results.recipes[0].kept.count, results.right
    table = Table(title=f"float32: {right} of {images} right ({right / images:.4f})", title_justify="left")
    for name in ("recipe", "right", "accuracy", "points", "agreement", "mean KL, nats"):
        table.add_column(name, justify="left" if name == "recipe" else "right")
    for row in results.recipes:
        kept = row.kept
        points = 100 * (kept.correct - right) / images
        cells = (f"{kept.accuracy:.4f}", f"{points:+.2f}", f"{kept.agreement:.4f}", f"{kept.divergence:.5f}")
        table.add_row(row.recipe, str(kept.correct), *cells)
    out().print(table)
