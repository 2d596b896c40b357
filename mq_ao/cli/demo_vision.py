"""`mq-ao demo --vision`: the bundled image classifier before and after quantization."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mq_ao.cli.console import bar, err, kernel_counts, out, ready_kernels, step

if TYPE_CHECKING:
    from torch import Tensor

    from mq_ao.classify import Comparison

BASELINES = ("rtn-w8a8", "quarot-w8a8")
IMAGES = 1_000
ROUNDS = 7


def demo_vision(recipe: str) -> None:
    """Quantizes the bundled Vim and prints its accuracy and speed before and after, on images it has not seen."""
    with step("starting"):
        from safetensors.torch import load_file

        from mq_ao import api
        from mq_ao.classify import BATCH, compare, log_probabilities
        from mq_ao.lowering import inductor
        from mq_ao.models import Vim, vision_demo
        from mq_ao.recipes import get_recipe
    chosen = get_recipe(recipe)
    recipes = [*(get_recipe(name) for name in BASELINES if name != chosen.name), chosen]
    ready_kernels()
    with step("loading the bundled classifier"):
        model, stored = Vim.from_pretrained("demo"), load_file(vision_demo.IMAGES)
    images = vision_demo.normalised(stored["test_images"][:IMAGES])
    labels = stored["test_labels"][:IMAGES].long()
    calibration = [(batch,) for batch in vision_demo.normalised(stored["calibration_images"]).split(BATCH)]
    quantized = {item.name: api.quantize(model, calibration, item, progress=True) for item in recipes}
    err().print(str(quantized[chosen.name].report()), markup=False, highlight=False, soft_wrap=True)
    # The integer operators, one by one: only what is timed is compiled.
    integer = {name: inductor.rewrite(item.converted) for name, item in quantized.items()}
    with bar(f"classifying {len(labels)} images", len(labels) * (1 + len(integer))) as advance:
        reference = log_probabilities(model, images, advance)
        kept = {
            name: compare(log_probabilities(graph.module, images, advance), reference, labels)
            for name, graph in integer.items()
        }
    with step("compiling in fp32, to compare"):
        compiled = {"fp32": inductor.compiled_float(api.capture(model, calibration[0]), calibration[0])}
    with step(f"compiling {chosen.name}"):
        compiled[chosen.name] = inductor.compiled(quantized[chosen.name].converted, calibration[0])
    speeds = _images_per_second(compiled, images[:BATCH])
    _print_table(int((reference.argmax(-1) == labels).sum()), kept, speeds)
    kernels = kernel_counts(integer[chosen.name].kernels)
    out().print(f"Integer kernels of {chosen.name}: {kernels}. Timed on batches of {BATCH} images.", markup=False)


def _images_per_second(runs: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor) -> dict[str, float]:
    """Medians over rounds in which all take turns."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with bar("timing", ROUNDS * len(runs)) as advance, torch.no_grad():
        for _ in range(ROUNDS):
            for name, run in runs.items():
                started = time.perf_counter()
                run(images)
                seconds[name].append(time.perf_counter() - started)
                advance()
    return {name: len(images) / statistics.median(times) for name, times in seconds.items()}


def _print_table(right: int, kept: Mapping[str, Comparison], speeds: Mapping[str, float]) -> None:
    from rich.table import Table

    count = next(iter(kept.values())).count
    table = Table("", title=f"bundled classifier, on {count} images that it has not seen", title_justify="left")
    for name in ("fp32", *kept):
        table.add_column(name, justify="right")
    points = (f"{item.accuracy:.2%} ({100 * (item.correct - right) / count:+.2f})" for item in kept.values())
    table.add_row("accuracy (points)", f"{right / count:.2%}", *points)
    table.add_row("same class as fp32", "", *(f"{item.agreement:.2%}" for item in kept.values()))
    table.add_row("mean KL to fp32, nats", "", *(f"{item.divergence:.5f}" for item in kept.values()))
    times = (f"{speeds[name]:.0f} ({speeds[name] / speeds['fp32']:.2f}x)" if name in speeds else "" for name in kept)
    table.add_row("images/s, compiled", f"{speeds['fp32']:.0f}", *times)
    out().print(table)
