"""What each site loses by each of its alternatives, all others as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from mq_ao.budget.scoring import joined, score
from mq_ao.budget.simulation import SimulatedGraph
from mq_ao.budget.sites import Choice, Site
from mq_ao.errors import MqAoError
from mq_ao.files import write_atomically
from mq_ao.measuring import Measured, difference, digests
from mq_ao.progress import with_bar

Inputs = tuple[Tensor, ...]
"""Positional inputs of a graph, of which the first are token ids (batch, length)."""

Keeping = Callable[[Inputs], Path | None]
"""Where the result of a batch is kept; None: nowhere."""


@dataclass(frozen=True)
class Sensitivities:
    """What each site loses if it alone is quantized.

    Attributes:
        base: with every site in float.
        alone: with one site quantized, by site and its choice.
    """

    base: Measured
    alone: Mapping[tuple[Site, Choice], Measured]

    def added(self, site: Site, choice: Choice) -> float:
        """Divergence that a choice adds, nats a token; that of another activation is the same for all weights."""
        if choice is None:
            return 0.0
        if (site, choice) in self.alone:
            return self.alone[site, choice].mean_divergence - self.base.mean_divergence
        eight = site.widths[0]
        other = self.added(site, replace(eight, activation=choice.activation)) - self.added(site, eight)
        return self.added(site, replace(choice, activation=site.base.activation)) + other

    def best(self, site: Site) -> list[Choice]:
        """All weights, and float; with the other activation where its interval says that it is better."""
        eight = site.widths[0]
        better = (
            spec
            for spec in site.others
            if difference([self.alone[site, spec]], [self.alone[site, eight]]).divergence.high < 0
        )
        found = next(better, eight)
        return [*(replace(spec, activation=found.activation) for spec in site.widths), None]


def measure_sensitivities(
    graph: GraphModule,
    simulated: SimulatedGraph,
    sites: Sequence[Site],
    batches: Sequence[Inputs],
    *,
    kept: Keeping,
    progress: bool = False,
) -> Sensitivities:
    """Quantizes one site after the other, all others in float.

    Around float their divergences add up well: each is half a quadratic form of an error, and what two errors have in
    common averages out (docs/budget.md has figures). Around a quantized model it does not.

    Args:
        graph: the float graph.
        simulated: the same in simulated integers.
        sites: of that.
        batches: inputs of both.
        kept: file in which the result of a batch is kept, and from which it is taken if it is there.
        progress: show a progress bar on stderr.

    Raises:
        MqAoError: a file holds something else, or cannot be written.
    """
    alone = [(site, choice) for site in simulated.ordered(sites) for choice in (*site.widths, *site.others)]
    parts: list[list[Measured]] = []
    for inputs in with_bar(batches, f"measuring {len(alone)} choices", progress):
        path = kept(inputs)
        if path is not None and path.exists():
            parts.append(_read(path, len(alone) + 1))
            continue
        reference = float_logits(graph, inputs)
        in_float = dict.fromkeys(sites)
        rows = [score(reference, logits, inputs[0]) for logits in simulated.branches(inputs, in_float, alone)]
        if path is not None:
            write_atomically(path, json.dumps([vars(row) for row in rows]).encode())
        parts.append(rows)
    *measured, base = (joined(rows) for rows in zip(*parts, strict=True))
    return Sensitivities(base, dict(zip(alone, measured, strict=True)))


@torch.no_grad()
def float_logits(graph: GraphModule, inputs: Inputs) -> Tensor:
    """(batch, length, vocabulary)."""
    results = graph(*inputs)
    logits: Tensor = results[0] if isinstance(results, tuple | list) else results
    return logits


def nothing_kept(inputs: Inputs) -> Path | None:
    """Keeps nothing."""
    return None


def kept_in(folder: Path, *fixed: str) -> Keeping:
    """Names the file of a batch by a digest of it and of what else a result depends on."""
    return partial(_file, folder, digests.digest(fixed))


def _file(folder: Path, fixed: str, inputs: Inputs) -> Path:
    return folder / f"{digests.digest([fixed, inputs[0]])}.json"


def _read(path: Path, count: int) -> list[Measured]:
    try:
        rows = [Measured.parse(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, MqAoError) as error:
        raise MqAoError(f"{path} holds no sensitivities ({error}): remove it, or resume in another folder.") from error
    if len(rows) != count:
        raise MqAoError(f"{path} holds {len(rows)} measurements, not {count}: remove it, or resume in another folder.")
    return rows
