"""Lowered graphs of small models with real widths, whose cost says that of the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from mq_ao import passes
from mq_ao.api import capture
from mq_ao.calibration import calibrate
from mq_ao.errors import MqAoError
from mq_ao.graph import match, walk
from mq_ao.lowering import cuda
from mq_ao.lowering.integer_graph import fold_constants
from mq_ao.lowering.language_graphs import with_positions
from mq_ao.models import MambaLM
from mq_ao.models.config import Mamba2Config, MambaConfig
from mq_ao.models.mamba2 import language_model
from mq_ao.passes import Pass
from mq_ao.passes.expose_state import ExposeState
from mq_ao.passes.fold_norm import FoldNorm
from mq_ao.passes.rotate_out_proj import RotateOutProj
from mq_ao.passes.rotate_state import RotateState
from mq_ao.passes.smooth_gate import SmoothGate
from mq_ao.passes.smooth_norm import SmoothNorm
from mq_ao.quantizer import MambaQuantizer, QuantizationConfig, Range, Rounding
from mq_ao.recipes import Recipe

ROLE = "mq_ao_role"
"""Key of a node's role in its meta."""


@dataclass(frozen=True)
class _RotateInput(RotateOutProj):
    """The transform without the weight's part, which takes long for wide models and costs nothing at run time."""

    def apply(self, rewrite: passes.Rewrite) -> None:
        """Rotates every block's out_proj input."""
        for block in rewrite.blocks:
            with self.where_suitable(rewrite, block.name):
                rewrite.rotate_input(block.out_proj, block.out_input)


_AT_RUN_TIME: Mapping[type[Pass], Pass] = {
    FoldNorm: FoldNorm(),  # a head that was the embedding's becomes a matrix of its own
    SmoothNorm: SmoothNorm(),  # likewise
    SmoothGate: SmoothGate(),
    RotateOutProj: _RotateInput(),
    ExposeState: ExposeState(),
    RotateState: RotateState(),
}
"""Passes that change which operators run on what, and what stands for them. The others change values alone."""


def at_run_time(recipe: Recipe) -> Recipe:
    """What of a recipe is seen in the lowered graph: how ranges and weights were chosen is not.

    Raises:
        MqAoError: the recipe names modules, which graphs of other shapes do not have.
    """
    if recipe.modules:
        raise MqAoError(f"{recipe.name} names modules of one model: give a recipe that says all by role.")
    roles = {
        role: replace(spec, range=Range.MIN_MAX, rounding=Rounding.NEAREST)
        for role, spec in recipe.scheme.roles.items()
    }
    kept = tuple(_AT_RUN_TIME[type(item)] for item in recipe.passes if type(item) in _AT_RUN_TIME)
    return Recipe("at run time", QuantizationConfig(roles), kept)


def float_graph(config: MambaConfig | Mamba2Config, model: MambaLM | None = None) -> GraphModule:
    """The graph of a model with fp16 weights and activations; states are fp32.

    Args:
        config: its shape.
        model: it, in fp16; None: one with random weights.
    """
    module = capture(model or random_model(config).half(), ())
    _name_roles(module)
    module = with_positions(module)
    fold_constants(module)
    return module


def integer_graph(config: MambaConfig | Mamba2Config, recipe: Recipe, model: MambaLM | None = None) -> GraphModule:
    """The graph of a model quantized by what `at_run_time` gives and lowered for CUDA.

    Args:
        config: its shape.
        recipe: how it is quantized.
        model: it, in fp32; None: one with random weights.

    Raises:
        MqAoError: the backend has no kernel for what the recipe asks for.
    """
    quantizer = MambaQuantizer("cuda").set_global(recipe.scheme)
    model = model or random_model(config)
    inputs = [(torch.arange(4)[None], *model.initial_states(1))]
    module = capture(model, ())
    passes.apply(module, recipe.passes, inputs)
    _name_roles(module)
    if requests := quantizer.requests(module):
        quantizer.set_statistics(passes.collect(module, requests, inputs))
    prepared = prepare_pt2e(module, quantizer)
    calibrate(prepared, inputs)
    converted = convert_pt2e(prepared, fold_quantize=False)  # weights are integers already
    return cuda.rewrite(with_positions(converted)).module


def random_model(config: MambaConfig | Mamba2Config) -> MambaLM:
    """A model of a shape, with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return language_model(config).eval()


def _name_roles(module: GraphModule) -> None:
    """Notes in each node what it is, and in its pieces; lowerings keep the meta of what they replace."""
    for role, node in match(module).by_role():
        for item in (node, *_pieces(node)):
            item.meta[ROLE] = str(role)


def _pieces(node: Node) -> Iterator[Node]:
    for user in node.users:
        if user.target in walk.TRANSPARENT:
            yield user
            yield from _pieces(user)
