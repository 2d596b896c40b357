"""The cost of a whole model from that of small ones.

Cost is a constant, plus the same for every layer, plus the same for every row of the vocabulary. So graphs of one and
two layers and of two small vocabularies say that of any number, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch.fx import GraphModule

from mq_ao.errors import MqAoError
from mq_ao.lowering.cuda.decode_graph import one_token
from mq_ao.lowering.language_graphs import states_of
from mq_ao.models.config import Mamba2Config, MambaConfig
from mq_ao.recipes import Recipe
from mq_ao.roofline.cost import LINEARS, Cost
from mq_ao.roofline.devices import Device
from mq_ao.roofline.fusing import ACTIVATIONS, JOINS, NORMS, Kernel, kernels
from mq_ao.roofline.lowered import ROLE, float_graph, integer_graph
from mq_ao.roofline.values import values

Config = MambaConfig | Mamba2Config
Counts = Mapping[tuple[str, str], Cost]
"""Cost by (role, operator): kernels of one kind together."""

_VOCABULARY = 1024
_ROLES = {
    "mq_ao.causal_conv1d": "conv1d",
    "mq_ao.qcausal_conv1d": "conv1d",
    "mq_ao.selective_scan": "scan",
    "mq_ao.qselective_scan": "scan",
    "mq_ao.ssd_scan": "scan",
    "mq_ao.qssd_scan": "scan",
    "mq_ao.scan_states": "scan",
    "mq_ao.int8_gate": "gate",
    "mq_ao.hadamard": "rotation",
    "mq_ao.int8_rms_norm": "norm",
}
ORDER = (
    "embedding",
    "norm",
    "in_proj",
    "conv1d",
    "x_proj",
    "dt_proj",
    "scan",
    "gate",
    "rotation",
    "out_proj",
    "linear",
    "pointwise",
    "states",
    "head",
)
"""Roles in the order of the dataflow."""


@dataclass(frozen=True)
class Counted:
    """A model's cost at two lengths.

    Attributes:
        prefill: of a prompt; the head gives the last token's logits alone.
        decode: of one step.
    """

    prefill: Counts
    decode: Counts


def count_model(config: Config, recipe: Recipe | None, batch: int, tokens: int, device: Device) -> Counted:
    """Counts a model of any size.

    Args:
        config: the model's shape.
        recipe: how it is quantized for CUDA, from `at_run_time`; None: fp16.
        batch: sequences.
        tokens: of the prompt.
        device: what it runs on: kernels may depend on its size.

    Raises:
        MqAoError: the backend has no kernel for what the recipe asks for, or the graph has an operator of unknown cost.
    """
    build: Callable[[Config], GraphModule] = float_graph if recipe is None else lambda c: integer_graph(c, recipe)
    prompts, steps = [], []
    for layers, vocabulary in ((2, 1), (3, 1), (2, 2)):
        graph = build(replace(config, n_layer=layers, vocab_size=vocabulary * _VOCABULARY))
        prompts.append(count(graph, batch, tokens, device))
        steps.append(count(one_token(graph, states_of(graph)), batch, 1, device))
    return Counted(_affine(config, *prompts), _affine(config, *steps))


def count(module: GraphModule, batch: int, length: int, device: Device) -> Counts:
    """Cost of every kind of kernel in one graph."""
    found: dict[tuple[str, str], Cost] = {}
    for kernel in kernels(module, values(module, batch, length), device):
        key = role_of(kernel), kernel.operators[0] if len(kernel.operators) == 1 else "fused"
        found[key] = found.get(key, Cost()) + kernel.cost
    return found


def role_of(kernel: Kernel) -> str:
    """What a kernel is for."""
    names = frozenset(kernel.operators)
    for node in kernel.nodes:
        if names & LINEARS and ROLE in node.meta:
            return str(node.meta[ROLE])
    for found, role in ((NORMS, "norm"), (ACTIVATIONS, "gate"), ({"aten.embedding"}, "embedding"), (JOINS, "states")):
        if names & found:
            return role
    return _ROLES.get(kernel.operators[0].removesuffix("_"), "linear" if names & LINEARS else "pointwise")


def _affine(config: Config, base: Counts, layer: Counts, rows: Counts) -> Counts:
    """`base` plus what a second layer adds, and what more of the vocabulary adds, as often as there is more."""
    result = {}
    for key in dict.fromkeys((*base, *layer, *rows)):
        one = base.get(key, Cost())
        each, wider = (counts.get(key, Cost()).plus(one, -1) for counts in (layer, rows))
        more = {name: value * (config.vocab_size - _VOCABULARY) for name, value in vars(wider).items()}
        if any(value % _VOCABULARY for value in more.values()):
            raise MqAoError(f"the cost of {key[0]} is not proportional to the vocabulary: nothing can be predicted.")
        slope = Cost(**{name: value // _VOCABULARY for name, value in more.items()})
        result[key] = one.plus(each, config.n_layer - 2) + slope
    return result
