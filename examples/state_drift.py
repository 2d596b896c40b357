"""How far a model drifts from itself when the states of its scans are rounded after every token, over long texts.

Each rounding is a row of one batch, beside a row whose states stay in float32; all read the same text. Weights and
activations stay in float32, so that what differs is due to the states alone. Scales are one a channel and state where
nothing else is said, ranges the largest magnitudes that states reach on the calibration text, or twice these.

Examples:

    python examples/state_drift.py demo --text mq_ao/models/demo/heldout.txt \\
        --calibration mq_ao/models/demo/calibration.txt --tokens 100000 --json drift.json --plot drift.svg
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor

from mq_ao.cli.console import check_json, out, step, write_json
from mq_ao.errors import MqAoError
from mq_ao.files import check_output
from mq_ao.models import MambaLM
from mq_ao.opening import open_float
from mq_ao.ops.state import dithered
from mq_ao.plots import check_plot, write_figure
from mq_ao.progress import with_bar
from mq_ao.text import codec_for, read_tokens


@dataclass(frozen=True)
class Rounding:
    """One way to round states to integers, which are symmetric around 0.

    Attributes:
        whole: makes whole numbers of states in steps.
        room: the largest state that is not cut, in units of the largest in calibration.
        bits: of the integers.
        shared: how many of the last axes of a state share a scale.
        power_of_two: whether a scale is the next larger power of two.
    """

    whole: Callable[[Tensor], Tensor]
    room: float
    bits: int = 8
    shared: int = 0
    power_of_two: bool = False

    def scale(self, largest: Tensor) -> Tensor:
        """Steps for largest magnitudes (layers, ...): the same axes, those that share a step of size 1."""
        axes = tuple(range(largest.dim() - self.shared, largest.dim()))
        top = largest.amax(axes, keepdim=True) if axes else largest
        scale = (self.room * top).clamp(min=torch.finfo(torch.float32).tiny) / self._reach
        return torch.exp2(torch.log2(scale).ceil()) if self.power_of_two else scale

    def __call__(self, state: Tensor, scale: Tensor) -> Tensor:
        """The state that is carried instead."""
        return self.whole((state / scale).clamp_(-self._reach, self._reach)) * scale

    @property
    def _reach(self) -> int:
        return 2 ** (self.bits - 1) - 1


def at_random(steps: Tensor) -> Tensor:
    """Whole numbers next to `steps`, the larger one with the probability that the fraction is."""
    return (steps + torch.rand_like(steps)).floor_()


@dataclass(frozen=True)
class Cast:
    """States in another floating-point type."""

    dtype: torch.dtype

    def scale(self, largest: Tensor) -> Tensor:
        """None is needed."""
        return torch.ones(())

    def __call__(self, state: Tensor, scale: Tensor) -> Tensor:
        """The state that is carried instead."""
        return state.to(self.dtype).to(state.dtype)


Carried = Rounding | Cast


def ways(axes: int) -> dict[str, Carried]:
    """What is compared, for states of so many axes without layer and batch: (channels, states), or those of heads."""
    wider = {"a channel": 1} if axes == 2 else {"a head and channel": 1, "a head": 2}
    return {
        "float16": Cast(torch.float16),
        "bfloat16": Cast(torch.bfloat16),
        "int16, to the nearest, twice the range": Rounding(torch.round, 2.0, bits=16),
        "int8, to the nearest": Rounding(torch.round, 1.0),
        "int8, to the nearest, twice the range": Rounding(torch.round, 2.0),
        "int8, toward zero": Rounding(torch.trunc, 1.0),
        "int8, at random, twice the range": Rounding(at_random, 2.0),
        "int8, dithered, twice the range": Rounding(dithered, 2.0),
        **{f"... a scale {name}": Rounding(dithered, 2.0, shared=shared) for name, shared in wider.items()},
        "... scales that are powers of two": Rounding(dithered, 2.0, power_of_two=True),
        "int6, dithered, twice the range": Rounding(dithered, 2.0, bits=6),
    }


@dataclass(frozen=True)
class Window:
    """A stretch of the text.

    Attributes:
        end: tokens up to its end.
        divergence: mean KL(float || rounded) of its tokens, nats.
        loss: mean increase of the cost of its tokens, nats.
    """

    end: int
    divergence: float
    loss: float


def largest_states(model: MambaLM, tokens: Tensor) -> Tensor:
    """Largest |state| over a text (length,), as the model's ssm_state without its batch."""
    largest = torch.zeros(())
    for _, ssm in _decode(model, tokens[None], lambda ssm: ssm):
        largest = torch.maximum(largest, ssm.abs())
    return largest[:, 0]


def drift(
    model: MambaLM, tokens: Tensor, largest: Tensor, roundings: dict[str, Carried], window: int
) -> dict[str, list[Window]]:
    """What each rounding adds to the cost of a text (length,), window by window."""
    scales = [rounding.scale(largest) for rounding in roundings.values()]

    def rounded(ssm: Tensor) -> Tensor:
        """(layers, 1 + roundings, ...), the first row as it is."""
        rows = [ssm[:, 0]]
        for row, (rounding, scale) in enumerate(zip(roundings.values(), scales, strict=True), start=1):
            rows.append(rounding(ssm[:, row], scale))
        return torch.stack(rows, 1)

    rows = tokens.expand(1 + len(roundings), -1)
    sums = torch.zeros(2, len(roundings), dtype=torch.float64)
    found: dict[str, list[Window]] = {name: [] for name in roundings}
    decoded = zip(tokens[1:], _decode(model, rows, rounded), strict=False)
    for at, (target, (logits, _)) in enumerate(with_bar(decoded, "decoding", shown=True), start=1):
        log_p = torch.log_softmax(logits, -1)
        sums[0] += (log_p[0].exp() * (log_p[0] - log_p[1:])).sum(-1)
        sums[1] += log_p[0, target] - log_p[1:, target]
        if at % window == 0:
            for name, divergence, loss in zip(roundings, *(sums / window).tolist(), strict=True):
                found[name].append(Window(at, divergence, loss))
            sums.zero_()
    return found


@torch.inference_mode()
def _decode(model: MambaLM, rows: Tensor, after: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (rows, vocabulary) and ssm_state after every token of texts (rows, length); `after` is done to states."""
    conv, ssm = model.initial_states(len(rows))
    for column in rows.T:
        logits, conv, ssm = model(column[:, None], conv, ssm)
        ssm = after(ssm)
        yield logits[:, 0], ssm


def _draw(found: dict[str, list[Window]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, windows in found.items():
        axes.plot([w.end for w in windows], [w.divergence for w in windows], label=name)
    axes.set(xlabel="tokens decoded", ylabel="KL to float states, nats", yscale="log", title=title)
    axes.legend(fontsize="small")
    write_figure(figure, path)


def main(
    model: Annotated[str, typer.Argument(help='"demo", a folder, or a hub id: a Mamba or Mamba-2.')],
    text: Annotated[Path, typer.Option(help="Text to decode.")],
    calibration: Annotated[Path, typer.Option(help="Other text, for the ranges.")],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 100_000,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens for the ranges.")] = 8192,
    window: Annotated[int, typer.Option(min=1, help="Tokens that a point of the curve is the mean of.")] = 2000,
    json: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write the curves as JSON; - is stdout.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves: PNG or SVG.")] = None,
) -> None:
    """Prints, for each rounding of states, the KL and the added cost at the beginning of a text and at its end."""
    check_json(json)
    if plot:
        check_plot(check_output(plot))
    loaded = open_float(model, step)
    vocab_size = loaded.config.vocab_size
    codec = codec_for(vocab_size, source=model)
    read = torch.cat(read_tokens(text, vocab_size, codec).documents)[:tokens]
    if len(read) < 2 * window + 1:
        raise MqAoError(f"{text} gives {len(read)} tokens: give more text, or a smaller --window.")
    other = torch.cat(read_tokens(calibration, vocab_size, codec).documents)[:calibration_tokens]
    largest = largest_states(loaded, other)
    torch.manual_seed(0)
    found = drift(loaded, read, largest, ways(largest.dim() - 1), window)
    fifth = max(1, len(next(iter(found.values()))) // 5)
    table = Table(title=f"{model}: states rounded after each of {len(read):,} tokens")
    for heading in ("states", "KL, first fifth", "KL, last fifth", "added nats, first fifth", "last fifth"):
        table.add_column(heading, justify="left" if heading == "states" else "right")
    for name, windows in found.items():
        ends = windows[:fifth], windows[-fifth:]
        divergences = (f"{sum(w.divergence for w in part) / fifth:.5f}" for part in ends)
        losses = (f"{sum(w.loss for w in part) / fifth:+.5f}" for part in ends)
        table.add_row(name, *divergences, *losses)
    out().print(table)
    if json:
        write_json(json, {name: [asdict(w) for w in windows] for name, windows in found.items()})
    if plot:
        _draw(found, plot, f"{model}: KL of rounded states")


if __name__ == "__main__":
    typer.run(main)
