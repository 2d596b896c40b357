"""Where the precision of a model can be chosen, from what, and the recipe that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import GraphModule, Node

from mq_ao.graph import Role, edit, match, walk
from mq_ao.graph.views import Layer
from mq_ao.graph.walk import module_path
from mq_ao.ops.packing import group_count, packed_bytes
from mq_ao.quantizer import Activation, MambaQuantizer, RoleSpec, Rounding
from mq_ao.quantizer.specs import LINEAR_ROLES
from mq_ao.recipe import Recipe

GROUPS = (None, 128, 64)
"""Inputs that share a scale of 4-bit weights; None: all of a row."""

Choice = RoleSpec | None
"""How a site is quantized; None leaves it in float."""

_OTHER: Mapping[Activation, tuple[Activation, ...]] = {
    Activation.NONE: (),
    Activation.STATIC: (Activation.PER_TOKEN,),
    Activation.PER_TOKEN: (Activation.STATIC,),
}


@dataclass(frozen=True)
class Site:
    """The linears of one role in one module, mostly a single one.

    Attributes:
        module: qualified name.
        role: of the linears.
        nodes: their names in the graph.
        shapes: their outputs and inputs.
        base: how the recipe that the search starts from quantizes them.
        widths: all weights that can be chosen, with the activation of `base`; 8 bits come first.
        others: 8-bit weights with the other activation, if there is one.
    """

    module: str
    role: Role
    nodes: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    base: RoleSpec
    widths: tuple[RoleSpec, ...]
    others: tuple[RoleSpec, ...]

    @property
    def name(self) -> str:
        """The module, with the role where its name does not end in it."""
        return self.module if self.module.endswith(str(self.role)) else f"{self.module} ({self.role})"

    @property
    def inputs(self) -> int:
        """Of each of its linears."""
        return self.shapes[0][1]

    def size(self, choice: Choice) -> int:
        """Bytes of its weights in a native program: integers, their scales and sums; or float32."""
        return sum(_bytes(*shape, choice) for shape in self.shapes)


def find_sites(graph: GraphModule, quantizer: MambaQuantizer, recipe: Recipe) -> list[Site]:
    """The linears of a rewritten float graph that the recipe quantizes.

    Left out are those that no module was traced for, and those whose weight something else reads too, as a head that is
    the embedding's: both have one weight.

    Args:
        graph: rewritten float graph.
        quantizer: of the recipe.
        recipe: what the search starts from; its 4-bit weights, if there are any, say how others are rounded.
    """
    rounding = next(
        (spec.rounding for scheme in recipe.schemes for spec in scheme.roles.values() if spec.bits == 4),
        Rounding.FISHER,
    )
    found: dict[tuple[str, Role], list[Node]] = {}
    readers: dict[int, set[tuple[str, Role]]] = {}
    for role, node in match(graph).by_role():
        key = module_path(node), role
        readers.setdefault(_weight(graph, node).data_ptr(), set()).add(key)
        if role in LINEAR_ROLES and node.target in walk.LINEAR and module_path(node):
            found.setdefault(key, []).append(node)
    sites = []
    for (module, role), nodes in found.items():
        base = quantizer.spec(role, nodes[0])
        alone = all(len(readers[_weight(graph, node).data_ptr()]) == 1 for node in nodes)
        if base is not None and alone:
            shapes = tuple((len(weight), weight.shape[1]) for weight in (_weight(graph, node) for node in nodes))
            widths = _widths(base, shapes[0][1], rounding)
            others = tuple(replace(widths[0], activation=kind) for kind in _OTHER[base.activation])
            sites.append(Site(module, role, tuple(node.name for node in nodes), shapes, base, widths, others))
    return sites


def chosen_recipe(recipe: Recipe, name: str, choices: Mapping[Site, Choice]) -> Recipe:
    """The recipe with other specs for some sites: by module where they differ from the scheme."""
    modules: dict[str, dict[Role, Choice]] = {module: dict(roles) for module, roles in recipe.modules.items()}
    for site, choice in choices.items():
        nested = any(other.role is site.role and _inside(site.module, other.module) for other in choices)
        if recipe.modules or nested or choice != recipe.scheme.roles.get(site.role):
            around = max((module for module in recipe.modules if _inside(site.module, module)), key=len, default="")
            modules.setdefault(site.module, dict(recipe.modules.get(around, {})))[site.role] = choice
    return Recipe(name, recipe.scheme, recipe.passes, modules)


def uniform(sites: Sequence[Site], bits: int, group: int | None = None) -> dict[Site, Choice]:
    """Every site with weights of one width and the activations of the base; where a site has no such groups, the next
    larger ones.
    """
    found: dict[Site, Choice] = {}
    for site in sites:
        groups = {spec: _grouped(spec, site.inputs) or math.inf for spec in site.widths if spec.bits == bits}
        fitting = {spec: size for spec, size in groups.items() if size >= (group or math.inf)}
        found[site] = min(fitting, key=lambda spec: fitting[spec])
    return found


def _widths(base: RoleSpec, inputs: int, rounding: Rounding) -> tuple[RoleSpec, ...]:
    """All weights, that of `base` as it is, without those that come to the same."""
    eight = replace(base, bits=8, group_size=None, rounding=Rounding.NEAREST)
    specs = [base, eight, *(replace(base, bits=4, group_size=group, rounding=rounding) for group in GROUPS)]
    different: dict[tuple[int, int], RoleSpec] = {}
    for spec in specs:
        different.setdefault((-spec.bits, _grouped(spec, inputs)), spec)
    return tuple(different[key] for key in sorted(different))


def _inside(module: str, other: str) -> bool:
    return module.startswith(f"{other}.")


def _weight(graph: GraphModule, node: Node) -> Tensor:
    return edit.constant(graph, Layer.of(node).weight)


def _grouped(spec: RoleSpec, inputs: int) -> int:
    """Inputs of a group; 0 is one scale a row, which it also is where groups do not fit or one is all of a row."""
    size = spec.group_size
    return size if size and size < inputs and inputs % size == 0 else 0


def _bytes(outputs: int, inputs: int, choice: Choice) -> int:
    if choice is None:
        return 4 * outputs * inputs
    group = _grouped(choice, inputs)
    return packed_bytes(outputs, inputs, choice.bits, group) + 4 * outputs * group_count(inputs, group)
