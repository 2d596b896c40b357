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
from mq_ao.ops.gpu_tuning import FEW_OUTPUTS, FEW_ROWS, SSD_CHUNK, scan_chunk

SIGMOID = 2
"""Special functions of a sigmoid: an exponential and a reciprocal."""
ROUNDING = 4
"""Scale, round, clamp, convert."""

_ROWS = 128
"""Rows of a product that share one unpacking of int4 weights."""


@dataclass(frozen=True)
class Cost:
    """What kernels take.

    Attributes:
        kernels: how many there are.
        moved: bytes read and written.
        fp16: operations of tensor cores on fp16.
        int8: operations of tensor cores on int8.
        fp32: operations of fp32 units, with those on integers.
        special: exponentials, logarithms, roots and reciprocals, which have units of their own.
    """

    kernels: int = 0
    moved: int = 0
    fp16: int = 0
    int8: int = 0
    fp32: int = 0
    special: int = 0

    def __add__(self, other: Cost) -> Cost:
        return self.plus(other, 1)

    def plus(self, other: Cost, times: int) -> Cost:
        """This and `times` of the other."""
        return Cost(*(getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self)))

    @property
    def operations(self) -> int:
        """Operations of all units together."""
        return self.fp16 + self.int8 + self.fp32 + self.special


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        operator: its name with its namespace, such as `mq_ao.linear_rows`.
        arguments: all of them by name.
        outputs: what it gives, and then what it overwrites.
        multiprocessors: of the device.
    """

    operator: str
    arguments: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    multiprocessors: int

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
    x = call.arguments["q" if "q" in call.arguments else "input"]
    weight = call.arguments["weight"]
    groups = call.arguments.get("group_size") or 0
    inputs, channels = x.shape[-1], weight.shape[0]
    rows = x.numel() // inputs
    outputs = rows * channels
    products = 2 * outputs * inputs
    fp32 = ROUNDING * outputs * (inputs // groups if groups else 1)
    if weight.dtype == torch.uint8:
        fp32 += ROUNDING * inputs * channels * math.ceil(rows / _ROWS)
    if x.dtype == torch.int8:
        # Compiled, pieces of many rows and outputs are products of their own, which read x again; not those of steps.
        apart = rows > FEW_ROWS and channels > FEW_OUTPUTS and not groups and "piece" not in call.arguments
        several = len(call.arguments.get("sizes", ())) if apart else 1
        again = max(several - 1, 0)
        cost = call.cost(1 + again, int8=products, fp32=fp32) + Cost(moved=again * moved(x))
        # Of one scale for all, the zero point is 0 by chance alone: what corrects for others is counted in any case.
        uncorrected = call.arguments.get("token_scale") is None and call.arguments["correction"] is None
        return cost + Cost(moved=moved(call.arguments["scale"])) if uncorrected else cost
    # PyTorch does not round float32 for tensor cores unless it is asked to.
    return call.cost(fp32=products) if x.dtype == torch.float32 else call.cost(fp16=products)


def _linear_rows_weight_only(call: Call) -> Cost:
    """For few rows a multiply-add on fp32 units for each weight and row; for more a bfloat16 product.

    A kernel rounds x for it; the product unpacks its weights for every so many rows.
    """
    x = call.arguments["x"]
    outputs, inputs = call.y.shape[-1], x.shape[-1]
    rows = x.numel() // inputs
    products, size = 2 * rows * outputs * inputs, outputs * inputs
    if rows <= FEW_ROWS:
        return call.cost(fp32=products + ROUNDING * size * rows)
    rounded = Cost(kernels=1, moved=2 * 2 * x.numel())
    return call.cost(fp16=products, fp32=ROUNDING * size * math.ceil(rows / _ROWS)) + rounded


def _convolution(call: Call) -> Cost:
    return call.cost() + _convolved(call.y.numel(), call.arguments["weight"].shape[-1])


def _convolved(values: int, taps: int) -> Cost:
    return Cost(fp32=values * (2 * taps + 2 * ROUNDING), special=values * SIGMOID)


def _selective_scan(call: Call) -> Cost:
    """The recurrence; where channels are too few for a GPU, all but the outputs twice, in chunks side by side.

    Of each state: step times A, exponential, step times u times B, a multiply-add, and another one for y; of each
    channel: softplus.
    """
    u, b, states = call.arguments["u"], call.arguments["B"], call.arguments["A"].shape[-1]
    batch, length, channels = u.shape
    once = u.numel() * (4 * states + 3 * ROUNDING)
    special = u.numel() * (states + 2)
    outputs = u.numel() * 2 * states
    chunk = scan_chunk(batch, length, channels, call.multiprocessors)
    if chunk == length:
        return call.cost(fp32=once + outputs, special=special)
    again = moved(u) + moved(call.arguments["delta"]) + moved(b)
    # Written, carried over by reading and writing again, and read.
    carried = 4 * 4 * batch * math.ceil(length / chunk) * channels * states
    return call.cost(kernels=3, fp32=2 * once + outputs, special=2 * special) + Cost(moved=again + carried)


def _ssd_scan(call: Call) -> Cost:
    """The block decomposition of Dao and Gu 2024 on tensor cores, or the recurrence of a few tokens."""
    x, b = call.arguments["x"], call.arguments["B"]
    batch, length, heads, headdim = x.shape
    groups, states = b.shape[2:]
    if length < 2 * SSD_CHUNK:
        return call.cost(fp32=x.numel() * (5 * states + 3 * ROUNDING), special=batch * length * heads * 3)
    scores = 2 * batch * length * SSD_CHUNK * groups * states
    within = 2 * batch * length * SSD_CHUNK * heads * headdim
    across = 2 * 2 * x.numel() * states
    decays = batch * length * SSD_CHUNK * heads
    # States of the chunks: written, then each read and replaced by the one before it, then read again.
    carried = 4 * 4 * batch * math.ceil(length / SSD_CHUNK) * heads * headdim * states
    cost = call.cost(kernels=4, fp16=scores + within + across, fp32=3 * decays + x.numel() * 3 * ROUNDING)
    cost += Cost(special=decays)
    return cost + Cost(moved=carried)


def _conv_step(call: Call) -> Cost:
    """A linear, and the convolution of a piece in its epilogue."""
    channels, taps = call.arguments["conv_weight"].shape
    values = call.arguments["q"].shape[0] * channels
    return _linear(call) + _convolved(values, taps) + _between(call, values)


def _scan_step(call: Call) -> Cost:
    """A linear, and the scan in its epilogue."""
    scan = _selective_scan(call)
    return _linear(call) + Cost(fp32=scan.fp32, special=scan.special) + _between(call, call.y.numel())


def _between(call: Call, values: int) -> Cost:
    """What a step of many rows, which are two kernels, writes with one and reads with the other, in int8."""
    return Cost(1, 2 * values) if call.arguments["q"].shape[0] > FEW_ROWS else Cost()


def _scan_states(call: Call) -> Cost:
    return call.cost(fp32=call.y.numel() * 4, special=call.y.numel())


def _gate(call: Call) -> Cost:
    """y times S-SiLU of z, rotated or not, rounded."""
    rotated = rotation(call.y.shape[-1]) if call.arguments["hadamard"] else 0
    each = 4 + 2 * ROUNDING + rotated
    return call.cost(fp32=call.y.numel() * each, special=call.y.numel() * SIGMOID)


def _rotation(call: Call) -> Cost:
    return call.cost(fp32=call.y.numel() * rotation(call.y.shape[-1]))


def _norm(call: Call) -> Cost:
    return call.cost(fp32=call.y.numel() * (4 + 2 * ROUNDING))


Rule = Callable[[Call], Cost]
LINEARS = frozenset(
    {
        "aten.linear",
        "mq_ao.linear_rows",
        "mq_ao.linears_rows",
        "mq_ao.linear_rows_weight_only",
        "mq_ao.int8_conv_step_",
        "mq_ao.int8_scan_step_",
    }
)
# Each with its twin that overwrites the state.
_CARRYING: Mapping[str, Rule] = {
    "causal_conv1d": _convolution,
    "qcausal_conv1d": _convolution,
    "selective_scan": _selective_scan,
    "qselective_scan": _selective_scan,
    "ssd_scan": _ssd_scan,
    "qssd_scan": _ssd_scan,
}
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(LINEARS, _linear),
    "mq_ao.linear_rows_weight_only": _linear_rows_weight_only,
    "mq_ao.int8_conv_step_": _conv_step,
    "mq_ao.int8_scan_step_": _scan_step,
    **{f"mq_ao.{name}{ending}": rule for name, rule in _CARRYING.items() for ending in ("", "_")},
    "mq_ao.scan_states": _scan_states,
    "mq_ao.int8_gate": _gate,
    "mq_ao.hadamard": _rotation,
    "mq_ao.int8_rms_norm": _norm,
}
"""Cost of the operators that are kernels of their own."""
