"""What `mq-ao ablate` and `mq-ao compare` have in common: two texts, and a model that is measured on one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao.cli.opened import TEXT_FILE, Opened, open_float
from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from torch import Tensor

    from mq_ao.measuring import Estimate, Measured, TextMetric
    from mq_ao.text import TokenText

TextFile = Annotated[
    Path | None,
    typer.Option(
        **TEXT_FILE,
        help="What is predicted, likewise; not the calibration text. Default for demo: the bundled text.",
    ),
]
Outliers = Annotated[
    float | None, typer.Option(help="Plant outliers of this factor first; the float model stays the same.")
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - is stdout.")]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Keeps finished measurements; an interrupted run continues from there."),
]


@dataclass(frozen=True)
class Subject:
    """A float model and its data.

    Attributes:
        metric: the model, and the text that is predicted.
        draws: calibration batches of every draw.
        about: the data in words, for JSON.
    """

    metric: TextMetric
    draws: list[list[Tensor]]
    about: dict[str, Any]

    def title(self, measured: Measured) -> str:
        """Over a table, from one of its measurements."""
        pieces, level = self.metric.pieces, self.metric.level(sum(measured.reference))
        return (
            f"{self.about['model']} on {self.about['tokens']} tokens of {self.about['text']} ({len(pieces.sizes)} "
            f"{pieces.what}): {self.metric.unit} {level:.4f} in float32"
        )


def open_subject(
    model: str,
    calibration: Path | None,
    text: Path | None,
    tokenizer: str | None,
    *,
    tokens: int,
    eval_tokens: int | None,
    draws: int = 1,
    lowered: bool = False,
) -> Subject:
    """Opens a model and reads both texts.

    Raises:
        MqAoError: something cannot be opened, or calibration tokens stand in the text that is predicted.
    """
    from mq_ao.measuring import TextMetric
    from mq_ao.measuring.pieces import check_disjoint, first_tokens
    from mq_ao.text import calibration_draws

    files = _files(model, calibration, text)
    loaded = open_float(model)
    opened = Opened(model, loaded, loaded.config.vocab_size, tokenizer)
    drawn = calibration_draws(_read(files[0], opened), tokens, draws)
    predicted = first_tokens(_read(files[1], opened), eval_tokens)
    for batches in drawn:
        check_disjoint(batches, predicted)
    metric = TextMetric(loaded, predicted, lowered)
    about = {
        "model": model,
        "calibration": str(files[0]),
        "text": str(files[1]),
        "calibration_tokens": sum(batch.numel() for batch in drawn[0]),
        "draws": draws,
        "tokens": predicted.predicted,
        "pieces": len(metric.pieces.sizes),
        "piece": metric.pieces.what,
    }
    return Subject(metric, drawn, about)


def percent(estimate: Estimate) -> str:
    """A share in percent with its interval."""
    return f"{100 * estimate.value:+.3f} [{100 * estimate.low:+.3f}, {100 * estimate.high:+.3f}]"


def nats(estimate: Estimate, sign: str = "") -> str:
    """A divergence with its interval; `sign` is "+" for a difference."""
    return f"{estimate.value:{sign}.5f} [{estimate.low:{sign}.5f}, {estimate.high:{sign}.5f}]"


def _files(model: str, calibration: Path | None, text: Path | None) -> tuple[Path, Path]:
    """Calibration and evaluation file."""
    from mq_ao.models import demo

    if model == "demo":
        calibration, text = calibration or demo.CALIBRATION, text or demo.HELDOUT
    if calibration is None or text is None:
        raise MqAoError("this needs two texts or files of token ids: give --calibration FILE and --text FILE.")
    if calibration.samefile(text):
        raise MqAoError(f"{text} is to calibrate and to evaluate on: give two files with different text.")
    return calibration, text


def _read(path: Path, opened: Opened) -> TokenText:
    from mq_ao.text import TOKEN_FILES, read_tokens

    return read_tokens(path, opened.vocab_size, None if path.suffix in TOKEN_FILES else opened.codec)
