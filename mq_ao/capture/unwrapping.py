"""From what people hold in their hands to the model in it: compiled, parallel and adapted ones."""

from __future__ import annotations

import logging

import torch
from torch import nn

from mq_ao.errors import MqAoError

logger = logging.getLogger(__name__)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `nn.DataParallel` and `DistributedDataParallel`, in any order; it is logged.

    Raises:
        MqAoError: it is no module, is TorchScript, holds adapters (PEFT, LoRA), or is Mamba-3.
    """
    if not isinstance(model, nn.Module):
        raise MqAoError(f"the model is of type {type(model).__name__}: give a torch.nn.Module.")
    while (inner := _inner(model)) is not None:
        logger.info("%s: the %s inside is taken", type(model).__name__, type(inner).__name__)
        model = inner
    for name, part in model.named_modules():
        _check(name or "the model", part)
    return model


def _inner(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    # torch has no public name for what torch.compile gives.
    return module._modules.get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None


def _check(name: str, part: nn.Module) -> None:
    if isinstance(part, torch.jit.ScriptModule):
        raise MqAoError(f"{name} is TorchScript, which torch.export does not take: give the Python model.")
    library, kind = type(part).__module__.partition(".")[0], type(part).__name__
    if library == "peft":
        raise MqAoError(f"{name} ({kind}) holds adapters: merge them first (LoRA: model = model.merge_and_unload()).")
    if library == "mamba_ssm" and kind == "Mamba3":
        raise MqAoError(f"{name} is Mamba-3, which is not supported: Mamba and Mamba-2 are.")
