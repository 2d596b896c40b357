"""The GPU that a graph is asked to run on."""

from __future__ import annotations

import torch

from mq_ao.errors import MqAoError

_CAPABILITY = (8, 0)


def require_cuda(device: torch.device | str = "cuda") -> None:
    """Checks that there is a GPU with int8 tensor cores as the lowering uses them.

    Args:
        device: the one that is checked; "cuda" is the current one.

    Raises:
        MqAoError: PyTorch sees no GPU, or its compute capability is below 8.0.
    """
    if not torch.cuda.is_available():
        raise MqAoError(
            "CUDA was asked for, but PyTorch sees no GPU: run this on a machine with one and a CUDA build of PyTorch, "
            "or leave the graph on the CPU."
        )
    index, count = torch.device(device).index or 0, torch.cuda.device_count()
    if index >= count:
        raise MqAoError(f"there is no GPU {index}: PyTorch sees {count} here, counted from 0.")
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, _CAPABILITY))
        raise MqAoError(f"the GPU has compute capability {found}: int8 graphs need {least} (Ampere) or newer.")
