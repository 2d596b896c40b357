"""Quantizes and measures step by step; finished rows are kept in a file, so that a run can be taken up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torchao
from torch import Tensor, nn
from torch.fx import GraphModule

from mq_ao import __version__, api
from mq_ao.ablation.steps import Group, Step
from mq_ao.errors import MqAoError
from mq_ao.evaluate import compare
from mq_ao.files import write_atomically
from mq_ao.models import MambaLM
from mq_ao.recipes import Recipe
from mq_ao.text import TokenText

Batch = Tensor | tuple[Any, ...]

OVERLAP = 256
"""Tokens in a row that calibration and evaluation text must not share; a licence or an idiom is shorter."""


@dataclass(frozen=True)
class Measured:
    """What quantization does to a model.

    Attributes:
        value: the metric of the quantized model.
        reference: the metric of the float model on the same data.
        divergence: mean KL(float || quantized) in nats.
        agreement: share of predictions that are the float model's.
    """

    value: float
    reference: float
    divergence: float
    agreement: float

    @property
    def change(self) -> float:
        """The metric's relative change; 0.01 is 1 % more than float."""
        return self.value / self.reference - 1


class Metric(Protocol):
    """How a quantized graph is measured."""

    @property
    def name(self) -> str:
        """What `Measured.value` is, such as "bits per byte"."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the evaluation data or the way of measuring does."""

    def __call__(self, converted: GraphModule) -> Measured:
        """Measures a graph in q/dq form."""


@dataclass(frozen=True)
class Row:
    """A finished step.

    Attributes:
        name: the step's.
        group: the step's.
        bits: of the weights.
        measured: what came out.
    """

    name: str
    group: Group
    bits: int
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        measured = {**asdict(self.measured), "change": self.measured.change}
        return {"name": self.name, "group": str(self.group), "bits": self.bits, **measured}


@dataclass(frozen=True)
class TextMetric:
    """Cost of a text under a language model: bits per byte, or perplexity where only its tokens are known.

    Attributes:
        model: the float model.
        text: what is predicted; not the calibration text.
    """

    model: MambaLM
    text: TokenText

    @property
    def name(self) -> str:
        """What `Measured.value` is."""
        return "perplexity" if self.text.text_bytes is None else "bits per byte"

    @cached_property
    def fingerprint(self) -> str:
        """Of the text's tokens."""
        return _digest([self.name, *self.text.documents])

    def __call__(self, converted: GraphModule) -> Measured:
        """Measures a graph with explicit states."""

        def step(ids: Tensor, *states: Tensor) -> Any:
            return converted(ids, *(states or self.model.initial_states(len(ids))))

        result = compare(self.model, step, self.text)
        values = [row.bits_per_byte or row.perplexity for row in (result.other, result.reference)]
        return Measured(values[0], values[1], result.divergence, result.agreement)


def first_tokens(text: TokenText, count: int) -> TokenText:
    """The beginning of a text, in which `count` tokens are predicted at most; a document may be cut off.

    Raises:
        MqAoError: count is below 1.
    """
    if count < 1:
        raise MqAoError(f"--eval-tokens is {count}: predict at least one token.")
    kept, left = [], count
    for document in text.documents:
        if left > 0:
            kept.append(document[: left + 1])
            left -= len(kept[-1]) - 1
    predicted = sum(len(document) - 1 for document in kept)
    bytewise = text.text_bytes == text.predicted
    return TokenText(tuple(kept), predicted if bytewise else None)


def check_disjoint(calibration: Sequence[Tensor], text: TokenText) -> None:
    """Checks that the text that is predicted holds no stretch of calibration tokens, but for short common ones.

    Raises:
        MqAoError: it does.
    """
    joined = _bytes(torch.cat(text.documents))
    for row in (row for batch in calibration for row in batch):
        # The first token of a window may be the context of a document.
        size = min(OVERLAP, len(row) - 1)
        if any(_bytes(stretch) in joined for stretch in row[1:].unfold(0, size, size)):
            raise MqAoError(
                f"{size} calibration tokens in a row stand in the text that is evaluated on too: give other text, "
                "since results on calibration data are better than they should be."
            )


def _bytes(ids: Tensor) -> bytes:
    return ids.to(torch.int32).numpy().tobytes()


def ablate(
    model: nn.Module,
    calibration: Sequence[Batch],
    metric: Metric,
    steps: Iterable[Step],
    *,
    resume: Path | None = None,
    progress: Callable[[int, str | None], object] | None = None,
) -> list[Row]:
    """Quantizes the model by every step's recipe and measures it; equal recipes are measured once.

    Args:
        model: float model in eval mode; it is not changed.
        calibration: batches as for `mq_ao.quantize`, not of the data that `metric` measures on.
        metric: what is measured.
        steps: what to do, see `all_steps`.
        resume: JSON lines of finished measurements. Those for the same recipe, model, data and versions are taken from
            it, and every new one is added to it at once.
        progress: called with 0 and the step's name before a step, and with 1 and None after it.

    Returns:
        One row a step, in the order of the steps.

    Raises:
        MqAoError: see `mq_ao.quantize`; or `resume` is not a file of measurements or cannot be written.
    """
    advance = progress or (lambda count, what: None)
    data = _data(model, calibration, metric)
    finished = {} if resume is None else read_finished(resume)
    rows = []
    for step in steps:
        advance(0, f"{step.name}, W{step.bits}A8")
        key = _digest([data, _definition(step.recipe)])
        if key not in finished:
            finished[key] = metric(api.quantize(model, calibration, step.recipe).converted)
            if resume is not None:
                _write_finished(resume, finished)
        rows.append(Row(step.name, step.group, step.bits, finished[key]))
        advance(1, None)
    return rows


def read_finished(path: Path) -> dict[str, Measured]:
    """Measurements by key; none if there is no such file.

    Raises:
        MqAoError: the file is not what `ablate` writes.
    """
    if not path.exists():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return {row.pop("key"): Measured(**row) for row in rows}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MqAoError(f"{path} does not hold rows of an ablation: name another file to resume from.") from error


def _write_finished(path: Path, finished: dict[str, Measured]) -> None:
    lines = (json.dumps({"key": key, **asdict(measured)}) + "\n" for key, measured in finished.items())
    write_atomically(path, "".join(lines).encode())


def _definition(recipe: Recipe) -> str:
    """Everything about a recipe but its name, defaults of its passes included."""
    roles = sorted((str(role), repr(spec)) for role, spec in recipe.scheme.roles.items())
    return f"{recipe.passes!r} {roles!r}"


def _data(model: nn.Module, calibration: Sequence[Batch], metric: Metric) -> str:
    """Of model, data and versions."""
    parts: list[Tensor | str] = [__version__, torch.__version__, torchao.__version__, metric.fingerprint]
    for name, tensor in model.state_dict().items():
        parts += [name, tensor]
    for batch in calibration:
        parts += ["batch", *(batch if isinstance(batch, tuple) else (batch,))]
    return _digest(parts)


def _digest(parts: Iterable[Tensor | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(b"\0")
    return digest.hexdigest()
