"""How long each kernel of a program takes where it runs, as PyTorch's profiler tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mq_ao.bench.gpu import wait

_CALLS, _MOST = 5, 40


def kernel_times(call: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Microseconds a call by kernel, the longest first; without a GPU, of PyTorch's operators on the CPU."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    calls = _CALLS if on_gpu else 1
    wait(device)
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            call()
        wait(device)
    found = [
        {
            "kernel": event.key[:120],
            "calls": event.count / calls,
            "us": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / calls,
        }
        for event in profiler.key_averages()
    ]
    return sorted((item for item in found if item["us"] > 0), key=lambda item: -item["us"])[:_MOST]
