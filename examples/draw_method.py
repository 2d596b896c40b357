"""Draws what rotations and smoothing do to the bundled model, for docs/method.md.

    python examples/draw_method.py docs/images

writes `variances.svg`, the channel variances that in_proj and the head read before and after R1 (docs/method.md, R1),
and `out_proj.svg`, the channels of one block's out_proj input before and after S2 and R2 (docs/method.md, S2 and R2).
Both are measured on 16,384 bytes of the model's calibration text. It takes about half a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mq_ao import passes
from mq_ao.api import capture
from mq_ao.cli.console import out
from mq_ao.files import replacing
from mq_ao.models import MambaLM, demo
from mq_ao.passes import Profile, Request
from mq_ao.report.plots import number, ratio
from mq_ao.text import BYTE_VOCABULARY, ByteCodec, calibration_batches, read_tokens

COLOURS = ("#0072b2", "#d55e00", "#009e73")  # can be told apart with every kind of colour vision
BLOCK = 3
"""The block whose out_proj is drawn: the middle one of seven."""


def batches(model: MambaLM, tokens: int) -> list[tuple[Tensor, ...]]:
    """Calibration data of the bundled model, as inputs of its graph: ids and zero states."""
    text = read_tokens(demo.CALIBRATION, BYTE_VOCABULARY, ByteCodec())
    return [(ids, *model.initial_states(len(ids))) for ids in calibration_batches(text, tokens)]


def residual_variances(model: MambaLM, data: Sequence[tuple[Tensor, ...]]) -> Profile:
    """Channel variances of the residual stream before R1, after a Hadamard matrix alone, and after R1."""
    rewrite = passes.apply(capture(model, data[0]), ["fold_norm", "rotate_residual"], data)
    return rewrite.profiles[0]


def out_proj_magnitudes(model: MambaLM, data: Sequence[tuple[Tensor, ...]], rewrites: Sequence[str]) -> Tensor:
    """Largest magnitude of each channel (d_inner,) of one block's out_proj input, after some rewrites."""
    rewrite = passes.apply(capture(model, data[0]), rewrites, data)
    read = rewrite.blocks[BLOCK].out_input.name
    return passes.collect(rewrite.module, [Request(read)], data)[read].maximum


def draw_sorted(axes: Axes, curves: dict[str, Tensor]) -> None:
    """One curve of descending values each, with its largest over its smallest value in the legend."""
    for colour, (name, values) in zip(COLOURS, curves.items(), strict=False):
        label = f"{name}: max/min {number(ratio(values))}"
        axes.plot(values.sort(descending=True).values.tolist(), color=colour, linewidth=1.8, label=label)
    axes.grid(visible=True, axis="y", linewidth=0.3, alpha=0.6)
    axes.legend(frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Saves an SVG that is the same for the same figure."""
    with rc_context({"svg.hashsalt": path.name}), replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write the figures.")],
    tokens: Annotated[int, typer.Option(min=1024, help="Bytes of calibration text.")] = 16384,
) -> None:
    """Draw what rotations and smoothing do to the bundled model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = MambaLM.from_pretrained("demo")
    data = batches(model, tokens)

    profile = residual_variances(model, data)
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    named = {"as trained": profile.before, "Hadamard": profile.hadamard, "KLT and Hadamard (R1)": profile.after}
    draw_sorted(axes, named)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="channel of the residual stream, sorted", ylabel="variance of in_proj's input")
    save(figure, folder / "variances.svg")

    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    stages: dict[str, list[str]] = {
        "as trained": [],
        "smoothed (S2)": ["smooth_gate"],
        "smoothed, rotated (S2, R2)": ["smooth_gate", "rotate_out_proj"],
    }
    draw_sorted(axes, {name: out_proj_magnitudes(model, data, rewrites) for name, rewrites in stages.items()})
    axes.set_yscale("log")
    axes.set(xlabel=f"channel of out_proj's input in block {BLOCK}, sorted", ylabel="largest magnitude")
    save(figure, folder / "out_proj.svg")
    out().print(f"variances.svg and out_proj.svg are in {folder}")


if __name__ == "__main__":
    typer.run(main)
