"""Operations and bytes of one call of an operator, from the shapes and dtypes of what it reads and writes.

Operations are those that the algorithm needs, not those that a kernel pads to. Memory is read and written once: caches
between kernels are not counted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.ops import hadamard_matrix

SPECIAL = 16
"""fp32 operations in whose time a unit gives an exponential, logarithm, root or reciprocal: of 128 fp32 lanes 16 do."""
SIGMOID = 2 * SPECIAL
"""An exponential and a reciprocal."""
ROUNDING = 4
"""Scale, round, clamp, convert."""

_ROWS = 128
"""Rows of a product that share one unpacking of the weights."""
_CHUNK = 64
"""Tokens of a chunk of the SSD scan; below two chunks, it is a plain recurrence."""


@dataclass(frozen=True)
class Cost:
    """What kernels take.

    Attributes:
        kernels: how many there are.
        moved: bytes read and written.
        fp16: operations of tensor cores on fp16.
        int8: operations of tensor cores on int8.
        fp32: operations of fp32 units.
    """

    kernels: int = 0
    moved: int = 0
    fp16: int = 0
    int8: int = 0
    fp32: int = 0

    def __add__(self, other: Cost) -> Cost:
        return self.plus(other, 1)

    def plus(self, other: Cost, times: int) -> Cost:
        """This and `times` of the other."""
        return Cost(*(getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self)))

    @property
    def operations(self) -> int:
        """Of all units."""
        return self.fp16 + self.int8 + self.fp32


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        operator: its name with its namespace, such as `mq_ao.int8_linear`.
        arguments: all of them by name.
        outputs: what it gives.
    """

    operator: str
    arguments: Mapping[str, Any]
    outputs: tuple[Tensor, ...]

    @property
    def y(self) -> Tensor:
        """The first output."""
        return self.outputs[0]

    @property
    def moved(self) -> int:
        """Bytes of all tensors, each read or written once."""
        return sum(moved(value) for value in (*tensors(self.arguments.values()), *self.outputs))

    def cost(self, kernels: int = 1, **operations: int) -> Cost:
        """One kernel that moves all tensors."""
        return Cost(kernels, self.moved, **operations)


def tensors(values: Any) -> list[Tensor]:
    """The tensors among values and lists of them."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        return []
    return [tensor for value in values for tensor in tensors(value)]


def moved(tensor: Tensor) -> int:
    """Bytes of a tensor, what is broadcast once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * tensor.element_size()


def cost_of(call: Call) -> Cost:
    """What a kernel of its own costs.

    Raises:
        MqAoError: there is no rule for the operator.
    """
    rule = RULES.get(call.operator)
    if rule is None:
        raise MqAoError(f"the roofline has no cost of operator {call.operator}: add a rule to mq_ao/roofline/cost.py.")
    return rule(call)


def rotation(n: int) -> int:
    """Operations of a Hadamard transform for each of its `n` values."""
    base, power = hadamard_matrix.factor(n)
    return power.bit_length() - 1 + (2 * base if base > 1 else 0)


def _linear(call: Call) -> Cost:
    """A product of x with a weight of any kind, its epilogue included."""
    x, weight = _operands(call)
    groups = call.arguments.get("group_size") or 0
    outputs, inputs = call.y.numel(), x.shape[-1]
    products = 2 * outputs * inputs
    rows = outputs // call.y.shape[-1] if outputs else 0
    fp32 = ROUNDING * outputs * (inputs // groups if groups else 1)
    packed = weight.dtype == torch.uint8 or call.arguments.get("bits") == 4
    integers = x.dtype in (torch.int8, torch.uint8)
    if packed or (not integers and not weight.is_floating_point()):
        fp32 += ROUNDING * inputs * call.y.shape[-1] * math.ceil(rows / _ROWS)
    if integers:
        return call.cost(int8=products, fp32=fp32)
    if weight.is_floating_point() and x.dtype == torch.float32:
        return call.cost(fp32=products)
    # Weights of integers are multiplied on tensor cores whatever x is.
    return call.cost(fp16=products, fp32=0 if weight.is_floating_point() else fp32)


def _operands(call: Call) -> tuple[Tensor, Tensor]:
    """x and the weight: the two matrices of a product, by their names in its schema."""
    given = call.arguments
    x = next(given[name] for name in ("mat1", "x", "q", "a", "input", "self") if given.get(name) is not None)
    weight = next(given[name] for name in ("weight", "packed", "b", "mat2") if given.get(name) is not None)
    return x, weight


def _convolution(call: Call) -> Cost:
    taps = call.arguments["weight"].shape[-1]
    return call.cost(fp32=call.y.numel() * (2 * taps + SIGMOID + 2 * ROUNDING))


def _selective_scan(call: Call) -> Cost:
    """Of each state: step times A, exponential, step times u times B, two multiply-adds; of each channel: softplus."""
    states = call.arguments["A"].shape[-1]
    return call.cost(fp32=call.arguments["u"].numel() * (states * (6 + SPECIAL) + 2 * SPECIAL + 3 * ROUNDING))


def _ssd_scan(call: Call) -> Cost:
    """The block decomposition of Dao and Gu 2024 on tensor cores, or the recurrence of a few tokens."""
    x, b = call.arguments["x"], call.arguments["B"]
    batch, length, heads, headdim = x.shape
    groups, states = b.shape[2:]
    if length < 2 * _CHUNK:
        return call.cost(fp32=x.numel() * (5 * states + 3 * ROUNDING) + batch * length * heads * 3 * SPECIAL)
    scores = 2 * batch * length * _CHUNK * groups * states
    within = 2 * batch * length * _CHUNK * heads * headdim
    across = 2 * 2 * x.numel() * states
    masks = batch * length * _CHUNK * heads * (SPECIAL + 3)
    # States of the chunks: written, then each read and replaced by the one before it, then read again.
    carried = 4 * 4 * batch * math.ceil(length / _CHUNK) * heads * headdim * states
    cost = call.cost(kernels=4, fp16=scores + within + across, fp32=masks + x.numel() * 3 * ROUNDING)
    return cost + Cost(moved=carried)


def _scan_states(call: Call) -> Cost:
    return call.cost(fp32=call.y.numel() * (4 + SPECIAL))


def _gate(call: Call) -> Cost:
    """y times S-SiLU of z, rotated or not, rounded."""
    rotated = any(call.arguments.get(name) for name in ("rotate", "rotated", "hadamard"))
    each = SIGMOID + 4 + 2 * ROUNDING + (rotation(call.y.shape[-1]) if rotated else 0)
    return call.cost(fp32=call.y.numel() * each)


def _rotation(call: Call) -> Cost:
    return call.cost(fp32=call.y.numel() * rotation(call.y.shape[-1]))


def _norm(call: Call) -> Cost:
    return call.cost(fp32=call.y.numel() * (4 + 2 * ROUNDING))


Rule = Callable[[Call], Cost]
LINEARS = frozenset(
    {
        "aten.linear",
        "aten.mm",
        "aten.addmm",
        "aten._int_mm",
        "mq_ao.int8_mm",
        "mq_ao.int8_linear",
        "mq_ao.weight_linear",
        "mq_ao.qlinear",
        "mq_ao.qlinear_per_token",
        "mq_ao.wlinear",
    }
)
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(LINEARS, _linear),
    "mq_ao.causal_conv1d": _convolution,
    "mq_ao.qcausal_conv1d": _convolution,
    "mq_ao.selective_scan": _selective_scan,
    "mq_ao.qselective_scan": _selective_scan,
    "mq_ao.ssd_scan": _ssd_scan,
    "mq_ao.qssd_scan": _ssd_scan,
    "mq_ao.scan_states": _scan_states,
    "mq_ao.int8_gate": _gate,
    "mq_ao.qgate": _gate,
    "mq_ao.qgate_per_token": _gate,
    "mq_ao.hadamard": _rotation,
    "mq_ao.int8_rms_norm": _norm,
}
"""Cost of the operators that are kernels of their own."""
