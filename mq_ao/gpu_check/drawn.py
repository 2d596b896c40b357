"""Drawn arguments of every operator that has a Triton kernel, on the CPU, with values as models have them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mq_ao.ops import nibbles
from mq_ao.ops.in_place import STATEFUL

Arguments = dict[str, Any]


class Draw:
    """Sizes and values from one seed.

    Args:
        seed: of everything.
        widths: that sizes are drawn from.
        length: tokens of a sequence.
    """

    def __init__(self, seed: str, widths: tuple[int, ...], length: int) -> None:
        self._random = random.Random(seed)
        self._gen = torch.Generator().manual_seed(self._random.getrandbits(32))
        self._widths = widths
        self.length = length
        self.batch = self.one(1, 2, 3) if length == 1 else 1

    def one(self, *choices: Any) -> Any:
        """One of these."""
        return self._random.choice(choices)

    @property
    def yes(self) -> bool:
        """Heads or tails."""
        return self._random.random() < 0.5

    @property
    def width(self) -> int:
        """A number of channels."""
        return int(self.one(*self._widths))

    def integers(self, *shape: int, low: int = -128, high: int = 127) -> Tensor:
        """int8 from low to high."""
        return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=self._gen)

    def normal(self, *shape: int) -> Tensor:
        """float32 around 0."""
        return torch.randn(shape, generator=self._gen)

    def positive(self, *shape: int, least: float = 0.0, most: float = 1.0) -> Tensor:
        """float32 from `least` to `most`."""
        return least + (most - least) * torch.rand(shape, generator=self._gen)

    def perhaps(self, value: Tensor) -> Tensor | None:
        """It, or None."""
        return value if self.yes else None

    def grid(self, name: str, *shape: int) -> Arguments:
        """An operand of a scan in int8: about 3 on either side."""
        return {name: self.integers(*shape), f"{name}_scale": 0.025, f"{name}_zero_point": -3}


def _linear(draw: Draw, outputs: int, *, whole: bool = False) -> Arguments:
    """A linear on integers, with one scale a channel if it is to be `whole`, else perhaps in groups or in four bits."""
    group = 0 if whole else draw.one(0, 64, 128)
    inputs = group * draw.one(1, 3, 12) if group else draw.width // 16 * 16
    four = group > 0 and draw.yes
    low, high = (-8, 7) if four else (-127, 127)
    weight = draw.integers(outputs, inputs, low=low, high=high)
    shape = (outputs, inputs // group) if group else (outputs,)
    scale = draw.positive(*shape, least=1e-4, most=1e-3) * (16 if four else 1)
    sums = weight.view(*shape, -1).sum(-1, dtype=torch.int32)
    per_token = draw.yes and not whole
    return {
        "q": draw.integers(draw.batch, draw.length, inputs),
        "token_scale": draw.positive(draw.batch, draw.length, 1, least=0.5, most=1.5) if per_token else None,
        "weight": nibbles.pack(weight, group) if four else weight,
        "scale": scale.to(torch.bfloat16) if group else scale,
        "correction": None if per_token else sums * 5,
        "bias": draw.perhaps(draw.normal(outputs)),
        "group_size": group,
    }


def _linear_rows(draw: Draw) -> Arguments:
    return {**_linear(draw, draw.width), "out_scale": draw.one(None, 0.05), "out_zero_point": 3}


def _linears_rows(draw: Draw) -> Arguments:
    sizes = [draw.width, draw.width]
    return {**_linear(draw, sum(sizes)), "sizes": sizes, "out_scales": [0.05, 0.0], "out_zero_points": [3, 0]}


def _linear_rows_weight_only(draw: Draw) -> Arguments:
    given = _linear(draw, draw.width)
    x = draw.normal(*given["q"].shape)
    return {"x": x, **{name: given[name] for name in ("weight", "scale", "bias", "group_size")}}


def _taps(draw: Draw, channels: int) -> Arguments:
    """A convolution's rest, in int8."""
    return {
        "weight": draw.integers(channels, 4, low=-127),
        "weight_scale": draw.positive(channels, least=1e-3, most=1e-2),
        "bias": draw.perhaps(draw.normal(channels)),
        "activation": draw.one(None, "silu"),
    }


def _qcausal_conv1d(draw: Draw) -> Arguments:
    channels = draw.width
    return {
        **draw.grid("x", draw.batch, draw.length, channels),
        **_taps(draw, channels),
        "initial_state": draw.normal(draw.batch, 3, channels),
        "out_scale": draw.one(None, 0.05),
        "out_zero_point": 3,
    }


def _causal_conv1d(draw: Draw) -> Arguments:
    channels = draw.width
    return {
        "x": draw.normal(draw.batch, draw.length, channels),
        "weight": draw.normal(channels, 4),
        "bias": draw.perhaps(draw.normal(channels)),
        "initial_state": draw.normal(draw.batch, 3, channels),
        "activation": draw.one(None, "silu"),
    }


def _conv_step(draw: Draw) -> Arguments:
    linear = _linears_rows(draw)
    size = linear["sizes"][0]
    convolution = {f"conv_{name}": value for name, value in _taps(draw, size).items() if name != "activation"}
    return {
        **linear,
        "piece": 0,
        **convolution,
        # In steps of x's grid: next to a border two roundings would differ.
        "conv_state": draw.integers(draw.batch, 3, size, low=-100, high=100) * 0.05,
        "activation": draw.one(None, "silu"),
        "conv_out_scale": draw.one(None, 0.05),
        "conv_out_zero_point": 3,
    }


def _scanned(draw: Draw, channels: int) -> Arguments:
    """What scans of Mamba-1 read besides activations."""
    states = draw.one(8, 16)
    return {
        "A": -draw.positive(channels, states, most=8.0),
        "D": draw.perhaps(draw.normal(channels)),
        "delta_bias": draw.normal(channels) - 2,
        "delta_softplus": True,
    }


def _selective_scan(draw: Draw) -> Arguments:
    channels = draw.width
    rest = _scanned(draw, channels)
    rows, states = (draw.batch, draw.length), rest["A"].shape[1]
    return {
        **rest,
        "u": draw.normal(*rows, channels),
        "delta": draw.normal(*rows, channels),
        "B": draw.normal(*rows, states),
        "C": draw.normal(*rows, states),
        "initial_state": draw.normal(draw.batch, channels, states),
    }


def _carried(draw: Draw, channels: int, states: int) -> tuple[Tensor, Tensor | None]:
    """A state, in float or int8, and the scales of the latter."""
    if draw.yes:
        return draw.normal(draw.batch, channels, states), None
    q = draw.integers(draw.batch, channels, states, low=-100, high=100)
    return q, draw.positive(channels, states, least=0.01, most=0.02)


def _qselective_scan(draw: Draw) -> Arguments:
    channels = draw.width
    rest = _scanned(draw, channels)
    rows, states = (draw.batch, draw.length), rest["A"].shape[1]
    state, state_scale = _carried(draw, channels, states)
    grids = {"u": channels, "delta": channels, "B": states, "C": states}
    return {
        **rest,
        **{key: value for name, width in grids.items() for key, value in draw.grid(name, *rows, width).items()},
        "initial_state": state,
        "state_scale": state_scale,
        "out_scale": draw.one(None, 0.1),
        "out_zero_point": 3,
    }


def _scan_step(draw: Draw) -> Arguments:
    channels = draw.width
    linear, rest = _linear(draw, channels, whole=True), _scanned(draw, channels)
    states = rest["A"].shape[1]
    state, state_scale = _carried(draw, channels, states)
    grids = {"u": channels, "B": states, "C": states}
    return {
        **{name: linear[name] for name in ("q", "weight", "scale", "correction", "bias")},
        "delta_scale": 0.05,
        "delta_zero_point": -20,
        **rest,
        **{key: value for name, width in grids.items() for key, value in draw.grid(name, draw.batch, 1, width).items()},
        "state": state,
        "state_scale": state_scale,
        "out_scale": draw.one(None, 0.1),
        "out_zero_point": 3,
    }


def _ssd(draw: Draw) -> tuple[Arguments, dict[str, tuple[int, ...]]]:
    """What scans of Mamba-2 read besides activations, and the shapes of those."""
    headdim = 16 if max(draw.width, 16) < 100 else 64
    heads, states = max(1, draw.width // headdim), 2 * headdim
    rows = (draw.batch, draw.length)
    rest = {
        "A": -draw.positive(heads, most=8.0),
        "D": draw.perhaps(draw.normal(heads)),
        "dt_bias": draw.normal(heads) - 2,
        "dt_softplus": True,
        "dt_min": 0.0,
        "initial_state": draw.normal(draw.batch, heads, headdim, states),
    }
    matrix = (*rows, 1, states)
    return rest, {"x": (*rows, heads, headdim), "dt": (*rows, heads), "B": matrix, "C": matrix}


def _ssd_scan(draw: Draw) -> Arguments:
    rest, shapes = _ssd(draw)
    return {**rest, **{name: draw.normal(*shape) for name, shape in shapes.items()}}


def _qssd_scan(draw: Draw) -> Arguments:
    rest, shapes = _ssd(draw)
    grids = [draw.grid(name, *shape) for name, shape in shapes.items()]
    rest |= {key: value for grid in grids for key, value in grid.items()}
    return {**rest, "out_scale": draw.one(None, 0.1), "out_zero_point": 3}


def _rotated(draw: Draw) -> int:
    """A width that a rotation takes."""
    return draw.width // 16 * 16 if max(draw.width, 16) < 100 else int(draw.one(768, 1536, 2560, 5120))


def _gate(draw: Draw) -> Arguments:
    n = _rotated(draw)
    shape = (draw.batch, draw.length, n)
    return {
        "y": draw.normal(*shape),
        "z": draw.normal(*shape),
        "s": draw.perhaps(draw.positive(n) + 0.5),
        "hadamard": draw.yes,
    }


def _int8_gate(draw: Draw) -> Arguments:
    n = _rotated(draw)
    shape = (draw.batch, draw.length, n)
    return {
        **draw.grid("y", *shape),
        **draw.grid("z", *shape),
        "s": draw.perhaps(draw.positive(n) + 0.5),
        "hadamard": draw.yes,
        "out_scale": draw.one(None, 0.05),
        "out_zero_point": 3,
    }


def _hadamard(draw: Draw) -> Arguments:
    n = _rotated(draw)
    return {"x": draw.normal(draw.batch, draw.length, n), "scale": draw.perhaps(draw.positive(n) + 0.5)}


def _norm(draw: Draw) -> Arguments:
    n = draw.width
    x = draw.normal(draw.batch, draw.length, n)
    return {
        "x": x,
        "residual": draw.perhaps(x.flip(-1)),
        "weight": draw.perhaps(draw.positive(n) + 0.5),
        "eps": 1e-5,
        "out_scale": draw.one(None, 0.05),
        "out_zero_point": 3,
    }


_PLAIN: Mapping[str, Callable[[Draw], Arguments]] = {
    "linears_rows": _linears_rows,
    "linear_rows": _linear_rows,
    "qcausal_conv1d": _qcausal_conv1d,
    "qselective_scan": _qselective_scan,
    "int8_gate": _int8_gate,
    "int8_rms_norm": _norm,
    "int8_conv_step_": _conv_step,
    "int8_scan_step_": _scan_step,
    "linear_rows_weight_only": _linear_rows_weight_only,
    "qssd_scan": _qssd_scan,
    "causal_conv1d": _causal_conv1d,
    "selective_scan": _selective_scan,
    "ssd_scan": _ssd_scan,
    "gate": _gate,
    "hadamard": _hadamard,
}
STEPS = ("int8_conv_step_", "int8_scan_step_", *(f"{name}_" for name in STATEFUL))
"""Operators that are for one token a sequence, or are there for that."""

DRAWN: Mapping[str, Callable[[Draw], Arguments]] = {**_PLAIN, **{f"{name}_": _PLAIN[name] for name in STATEFUL}}
"""What draws the arguments of an operator, the bundled model's operators first."""


def drawn(operator: str, seed: int, widths: tuple[int, ...], length: int) -> list[Any]:
    """Arguments of one call, in order; defaults stand for what was not drawn."""
    given = DRAWN[operator](Draw(f"{operator} {seed}", widths, 1 if operator in STEPS else length))
    schema: Any = getattr(torch.ops.mq_ao, operator).default._schema
    names = {argument.name for argument in schema.arguments}
    assert given.keys() <= names, f"{operator} has no {given.keys() - names}"
    return [given.get(item.name, item.default_value) for item in schema.arguments]


def shapes_of(args: Sequence[Any]) -> list[str]:
    """The tensors among arguments, for people."""
    return [f"{str(arg.dtype).removeprefix('torch.')} {tuple(arg.shape)}" for arg in args if isinstance(arg, Tensor)]
