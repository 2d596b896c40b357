"""What the tests of captured models share."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that leave no part of a model without influence: norms are not all ones, biases not all zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf in ("A_log", "dt_bias") or name.endswith("dt_proj.bias"):
                continue  # Their initial values give step sizes and decays as in trained models.
            if ("norm" in name and leaf == "weight") or leaf == "D":
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def operators(program: ExportedProgram) -> Counter[str]:
    """How many nodes of each operator a program has, by the operator's name."""
    names = (node.target._schema.name for node in program.graph.nodes if hasattr(node.target, "_schema"))
    return Counter(name.removeprefix("mq_ao::").removeprefix("aten::") for name in names)


def difference(got: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def references() -> Mapping[tuple[str, str], Any]:
    """What replacing touches in imported modules: functions, names that are None, `apply` of classes."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("mamba_ssm", "transformers", "tests") and isinstance(module, ModuleType):
            for key, value in list(vars(module).items()):
                if callable(value) or value is None:
                    found[name, key] = value
                if isinstance(value, type) and "apply" in dir(value):
                    found[name, f"{key}.apply"] = vars(value).get("apply")
    return found


def changed(before: Mapping[tuple[str, str], Any]) -> list[tuple[str, str]]:
    """The attributes that are not what they were."""
    after = references()
    return [key for key, value in before.items() if key in after and after[key] is not value]
