"""What a speed is measured of: fp16 in eager mode and compiled, and our programs, with some of a model's layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mq_ao.bench.contender import Contender, Eager, Program
from mq_ao.bench.gpu import allocated, token_ids
from mq_ao.errors import first_line
from mq_ao.gpu_check.devices import check_room, engaged, on_the_cpu
from mq_ao.gpu_check.settings import Setting, Shape
from mq_ao.lowering.cuda import CudaProgram, Mode, program_of
from mq_ao.models import Mamba2Config, MambaConfig
from mq_ao.recipes import get_recipe
from mq_ao.roofline import at_run_time, float_graph, integer_graph, random_model

EAGER, COMPILED = "fp16 eager", "fp16 compiled"
OURS = {"W8A8": "mambaquant-w8a8", "W4A8": "mambaquant-w4a8"}
"""Our contenders, and their recipes."""

_CHECKED = 8


@dataclass
class Depth:
    """The contenders with so many layers.

    Attributes:
        layers: how many.
        contenders: by name.
        graphs: of those that have one, on the CPU: what is predicted of them.
        failures: why others are missing.
        figures: what was found while they were opened.
    """

    layers: int
    contenders: dict[str, Contender] = field(default_factory=dict)
    graphs: dict[str, GraphModule] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)


class _Built:
    """Programs with so many layers, and what ours give, on the CPU.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: MambaConfig | Mamba2Config) -> None:
        on_the_cpu()
        self.config = config
        self.graphs: dict[str, GraphModule] = {}
        self.programs: dict[str, CudaProgram] = {}
        self.failures: dict[str, str] = {}
        self.logits: dict[str, Tensor] = {}
        model = random_model(config)
        self.half = copy.deepcopy(model).half()
        self._build(COMPILED, partial(float_graph, config, self.half))
        for name, recipe in OURS.items():
            self._build(name, partial(integer_graph, config, at_run_time(get_recipe(recipe)), model))
        ids = _checked_ids(config.vocab_size, torch.device("cpu"))
        for name in OURS:
            if name in self.programs:
                self.logits[name] = Program(self.programs[name]).prefill(ids)

    def _build(self, name: str, make: Callable[[], GraphModule]) -> None:
        try:
            self.graphs[name] = make()
            info = {"vocab_size": self.config.vocab_size, "recipe": name}
            self.programs[name] = program_of(self.graphs[name], info)
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {first_line(error)}"


def _checked_ids(vocabulary: int, device: torch.device) -> Tensor:
    return token_ids(vocabulary, _CHECKED, device)


def _off(got: Tensor, wanted: Tensor) -> float:
    """Relative distance of logits."""
    return float((got.cpu().float() - wanted.float()).norm() / wanted.float().norm())


def opened(setting: Setting, name: str, shape: Shape) -> list[Depth]:
    """The contenders of every depth, on the device.

    Raises:
        Skipped: the device's memory is too small for them.
    """
    config, deepest = shape.config, max(shape.depths)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in random_model(replace(config, n_layer=deepest)).parameters())
    # fp16 twice, int8, int4 and their scales, and as much again for what is computed.
    check_room(setting, f"{name} with {deepest} layers", 2 * 6 * weights)
    # All of them before a rehearsal has the CPU run the interpreter.
    built = [_Built(replace(config, n_layer=layers)) for layers in shape.depths]
    device = engaged(setting)
    return [_placed(item, device, Mode(setting.mode)) for item in built]


def _placed(built: _Built, device: torch.device, mode: Mode) -> Depth:
    """The contenders on the device; the logits of our programs are compared on the way."""
    depth = Depth(built.config.n_layer, graphs=built.graphs, failures=built.failures)
    # A copy: its weights are the graph's too.
    _place(depth, EAGER, device, lambda: Eager(copy.deepcopy(built.half).to(device)))
    for name, program in built.programs.items():
        if name in built.logits:
            _place(depth, name, device, partial(_on, program, device, Mode.EAGER))
        if name in built.logits and name in depth.contenders:
            ids = _checked_ids(built.config.vocab_size, device)
            depth.figures[name]["logits_off"] = _off(depth.contenders[name].prefill(ids), built.logits[name])
        if name not in depth.failures:
            _place(depth, name, device, partial(_on, program, device, mode))
    return depth


def _place(depth: Depth, name: str, device: torch.device, make: Callable[[], Contender]) -> None:
    """Puts a contender on the device, in the place of one of that name."""
    depth.contenders.pop(name, None)
    before = allocated(device)
    try:
        depth.contenders[name] = made = make()
    except Exception as error:
        depth.failures[name] = f"{type(error).__name__}: {first_line(error)}"
        return
    figures = depth.figures.setdefault(name, {})
    figures |= {"weight_bytes": made.weight_bytes, "allocated_bytes": allocated(device) - before}


def _on(program: CudaProgram, device: torch.device, mode: Mode) -> Program:
    return Program(program.on(device, mode))
