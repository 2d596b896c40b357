"""Searches the precision of every linear that keeps a budget, and quantizes by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mq_ao import api
from mq_ao.backends import NATIVE
from mq_ao.budget.bisection import first_passing
from mq_ao.budget.knapsack import Item, pareto_front
from mq_ao.budget.parsing import Budget, Quantity, parse_budget
from mq_ao.budget.scoring import joined, score
from mq_ao.budget.sensitivity import (
    Inputs,
    Keeping,
    Sensitivities,
    float_logits,
    kept_in,
    measure_sensitivities,
    nothing_kept,
)
from mq_ao.budget.simulation import SimulatedGraph, switchable
from mq_ao.budget.sites import Choice, Site, chosen_recipe, find_sites, uniform
from mq_ao.errors import MqAoError
from mq_ao.graph import match
from mq_ao.lowering.language_graphs import find_states
from mq_ao.measuring import Measured, digests
from mq_ao.models.program_interface import LanguageProgram
from mq_ao.modes import plain
from mq_ao.progress import with_bar
from mq_ao.quantized import QuantizedModel
from mq_ao.quantizer import Activation
from mq_ao.quantizer.planning import weight_requests
from mq_ao.quantizer.specs import LINEAR_ROLES
from mq_ao.recipes import Recipe, get_recipe
from mq_ao.rewritten import Rewritten
from mq_ao.statistics import ChannelStatistics, Request, collect
from mq_ao.turns import in_turn

BASE = "mambaquant-w4a8"
"""The recipe that a search starts from."""
SENSITIVITY_TOKENS = 4096
"""Tokens that every choice for a linear runs on, which is most of what a search computes."""


@dataclass(frozen=True)
class Candidate:
    """One precision for every site.

    Attributes:
        size: of the weights of its program, as a share of those of the float32 model.
        predicted: divergence, from sensitivities that are taken to add up, nats a token.
        choices: of every site.
        measured: what was measured of all of them together; None: nothing yet.
    """

    size: float
    predicted: float
    choices: Mapping[Site, Choice]
    measured: Measured | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        budget: that was to be kept.
        recipe: which keeps it; `mq_ao.recipe_files.to_yaml` writes it.
        quantized: the model by that recipe.
        chosen: its precisions, with what was measured of the quantized model.
        front: candidates of which no other one is predicted to be as small and lose less, by increasing size.
        uniform: candidates with one width for all sites, and the base recipe's, by name; measured.
        program: the native program of `quantized`, whose weights were counted.
    """

    budget: Budget
    recipe: Recipe
    quantized: QuantizedModel
    chosen: Candidate
    front: tuple[Candidate, ...]
    uniform: Mapping[str, Candidate]
    program: LanguageProgram

    @property
    def loss(self) -> float:
        """Relative increase of the cost that was measured of the chosen candidate."""
        assert self.chosen.measured is not None, "the chosen candidate is measured"
        return self.chosen.measured.change


@in_turn
def search_budget(
    model: nn.Module | str | Path,
    calibration: Sequence[Tensor],
    validation: Sequence[Tensor],
    budget: str | Budget,
    recipe: str | Path | Recipe = BASE,
    *,
    resume: Path | None = None,
    progress: bool = False,
) -> Found:
    """Quantizes a language model within a limit of size or loss, each linear by itself.

    The divergence KL(float || quantized) that every choice for every linear causes by itself is measured: weights of 4
    bits in groups of 64, of 128 and of whole rows, of 8 bits, or float, and activations that are static or per token.
    They are taken to add up, and an exact knapsack gives the smallest sum for every size.
    The point that keeps the budget is measured as a whole: sensitivities only add up nearly. For a limit of the loss
    the smallest one is taken that keeps it when measured.

    Sizes are those of native programs' weights, scales and everything else that is not linear included.

    Args:
        model: see `mq_ao.quantize`: a language model.
        calibration: token ids (batch, length) int64, a batch each, as for `mq_ao.quantize`.
        validation: other ones, that sensitivities and losses are measured on. Not data that the result is evaluated
            on: it is chosen by them.
        budget: such as "size<=0.20" or "loss<=0.5%"; see `parse_budget`.
        recipe: where the search starts: its passes, its precision of all that is no linear, and how its 4-bit weights
            are rounded. Linears that it leaves in float stay so.
        resume: folder for sensitivities, one file a batch, which is made if need be; what is there of an earlier run
            with the same model, data and recipe is taken from it.
        progress: show progress bars on stderr.

    Raises:
        MqAoError: see `mq_ao.quantize`; or the budget cannot be kept, and the message says what can; or the model is no
            language model.
    """
    limit = parse_budget(budget) if isinstance(budget, str) else budget
    chosen = get_recipe(recipe)
    _check_activations(chosen)
    _check(validation)
    with plain():
        rewritten = api.rewrite(model, calibration, chosen, progress=progress)
        search = _Search.begin(rewritten, chosen, validation, progress)
        kept: Keeping = nothing_kept
        if resume is not None:
            model_digest, recipe_digest = digests.of_model(rewritten.source.graph), digests.of_recipe(chosen)
            kept = kept_in(resume, model_digest, digests.of_batches(calibration), recipe_digest)
        return search.run(limit, kept)


@dataclass(frozen=True, eq=False)
class _Search:
    """What one search goes by.

    Attributes:
        rewritten: the float graph.
        recipe: where it starts.
        statistics: for every rounding that is tried.
        sites: where there is something to choose.
        simulated: runs any choice.
        batches: inputs of the graph to measure on.
        float_bytes: weights of the float32 model.
        fixed_bytes: weights of the native program that are no site's.
        progress: show progress bars on stderr.
    """

    rewritten: Rewritten
    recipe: Recipe
    statistics: Mapping[str, ChannelStatistics]
    sites: Sequence[Site]
    simulated: SimulatedGraph
    batches: Sequence[Inputs]
    float_bytes: int
    fixed_bytes: int
    progress: bool

    @classmethod
    def begin(cls, rewritten: Rewritten, recipe: Recipe, validation: Sequence[Tensor], progress: bool) -> _Search:
        """Finds the sites, collects statistics for all of their roundings at once, and prepares what is run."""
        graph = rewritten.source.graph
        batches = _inputs(graph, validation)
        quantizer = recipe.quantizer(NATIVE.name)
        sites = find_sites(graph, quantizer, recipe)
        if not sites:
            raise MqAoError(f"{recipe.name} quantizes no linear whose weight is its own: there is nothing to choose.")
        statistics = _statistics(rewritten, quantizer.requests(graph), sites, progress)
        plainly = switchable(recipe, sites)
        prepared = rewritten.copied().prepared(plainly, plainly.quantizer(NATIVE.name), statistics, progress)
        simulated = SimulatedGraph(prepared.graph, graph, sites, statistics)
        program = prepared.quantized().lower()
        fixed_bytes = program.weight_bytes - sum(site.size(site.widths[0]) for site in sites)
        float_bytes = sum(item.size for item in rewritten.source.stored)
        return cls(rewritten, recipe, statistics, sites, simulated, batches, float_bytes, fixed_bytes, progress)

    def run(self, budget: Budget, kept: Keeping) -> Found:
        """Measures sensitivities, chooses, and measures what was chosen."""
        graph, few = self.rewritten.source.graph, _first(self.batches, SENSITIVITY_TOKENS)
        found = measure_sensitivities(graph, self.simulated, self.sites, few, kept=kept, progress=self.progress)
        front = self._front(found)
        named: dict[str, Mapping[Site, Choice]] = {
            self.recipe.name: {site: site.base for site in self.sites},
            "8 bits": uniform(self.sites, 8),
            "4 bits, groups of 64": uniform(self.sites, 4, 64),
            "4 bits, one scale a row": uniform(self.sites, 4),
        }
        candidates = [self._candidate(found, choices) for choices in named.values()]
        measured = self._measured(candidates, "measuring uniform precisions")
        within: Sequence[Candidate] = front
        if budget.quantity is Quantity.LOSS:
            within = self._within_loss(front, budget.limit, measured[0])
        chosen, recipe, quantized, program = self._quantized(within, budget)
        return Found(
            *(budget, recipe, quantized, chosen, tuple(front)),
            *(dict(zip(named, measured, strict=True)), program),
        )

    def _candidate(self, found: Sensitivities, choices: Mapping[Site, Choice]) -> Candidate:
        size = self.fixed_bytes + sum(site.size(choice) for site, choice in choices.items())
        added = sum(found.added(site, choice) for site, choice in choices.items())
        return Candidate(size / self.float_bytes, found.base.mean_divergence + added, choices)

    def _front(self, found: Sensitivities) -> list[Candidate]:
        """What is not beaten as far as sensitivities say, by increasing size."""
        options = [found.best(site) for site in self.sites]
        items = [
            [Item(site.size(choice), found.added(site, choice)) for choice in choices]
            for site, choices in zip(self.sites, options, strict=True)
        ]
        front = []
        for point in pareto_front(items):
            chosen = [choices[index] for choices, index in zip(options, point.chosen, strict=True)]
            front.append(self._candidate(found, dict(zip(self.sites, chosen, strict=True))))
        return front

    def _measured(self, candidates: Sequence[Candidate], what: str = "measuring") -> list[Candidate]:
        """The same, measured in simulated integers on all batches."""
        graph = self.rewritten.source.graph
        parts: list[list[Measured]] = []
        for inputs in with_bar(self.batches, what, self.progress):
            reference = float_logits(graph, inputs)
            logits = (self.simulated.logits(inputs, candidate.choices) for candidate in candidates)
            parts.append([score(reference, one, inputs[0]) for one in logits])
        found = map(joined, zip(*parts, strict=True))
        return [replace(candidate, measured=one) for candidate, one in zip(candidates, found, strict=True)]

    def _within_loss(self, front: Sequence[Candidate], limit: float, like: Candidate) -> Sequence[Candidate]:
        """The front from the smallest candidate on that keeps a limit of the loss when measured.

        Args:
            front: by increasing size.
            limit: of the loss.
            like: a measured candidate, whose loss is to its divergence as that of others is, more or less.

        Raises:
            MqAoError: not even the largest one keeps it.
        """

        def keeps(index: int) -> bool:
            return _change(self._measured(front[index : index + 1], "measuring whether the loss is kept")[0]) <= limit

        last = len(front) - 1
        if not keeps(last):
            raise MqAoError(
                f"a loss of {limit:.3%} cannot be kept even with every linear at its best, for what {self.recipe.name} "
                "quantizes beside them: allow more, or start from another recipe."
            )
        ratio = _change(like) / like.predicted
        guess = next((index for index, one in enumerate(front) if one.predicted * ratio <= limit), last)
        return front[first_passing(keeps, len(front), guess) :]

    def _quantized(
        self, front: Sequence[Candidate], budget: Budget
    ) -> tuple[Candidate, Recipe, QuantizedModel, LanguageProgram]:
        """The candidate that keeps the budget once it is quantized and lowered, by its recipe alone."""
        by_size = budget.quantity is Quantity.SIZE
        allowed = budget.limit if by_size else math.inf
        for candidate in reversed(front) if by_size else front:
            if candidate.size > allowed:
                continue
            recipe = chosen_recipe(self.recipe, f"{self.recipe.name}, {budget}", candidate.choices)
            prepared = self.rewritten.copied().prepared(
                recipe, recipe.quantizer(NATIVE.name), self.statistics, self.progress
            )
            quantized = prepared.quantized()
            program = quantized.lower()
            found = replace(
                candidate, size=program.weight_bytes / self.float_bytes, measured=self._of(quantized.converted)
            )
            if (found.size if by_size else _change(found)) <= budget.limit:
                return found, recipe, quantized, program
            # Kernels pad odd shapes, and pieces of a linear are padded by themselves.
            allowed = min(allowed, budget.limit - (found.size - candidate.size)) if by_size else allowed
        smallest = front[0].size + max(0.0, budget.limit - allowed)
        raise MqAoError(
            f"{budget} cannot be kept: the smallest program that this search knows has {smallest:.4f} of the float32 "
            "model's bytes."
        )

    def _of(self, converted: GraphModule) -> Measured:
        """Of a converted graph, on all batches."""
        graph = self.rewritten.source.graph
        return joined(
            score(float_logits(graph, inputs), float_logits(converted, inputs), inputs[0])
            for inputs in with_bar(self.batches, "measuring the result", self.progress)
        )


def _inputs(graph: GraphModule, validation: Sequence[Tensor]) -> list[Inputs]:
    """Token ids as inputs of a language model's graph, with states where it takes them.

    Raises:
        MqAoError: it is no language model.
    """
    states = find_states(graph)
    given = len(graph.graph.find_nodes(op="placeholder"))
    if not match(graph).heads or (states is None and given != 1):
        raise MqAoError("a budget search needs a language model, which takes token ids and predicts the next ones.")
    return [(ids, *(states.examples(len(ids), 0) if states is not None else ())) for ids in validation]


def _check_activations(recipe: Recipe) -> None:
    """Raises MqAoError if linears have activations that a search does not choose from."""
    linears = [spec for scheme in recipe.schemes for role, spec in scheme.roles.items() if role in LINEAR_ROLES]
    if any(spec.activation_bits != 8 or spec.activation is Activation.PER_GROUP for spec in linears):
        raise MqAoError(
            f"{recipe.name} has activations of 4 bits or with a scale a group, which a budget search does not choose "
            "from: start from a recipe whose activations have 8 bits."
        )


def _check(validation: Sequence[Tensor]) -> None:
    for ids in validation:
        if ids.dim() != 2 or ids.shape[1] < 2 or ids.dtype != torch.int64:
            raise MqAoError(f"validation is {tuple(ids.shape)} {ids.dtype}: give int64 ids (batch, 2 or more).")
    if sum(len(ids) for ids in validation) < 2:
        raise MqAoError("validation has fewer than two sequences: give more, for losses to have an interval.")


def _first(batches: Sequence[Inputs], tokens: int) -> list[Inputs]:
    """As many batches as hold so many tokens, spread evenly."""
    count = min(len(batches), max(1, round(tokens / batches[0][0].numel())))
    return [batches[index * len(batches) // count] for index in range(count)]


def _statistics(
    rewritten: Rewritten, requests: Sequence[Request], sites: Sequence[Site], progress: bool
) -> Mapping[str, ChannelStatistics]:
    """What the recipe needs, and every rounding of every site."""
    graph = rewritten.source.graph
    nodes = {node.name: node for node in graph.graph.nodes}
    asked = list(requests)
    for site in sites:
        for name in site.nodes:
            asked += [request for spec in site.widths for request in weight_requests(nodes[name], spec)]
    return collect(graph, asked, rewritten.batches, progress=progress) if asked else {}


def _change(candidate: Candidate) -> float:
    assert candidate.measured is not None, "only measured candidates are asked"
    return candidate.measured.change
