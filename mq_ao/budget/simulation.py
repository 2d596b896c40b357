"""One graph that simulates every choice: sites are switched while it runs, and alternatives share what comes before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from mq_ao.budget.sites import Choice, Site
from mq_ao.graph import walk
from mq_ao.graph.views import Linear
from mq_ao.quantizer import Activation, RoleSpec, Rounding
from mq_ao.quantizer.annotator import copied
from mq_ao.quantizer.observers import PlannedWeight
from mq_ao.quantizer.planning import plan_weight
from mq_ao.quantizer.weights import QuantizedWeight
from mq_ao.recipe import Recipe, Roles
from mq_ao.statistics import ChannelStatistics
from mq_ao.training.fake_quantizers import RoundedTokens, fake_quantizer


def switchable(recipe: Recipe, sites: Sequence[Site]) -> Recipe:
    """The recipe that a graph is prepared by in which sites can be switched: each has a static range, if it has any."""
    roles = {site.role for site in sites}

    def plain(given: Roles) -> dict[Any, Choice]:
        return {role: _plain(spec) if spec and role in roles else spec for role, spec in given.items()}

    modules = {name: plain(given) for name, given in recipe.modules.items()}
    scheme = recipe.scheme.replaced(**{str(role): spec for role, spec in plain(recipe.scheme.roles).items()})
    return replace(recipe, scheme=scheme, modules=modules)


class SimulatedGraph(Interpreter):
    """A language model's graph in simulated integers, of which each site is quantized as it is told.

    It computes what the graph of `quantize` computes, up to the last bits of float arithmetic.

    Args:
        prepared: by the recipe of `switchable`, and calibrated.
        source: the float graph that was prepared, with its weights.
        sites: what can be switched.
        statistics: of that graph, for roundings that learn.
    """

    def __init__(
        self,
        prepared: GraphModule,
        source: GraphModule,
        sites: Sequence[Site],
        statistics: Mapping[str, ChannelStatistics],
    ) -> None:
        graph = copied(prepared)
        self._site = {name: site for site in sites for name in site.nodes}
        self._static: dict[str, nn.Module] = {}
        for name in dict.fromkeys(str(node.target) for node in _observed(graph)):
            observer = graph.get_submodule(name)
            rounded = _Rounded(observer.weight) if isinstance(observer, PlannedWeight) else fake_quantizer(observer)
            graph.set_submodule(name, rounded)
        for node in walk.calls(graph, walk.LINEAR):
            if node.name in self._site:
                self._free(graph, node)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        super().__init__(graph)
        self.extra_traceback = False
        self._order = list(graph.graph.nodes)
        (output,) = graph.graph.find_nodes(op="output")
        results: Any = output.args[0]
        self._logits: Node = results[0] if isinstance(results, tuple | list) else results
        self._source = {node.name: node for node in source.graph.nodes}
        self._float, self._statistics = source, statistics
        self._planned: dict[tuple[str, int, int | None, Rounding], QuantizedWeight] = {}
        self._choices: dict[Site, Choice] = {}
        self._tokens = RoundedTokens(symmetric=True)  # as native programs round them

    @torch.no_grad()
    def logits(self, inputs: Sequence[Any], choices: Mapping[Site, Choice]) -> Tensor:
        """The graph's first output, (batch, length, vocabulary)."""
        return next(self.branches(inputs, choices, ()))

    @torch.no_grad()
    def branches(
        self, inputs: Sequence[Any], choices: Mapping[Site, Choice], others: Sequence[tuple[Site, Choice]]
    ) -> Iterator[Tensor]:
        """The logits of each of the `others`, which switches one site, and last those without any of them.

        What comes before a switched site is run once for all. They come in the order of the sites in the graph, see
        `ordered`, and those of one site in their order.

        Args:
            inputs: positional inputs of the graph.
            choices: how every site is quantized.
            others: a site, and how it is quantized instead.
        """
        self._choices = dict(choices)
        self.args_iter = iter(self.graph.process_inputs(*inputs))
        env: dict[Node, Any] = {}
        for index, node in enumerate(self._order):
            site = self._site.get(node.name)
            if site is not None and node.name == site.nodes[0]:
                for other, choice in others:
                    if other is site:
                        self._choices[site] = choice
                        yield self._run(dict(env), index)
                        self._choices[site] = choices[site]
            if node is self._logits:
                yield self._run(env, index)
                return
            self._step(env, node)

    def ordered(self, sites: Sequence[Site]) -> list[Site]:
        """Sites in the order in which `branches` comes to them."""
        first = {node.name: index for index, node in enumerate(self._order)}
        return sorted(sites, key=lambda site: first[site.nodes[0]])

    def run_node(self, n: Node) -> Any:
        """Runs a node; a site's linear as it is quantized now."""
        site = self._site.get(n.name)
        return super().run_node(n) if site is None else self._linear(n, self._choices[site])

    def _run(self, env: dict[Node, Any], start: int) -> Tensor:
        """The logits, from a node on."""
        for node in self._order[start:]:
            self._step(env, node)
            if node is self._logits:
                break
        logits: Tensor = env[self._logits]
        return logits

    def _step(self, env: dict[Node, Any], node: Node) -> None:
        self.env = env
        env[node] = self.run_node(node)
        for used in self.user_to_last_uses.get(node, ()):
            env.pop(used, None)

    def _linear(self, node: Node, choice: Choice) -> Tensor:
        given = Linear.of(node)
        x: Tensor = self.env[given.x]
        bias = None if given.bias is None else self.env[given.bias]
        if choice is None:
            return functional.linear(x, self.env[given.weight], bias)
        if choice.activation is Activation.STATIC:
            x = self._static[node.name](x)
        elif choice.activation is Activation.PER_TOKEN:
            x = self._tokens(x)
        return functional.linear(x, self._weight(node.name, choice).dequantized(), bias)

    def _weight(self, name: str, spec: RoleSpec) -> QuantizedWeight:
        key = name, spec.bits, spec.group_size, spec.rounding
        if key not in self._planned:
            self._planned[key] = plan_weight(self._float, self._source[name], spec, self._statistics)
        return self._planned[key]

    def _free(self, graph: GraphModule, node: Node) -> None:
        """Takes observers away from a linear, and keeps what stands for that of its input."""
        given = Linear.of(node)
        for name, value in (("x", given.x), ("weight", given.weight)):
            if value.op == "call_module":
                (observed,) = value.all_input_nodes
                if name == "x":
                    self._static[node.name] = graph.get_submodule(str(value.target))
                node.replace_input_with(value, observed)


class _Rounded(nn.Module):
    """A weight that is not switched."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        flat = replace(weight, values=weight.values.flatten(1)).dequantized()
        self.value = flat.view(weight.values.shape)

    def forward(self, _: Tensor) -> Tensor:
        """The rounded weight, whatever the float one is."""
        return self.value


def _observed(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if node.op == "call_module"]


def _plain(spec: RoleSpec) -> RoleSpec:
    activation = spec.activation if spec.activation is Activation.NONE else Activation.STATIC
    return replace(spec, activation=activation, bits=8, group_size=None, rounding=Rounding.NEAREST)
