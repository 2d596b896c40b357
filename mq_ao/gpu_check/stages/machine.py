"""What there is: versions, the device, and how fast it does the plainest things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from mq_ao.gpu_check.checks import CheckFailed
from mq_ao.gpu_check.machine import NEEDED, described, versions
from mq_ao.gpu_check.settings import Setting
from mq_ao.gpu_check.timing import median_seconds


def parts(setting: Setting) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """See `stages`."""
    return {
        "versions": _versions,
        "device": partial(described, setting),
        "fp16 product": partial(_product, setting),
        "int8 product": partial(_int8_product, setting),
        "copy": partial(_copy, setting),
    }


def _versions() -> dict[str, Any]:
    """Of everything that results depend on.

    Raises:
        CheckFailed: a package is missing.
    """
    found = versions()
    if missing := [name for name in NEEDED if found[name] is None]:
        raise CheckFailed(f"{' and '.join(missing)} cannot be found: carry the wheels along.", found)
    return found


def _product(setting: Setting) -> dict[str, Any]:
    device, n = torch.device(setting.device), setting.sizes.square
    a, b = (torch.randn(n, n, device=device).half() for _ in range(2))
    return _rate(partial(torch.matmul, a, b), setting, 2 * n**3, "operations")


def _int8_product(setting: Setting) -> dict[str, Any]:
    device, n = torch.device(setting.device), setting.sizes.square
    a, b = (torch.randint(-128, 128, (n, n), device=device, dtype=torch.int8) for _ in range(2))
    return _rate(partial(torch.ops.aten._int_mm, a, b.t()), setting, 2 * n**3, "operations")


def _copy(setting: Setting) -> dict[str, Any]:
    source = torch.empty(setting.sizes.copied, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return _rate(partial(target.copy_, source), setting, 2 * source.nbytes, "bytes")


def _rate(call: Callable[[], object], setting: Setting, done: int, what: str) -> dict[str, Any]:
    seconds = median_seconds(call, torch.device(setting.device), setting.sizes.repeats)
    return {"seconds": seconds, what: done, f"{what}_a_second": done / seconds}
