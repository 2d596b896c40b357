"""Lowered graphs of small models with real widths, whose cost says that of the whole model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from mq_ao import passes
from mq_ao.api import capture
from mq_ao.calibrate import calibrate
from mq_ao.graph import match
from mq_ao.lowering import cuda
from mq_ao.lowering.graphs import with_positions
from mq_ao.lowering.integer_graph import fold_constants
from mq_ao.models.config import Mamba2Config, MambaConfig
from mq_ao.models.mamba2 import language_model
from mq_ao.passes.expose_state import ExposeState
from mq_ao.passes.rotate_out_proj import RotateOutProj
from mq_ao.passes.rotate_state import RotateState
from mq_ao.passes.smooth_gate import SmoothGate
from mq_ao.quantizer import MambaQuantizer, QuantizationConfig, Range, Rounding
from mq_ao.recipes import RECIPES, Recipe

ROLE = "mq_ao_role"
"""Key of a node's role in its meta."""
_AT_RUN_TIME = (SmoothGate, RotateOutProj, ExposeState, RotateState)
"""Passes that leave operators in the graph. The others change weights alone."""


def at_run_time(recipe: Recipe) -> Recipe:
    """What of a recipe is seen in the lowered graph: how ranges and weights were chosen is not."""
    roles = {
        role: replace(spec, range=Range.MIN_MAX, rounding=Rounding.NEAREST)
        for role, spec in recipe.scheme.roles.items()
    }
    kept = tuple(item for item in recipe.passes if isinstance(item, _AT_RUN_TIME))
    return Recipe("", QuantizationConfig(roles), kept)


def float_graph(config: MambaConfig | Mamba2Config) -> GraphModule:
    """The graph of a model with fp16 weights and activations; states are fp32."""
    module = capture(_random(config).half(), ())
    _name_roles(module)
    module = with_positions(module)
    fold_constants(module)
    return module


def integer_graph(config: MambaConfig | Mamba2Config, recipe: Recipe) -> GraphModule:
    """The graph of a model with random weights, quantized and lowered for CUDA.

    Raises:
        MqAoError: the backend has no kernel for what the recipe asks for.
    """
    seen = at_run_time(recipe)
    quantizer = MambaQuantizer("cuda").set_global(seen.scheme, partial=recipe in RECIPES.values())
    model = _random(config)
    inputs = [(torch.arange(4)[None], *model.initial_states(1))]
    module = capture(model, ())
    passes.apply(module, seen.passes, inputs)
    _name_roles(module)
    if requests := quantizer.requests(module):
        quantizer.set_statistics(passes.collect(module, requests, inputs))
    prepared = prepare_pt2e(module, quantizer)
    calibrate(prepared, inputs)
    converted = convert_pt2e(prepared, fold_quantize=False)  # weights are integers already
    return cuda.lower(with_positions(converted)).module


def _random(config: MambaConfig | Mamba2Config) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return language_model(config).eval()


def _name_roles(module: GraphModule) -> None:
    """Notes in each node what it is; lowerings keep the meta of what they replace."""
    for role, node in match(module).by_role():
        node.meta[ROLE] = str(role)
