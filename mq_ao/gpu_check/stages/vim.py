"""The bundled image classifier, quantized: the program on the GPU against the same program on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mq_ao.gpu_check.checks import CheckFailed
from mq_ao.gpu_check.devices import engaged, on_the_cpu
from mq_ao.gpu_check.prepared import VISION_FILE, images_of, prepare_vision, prepared
from mq_ao.gpu_check.settings import Setting
from mq_ao.gpu_check.timing import median_seconds
from mq_ao.lowering.cuda import CudaModule, Mode, load

_NEAR = 0.02
"""Relative distance of logits; see `bundled`."""


def parts(setting: Setting) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """See `stages`."""
    opened = cache(partial(_opened, setting))
    return {
        "operator by operator": lambda: _checked(setting, *opened(), Mode.EAGER),
        "compiled": lambda: _checked(setting, *opened(), Mode.DEFAULT),
    }


def _opened(setting: Setting) -> tuple[CudaModule, Tensor]:
    on_the_cpu()
    with prepared(setting, VISION_FILE, partial(prepare_vision, setting.sizes)) as (path, expected):
        module = load(path, "cpu", Mode.EAGER)
        assert isinstance(module, CudaModule)
        return module, expected["logits"]


def _checked(setting: Setting, module: CudaModule, wanted: Tensor, mode: Mode) -> dict[str, Any]:
    """How far logits are from those on the CPU, and images a second.

    Raises:
        CheckFailed: too far.
    """
    device = engaged(setting)
    here = module.on(device, mode)
    batches = [batch.to(device) for batch in images_of(setting.sizes)]
    got = torch.cat([here(batch).float().cpu() for batch in batches])
    wanted = wanted[: len(got)]
    off = float((got - wanted).norm() / wanted.norm())
    same = float((got.argmax(-1) == wanted.argmax(-1)).double().mean())
    seconds = median_seconds(lambda: here(batches[0]), device, setting.sizes.repeats)
    result = {
        "mode": str(mode),
        "images": len(got),
        "off": off,
        "allowed": _NEAR,
        "same_class": same,
        "batch": len(batches[0]),
        "images_a_second": len(batches[0]) / seconds,
    }
    if not off <= _NEAR:
        raise CheckFailed(f"logits are {off:.3g} off those of the same program on the CPU", result)
    return result
