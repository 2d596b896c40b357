"""The GPUs that times are predicted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mq_ao.errors import MqAoError


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU, and which part of each a good kernel is assumed to reach.

    Throughputs are dense, not those of structured sparsity, which data sheets print twice as large. A fused
    multiply-add is two operations.

    Attributes:
        title: the product.
        multiprocessors: how many it has.
        bandwidth: of the memory, bytes a second.
        fp16: of the tensor cores on fp16 with sums in fp32, operations a second.
        int8: of the tensor cores on int8 with sums in int32.
        fp32: of the fp32 units.
        special: of the units for exponentials, logarithms, roots and reciprocals, results a second.
        launch: seconds from one kernel of a CUDA graph to the next, with the start and the drain of the grid.
        memory_fraction: of the bandwidth that is reached.
        fp16_fraction: of the tensor cores' fp16 peak that is reached.
        int8_fraction: of their int8 peak.
        fp32_fraction: of the peaks of fp32 and special units.
    """

    title: str
    multiprocessors: int
    bandwidth: float
    fp16: float
    int8: float
    fp32: float
    special: float
    launch: float
    # Assumptions, the same for all devices and not fitted. Large copies reach 85 to 92 % of the bandwidth; cuBLAS about
    # three quarters of the fp16 peak on large products; int8 products, whose loads have to be twice as fast, and our
    # kernels, which are not cuBLAS, less.
    memory_fraction: float = 0.85
    fp16_fraction: float = 0.75
    int8_fraction: float = 0.60
    fp32_fraction: float = 0.50


# Of `launch`: 0.5 us between kernels of a graph (NVIDIA's blog "Getting Started with CUDA Graphs", 2019: 3.4 us a
# kernel of 2.9 us), and about 1 us, assumed, to fill and drain the chip; more where clocks are low.
# Of `special`: 16 results a clock of a multiprocessor (CUDA C++ Programming Guide, throughput of arithmetic
# instructions), which makes 128 fp32 multiply-adds in that time, on the A100 64.
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        # NVIDIA H100 Tensor Core GPU data sheet, SXM5 80 GB: 3.35 TB/s, fp16 1,979 and int8 3,958 with sparsity,
        # fp32 67.
        "h100": Device("H100 SXM5 80 GB", 132, 3.35e12, 989.5e12, 1979e12, 67e12, 67e12 / 16, 1.5e-6),
        # NVIDIA H200 Tensor Core GPU data sheet, SXM 141 GB: 4.8 TB/s; its units are those of the H100.
        "h200": Device("H200 SXM 141 GB", 132, 4.8e12, 989.5e12, 1979e12, 67e12, 67e12 / 16, 1.5e-6),
        # NVIDIA A100 data sheet, SXM4 80 GB: 2,039 GB/s, fp16 312 (624 with sparsity), int8 624 (1,248), fp32 19.5.
        "a100": Device("A100 SXM4 80 GB", 108, 2.039e12, 312e12, 624e12, 19.5e12, 19.5e12 / 8, 1.5e-6),
        # NVIDIA RTX A5000 data sheet: 768 GB/s, fp32 27.8, tensor 222.2 with sparsity. Dense that is fp16 111.1, with
        # sums in fp32 as fast as in fp16, and int8 twice as much (NVIDIA Ampere GA102 whitepaper, on the RTX A6000).
        "a5000": Device("RTX A5000", 64, 768e9, 111.1e12, 222.2e12, 27.8e12, 27.8e12 / 16, 1.5e-6),
        # NVIDIA Jetson AGX Orin Series Technical Brief v1.2, 64 GB, the GPU alone without its DLAs: 204.8 GB/s, int8
        # 170 with sparsity, fp16 half of that, fp32 5.3.
        "orin": Device("Jetson AGX Orin 64 GB", 16, 204.8e9, 42.5e12, 85e12, 5.3e12, 5.3e12 / 16, 2.5e-6),
    }
)
"""The devices by name."""


def get_device(name: str) -> Device:
    """The device of that name.

    Raises:
        MqAoError: there is none; the message lists the known ones.
    """
    if name not in DEVICES:
        raise MqAoError(f"unknown device {name!r}: the devices are {', '.join(DEVICES)}.")
    return DEVICES[name]
