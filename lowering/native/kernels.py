"""What the native backend's kernels take: those of this machine's CPU, without a compiler around them."""

from __future__ import annotations

from dataclasses import replace

from mq_ao.lowering.inductor import kernels

KERNELS = replace(kernels.KERNELS, backend="native")
