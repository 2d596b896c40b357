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
from matplotlib.figure import Figure
from torch import Tensor

from mq_ao import passes
from mq_ao.api import capture
from mq_ao.cli.console import out, step
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


def figures(model: MambaLM, tokens: int) -> dict[str, Figure]:
    """The figures by file name, measured on that many bytes of calibration text."""
    data = batches(model, tokens)
    profile = residual_variances(model, data)
    variances = {"as trained": profile.before, "Hadamard": profile.hadamard, "KLT and Hadamard (R1)": profile.after}
    stages: dict[str, list[str]] = {
        "as trained": [],
        "smoothed (S2)": ["smooth_gate"],
        "smoothed, rotated (S2, R2)": ["smooth_gate", "rotate_out_proj"],
    }
    magnitudes = {name: out_proj_magnitudes(model, data, rewrites) for name, rewrites in stages.items()}
    residual, out_proj = drawn(variances), drawn(magnitudes)
    residual.axes[0].set(xlabel="channel of the residual stream, sorted", ylabel="variance of in_proj's input")
    residual.axes[0].set_ylim(bottom=0)
    out_proj.axes[0].set(xlabel=f"channel of out_proj's input in block {BLOCK}, sorted", ylabel="largest magnitude")
    out_proj.axes[0].set_yscale("log")
    return {"variances.svg": residual, "out_proj.svg": out_proj}


def drawn(curves: dict[str, Tensor]) -> Figure:
    """One curve of descending values for each tensor (channels,), with its largest over its smallest in the legend."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for colour, (name, values) in zip(COLOURS, curves.items(), strict=True):
        label = f"{name}: max/min {number(ratio(values))}"
        axes.plot(values.sort(descending=True).values.tolist(), color=colour, linewidth=1.8, label=label)
    axes.grid(visible=True, axis="y", linewidth=0.3, alpha=0.6)
    axes.legend(frameon=False)
    return figure


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
    with step("measuring and drawing"):
        found = figures(MambaLM.from_pretrained("demo"), tokens)
        for name, figure in found.items():
            save(figure, folder / name)
    out().print(f"{' and '.join(found)} are in {folder}")


if __name__ == "__main__":
    typer.run(main)
