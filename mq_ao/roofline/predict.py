"""From costs to times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mq_ao.roofline.cost import Cost
from mq_ao.roofline.devices import Device
from mq_ao.roofline.extrapolate import ORDER, Counts


@dataclass(frozen=True)
class Line:
    """Kernels of one kind.

    Attributes:
        role: what they are for.
        operator: the operator, or "fused" for a chain.
        cost: what they take together.
        bound: what they wait for: "memory", or the unit of their arithmetic.
        seconds: predicted, launches included.
    """

    role: str
    operator: str
    cost: Cost
    bound: str
    seconds: float

    @classmethod
    def of(cls, role: str, operator: str, cost: Cost, device: Device) -> Line:
        """`max(bytes / bandwidth, operations / throughput of each unit) + launches`."""
        times = {
            "memory": cost.moved / (device.bandwidth * device.memory_fraction),
            "fp16": cost.fp16 / (device.fp16 * device.fp16_fraction),
            "int8": cost.int8 / (device.int8 * device.int8_fraction),
            "fp32": cost.fp32 / (device.fp32 * device.fp32_fraction),
            "special": cost.special / (device.special * device.fp32_fraction),
        }
        bound = max(times, key=lambda name: times[name])
        return cls(role, operator, cost, bound, times[bound] + cost.kernels * device.launch)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one forward pass.

    Attributes:
        lines: of every kind of kernel.
    """

    lines: tuple[Line, ...]

    @property
    def cost(self) -> Cost:
        """Of all kernels."""
        return sum((line.cost for line in self.lines), Cost())

    @property
    def seconds(self) -> float:
        """Of all kernels, one after the other."""
        return sum(line.seconds for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        lines = [line.to_dict() for line in self.lines]
        return {"predicted": True, "seconds": self.seconds, "cost": asdict(self.cost), "kernels": lines}


def predict(counts: Counts, device: Device) -> Prediction:
    """Predicts the time on a device."""
    ordered = sorted(counts.items(), key=lambda item: ORDER.index(item[0][0]))
    return Prediction(tuple(Line.of(*key, cost, device) for key, cost in ordered))
