"""compressed-tensors: folders of integers that vLLM and transformers run with kernels of their own.

What is offline is folded into the weights: norms, and the rotation of the residual stream. What needs an operator of
its own is not: the rotation before out_proj, scales on the gate, the scan's integers. So this is another recipe than
the one that our own programs run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mq_ao.api import quantize
from mq_ao.errors import MqAoError
from mq_ao.extras import needs
from mq_ao.files import write_atomically
from mq_ao.graph import Role, edit, walk
from mq_ao.graph.views import Layer, Norm
from mq_ao.graph.walk import module_path
from mq_ao.lowering.patterns import Weight
from mq_ao.passes.fold_norm import FoldNorm
from mq_ao.passes.rotate_residual import RotateResidual
from mq_ao.quantizer import Activation, QuantizationConfig, RoleSpec, Rounding
from mq_ao.recipe import Recipe

_OFFLINE = (FoldNorm(), RotateResidual())
_ROLES = (Role.IN_PROJ, Role.X_PROJ, Role.OUT_PROJ, Role.LINEAR)
"""The head stays in float, as the format's readers expect it, and so do embeddings, convolutions, and dt_proj, whose
weight transformers reads itself."""
_GROUP = 64
"""Inputs that share a scale in 4 bits."""


def _recipe(name: str, spec: RoleSpec) -> Recipe:
    return Recipe(name, QuantizationConfig(dict.fromkeys(_ROLES, spec)), _OFFLINE)


class Scheme(StrEnum):
    """What the format's readers have kernels for."""

    W8A8 = "w8a8"
    """int8 weights, one scale a channel, and int8 activations, one scale a token."""
    W4A16 = "w4a16"
    """int4 weights in groups of 64, and float activations."""


RECIPES = {
    Scheme.W8A8: _recipe("compressed-tensors-w8a8", RoleSpec(Activation.PER_TOKEN)),
    Scheme.W4A16: _recipe(
        "compressed-tensors-w4a16", RoleSpec(Activation.NONE, bits=4, group_size=_GROUP, rounding=Rounding.GPTQ)
    ),
}
"""How models are quantized for this format."""


def save_pretrained(
    model: Any,
    folder: str | Path,
    calibration: Iterable[Any],
    scheme: Scheme | str = Scheme.W8A8,
    *,
    progress: bool = False,
) -> list[str]:
    """Quantizes a model of transformers, and writes it as a folder of the compressed-tensors format.

    Args:
        model: a causal language model of transformers, of a Mamba family; it is not changed.
        folder: to write: config.json with `quantization_config`, model.safetensors, generation_config.json.
        calibration: see `mq_ao.quantize`: the rotations follow from it.
        scheme: see `Scheme`.
        progress: show progress bars on stderr.

    Returns:
        Modules with weights that stay in float, as the folder's configuration names them.

    Raises:
        MqAoError: the model is no such model, it has experts in one tensor, which the format's readers do not take, it
            has linears that the scheme does not take, or the folder cannot be written.
    """
    if not hasattr(model, "generation_config"):
        raise MqAoError(f"{type(model).__name__} is no causal language model of transformers: this format is theirs.")
    try:
        scheme = Scheme(scheme)
    except ValueError:
        raise MqAoError(f"unknown scheme {scheme!r}: the schemes are {', '.join(Scheme)}.") from None
    quantized = quantize(model, calibration, RECIPES[scheme], progress=progress)
    tensors, floats, in_float = _tensors(model, quantized.converted, scheme)
    _check_same(model, floats, scheme)
    config = json.loads(model.config.to_json_string(use_diff=False))
    tied = torch.equal(*(tensors[name] for name in _ends(model)))
    config |= {"tie_word_embeddings": tied, "quantization_config": _described(scheme, in_float), "dtype": "float32"}
    config["architectures"] = [type(model).__name__]
    folder = Path(folder)
    write_atomically(folder / "model.safetensors", save_tensors(tensors, metadata={"format": "pt"}))
    write_atomically(folder / "generation_config.json", model.generation_config.to_json_string().encode())
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return in_float


def _ends(model: Any) -> tuple[str, str]:
    """Names of the weights of embedding and head."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    first, second = (next(name for name, item in model.named_modules() if item is module) for module in modules)
    return f"{first}.weight", f"{second}.weight"


def _tensors(
    model: nn.Module, graph: GraphModule, scheme: Scheme
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """What the folder holds, under the model's own names; the same in float; and the linears that stay in float."""
    tensors = {name: value.detach().float().contiguous() for name, value in model.state_dict().items()}
    layers = _layers(model, graph)
    floats: dict[str, Tensor] = {}
    in_float: list[str] = []
    for name, node in layers.items():
        given = Layer.of(node).weight
        weight = Weight.of(graph, given)
        if weight is None:
            tensors[f"{name}.weight"] = edit.constant(graph, given).float().contiguous()
            in_float += [name] if node.target in walk.LINEAR else []
        else:
            floats[f"{name}.weight"] = weight.quantized.dequantized()
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": value for part, value in _packed(weight, scheme).items()}
    for node in walk.calls(graph, walk.NORM):
        name = f"{_path(node)}.weight"
        if Norm.of(node).weight is None and name in tensors and not _is_read(graph, name):
            tensors[name] = torch.ones_like(tensors[name])
    _check_complete(model, graph, {*layers.values()})
    for name in _ends(model):
        tensors[name] = tensors[name].clone()
    own = {name: tensors[name] for name in model.state_dict() if name in tensors}
    return tensors, own | floats, in_float


@torch.no_grad()
def _check_same(model: Any, weights: Mapping[str, Tensor], scheme: Scheme) -> None:
    """Raises MqAoError unless the model with the folder's weights computes about what it computed."""
    ids = torch.arange(16)[None] % model.get_input_embeddings().num_embeddings
    exact = model(ids, use_cache=False).logits.float()
    rounded = copy.deepcopy(model).float()
    head = rounded.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # no longer the embedding's
    rounded.load_state_dict(weights)
    error = float((rounded(ids, use_cache=False).logits - exact).norm() / exact.norm())
    # What rounding alone does to small random models; another function is off by 1 or more.
    if not error < {Scheme.W8A8: 0.3, Scheme.W4A16: 0.8}[scheme]:
        raise MqAoError(
            f"with the weights of this format {type(model).__name__} computes something else ({error:.2f} off): it "
            "reads them in a way that is not known here, and no folder is written."
        )


def _layers(model: nn.Module, graph: GraphModule) -> dict[str, Node]:
    """Calls of linears and embeddings by the names of the model's modules."""
    modules = list(model.named_modules(remove_duplicate=False))
    shapes = {name: item.weight.shape for name, item in modules if isinstance(item, nn.Linear | nn.Embedding)}
    if len(shapes) > len({id(item) for name, item in modules if name in shapes}):
        raise MqAoError("the model has one module in several places, which this format does not hold.")
    found: dict[str, Node] = {}
    rest: list[Node] = []
    for node in walk.calls(graph, walk.LINEAR | walk.EMBEDDING | walk.EXPERTS):
        if node.target in walk.EXPERTS:
            raise MqAoError("a mixture of experts has its weights in one tensor, which this format does not hold.")
        names = (_own_name(Layer.of(node).weight).removesuffix(".weight"), _path(node))
        name = next((name for name in names if name in shapes and name not in found), None)
        if name is None:
            rest.append(node)
        else:
            found[name] = node
    for node in rest:
        # Called without its module, as transformers does with dt_proj.
        weight = Layer.of(node).weight
        packed = Weight.of(graph, weight)
        shape = edit.constant(graph, weight).shape if packed is None else packed.values.shape
        inside = [name for name in shapes if name.startswith(f"{_path(node)}.") and shapes[name] == shape]
        unclaimed = [name for name in inside if name not in found]
        if len(unclaimed) != 1:
            raise MqAoError(f"{_path(node)} has a linear that is no module, which this format does not hold.")
        found[unclaimed[0]] = node
    return found


def _packed(weight: Weight, scheme: Scheme) -> dict[str, Tensor]:
    if scheme is Scheme.W8A8:
        return {"weight": weight.values.contiguous(), "weight_scale": weight.scale[:, None].contiguous()}
    with needs("4-bit weights of this format", "compressed"):
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if not weight.group_size:
        raise MqAoError(
            f"a linear has {weight.values.shape[1]} inputs, and w4a16 takes multiples of {_GROUP}: use w8a8."
        )
    return {
        "weight_packed": pack_to_int32(weight.values, weight.bits).contiguous(),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.values.shape),
    }


def _is_read(graph: GraphModule, name: str) -> bool:
    """Whether a norm's weight is still there: behind it, where there is a gate between."""
    return any(_own_name(node) == name for node in graph.graph.find_nodes(op="get_attr"))


def _check_complete(model: nn.Module, graph: GraphModule, layers: set[Node]) -> None:
    """Everything that the graph reads is either the model's own, or was found."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for node in graph.graph.find_nodes(op="get_attr"):
        if not (str(node.target).startswith("_planned_") or _own_name(node) in own or set(node.users) <= layers):
            raise MqAoError(f"rewrites made {node.target}, which is no weight of the model: this format has no place.")


def _own_name(node: Node) -> str:
    """The model's name of a constant of the graph, if it is one of the model's."""
    return str(node.target).removeprefix("model.")


def _path(node: Node) -> str:
    """Name of the module that a call is of; capture wraps the model once."""
    return module_path(node).removeprefix("model.")


def _described(scheme: Scheme, in_float: list[str]) -> Mapping[str, Any]:
    weights = {"type": "int", "symmetric": True, "dynamic": False}
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        Scheme.W8A8: {"weights": {**weights, "num_bits": 8, "strategy": "channel"}, "input_activations": tokens},
        Scheme.W4A16: {"weights": {**weights, "num_bits": 4, "strategy": "group", "group_size": _GROUP}},
    }[scheme]
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme is Scheme.W8A8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": in_float,
    }
