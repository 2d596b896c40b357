"""The device of a check, its memory, and what the roofline knows of it."""

from __future__ import annotations

import torch

from mq_ao.gpu_check.checks import Skipped
from mq_ao.gpu_check.settings import Setting
from mq_ao.lowering.cuda import require_cuda
from mq_ao.ops import library
from mq_ao.roofline import DEVICES, Device

STAND_IN = "h200"
"""The device that a rehearsal's predictions are for."""


def engaged(setting: Setting) -> torch.device:
    """The device, whose kernels are Triton's from here on; in a rehearsal those are interpreted on the CPU.

    Raises:
        MqAoError: there is no GPU that can run it.
        ImportError: Triton is missing.
    """
    from mq_ao.ops import triton

    device = torch.device(setting.device)
    if device.type == "cuda":
        require_cuda(device)
        torch.cuda.set_device(device)
    elif not _Rehearsing.now:
        triton.register("CPU")
        _Rehearsing.now = True
    return device


class _Rehearsing:
    now = False


def on_the_cpu() -> None:
    """To be called before anything is computed on the CPU: a check does not wait for a C++ compiler."""
    library.use_references("a check of a GPU builds none.")


def chip(setting: Setting) -> Device:
    """The roofline's device, by its name.

    Raises:
        Skipped: the roofline does not know it.
    """
    if setting.rehearsal:
        return DEVICES[STAND_IN]
    name = torch.cuda.get_device_name(setting.device).lower()
    found = [device for key, device in DEVICES.items() if key in name]
    if not found:
        raise Skipped(f"the roofline knows no {name}: it knows {', '.join(DEVICES)}.")
    return found[0]


def check_room(setting: Setting, what: str, needed: float) -> None:
    """Skips what the device's memory is too small for.

    Raises:
        Skipped: so many bytes are not free.
    """
    if setting.rehearsal:
        return
    free, _ = torch.cuda.mem_get_info(setting.device)
    if needed > free:
        raise Skipped(f"{what} needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the device are free.")
