"""A model with random weights: our programs against fp16 in eager mode and compiled, in turns.

Weights are drawn and rounded to nearest, and activations' ranges are those of a few tokens: as `roofline.at_run_time`
says, the same kernels run as of a real model, which its values do not change. Where a model is not built with all its
layers, times of two depths are measured, and that of the whole one is an estimate, which is called so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mq_ao.bench.contender import Contender
from mq_ao.bench.gpu import peak, token_ids, turns
from mq_ao.errors import first_line
from mq_ao.gpu_check.checks import CheckFailed, Skipped
from mq_ao.gpu_check.contenders import COMPILED, EAGER, OURS, Depth, opened
from mq_ao.gpu_check.devices import chip, engaged
from mq_ao.gpu_check.profiling import kernel_times
from mq_ao.gpu_check.settings import Setting, Shape
from mq_ao.lowering.cuda.decode_graph import one_token
from mq_ao.lowering.language_graphs import states_of
from mq_ao.roofline import Prediction, count, predict

_NEAR = 0.02
"""Relative distance of logits from those of the same program on the CPU: values at a border of two integers go another
way, which the next layers carry on. Quantization itself moves the bundled model's by more."""


def parts(setting: Setting, shape: str, phase: str) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """See `stages`."""
    found = setting.sizes.shapes[shape]
    speed = _Speed(setting, shape, found)
    if phase == "decode":
        timed = {f"{batch} sequences": partial(speed.decode, batch) for batch in found.batches}
        profile = partial(speed.profile_decode, found.batches[0])
    else:
        timed = {f"{batch} x {tokens} tokens": partial(speed.prefill, batch, tokens) for batch, tokens in found.prompts}
        profile = partial(speed.profile_prefill, *found.prompts[0])
    return {"contenders": speed.opened, **timed, "kernels": profile}


class _Speed:
    """One shape on one device; opened at the first part that needs it."""

    def __init__(self, setting: Setting, name: str, shape: Shape) -> None:
        self._setting, self._name, self._shape = setting, name, shape
        self._vocabulary = shape.config.vocab_size

    def opened(self) -> dict[str, Any]:
        """Weights, memory, and how far logits are from the CPU's.

        Raises:
            CheckFailed: a contender cannot be opened, or its logits are off.
        """
        result = {f"{depth.layers} layers": {**depth.figures, **_reasons(depth)} for depth in self._depths}
        for depth in self._depths:
            if depth.failures:
                raise CheckFailed(next(f"{name}: {why}" for name, why in depth.failures.items()), result)
            for name, figures in depth.figures.items():
                if not figures.get("logits_off", 0.0) <= _NEAR:
                    raise CheckFailed(f"{name}: logits are {figures['logits_off']:.3g} off those on the CPU", result)
        return result

    def decode(self, batch: int) -> dict[str, Any]:
        """Milliseconds of a step of so many sequences."""
        ids = token_ids(self._vocabulary, self._setting.sizes.decoded, self._device, batch)
        return self._timed("decode", ids, batch, 1, lambda graph: one_token(graph, states_of(graph)))

    def prefill(self, batch: int, tokens: int) -> dict[str, Any]:
        """Milliseconds of a prompt of so many tokens, of which the last one's logits are given."""
        ids = token_ids(self._vocabulary, tokens, self._device, batch)
        return self._timed("prefill", ids, batch, tokens, lambda graph: graph)

    def profile_decode(self, batch: int) -> dict[str, Any]:
        """Times of the kernels in a step."""
        ids = token_ids(self._vocabulary, 1, self._device, batch)
        return self._profiled("decode", ids, batch, 1, lambda graph: one_token(graph, states_of(graph)))

    def profile_prefill(self, batch: int, tokens: int) -> dict[str, Any]:
        """Times of the kernels in a prefill."""
        ids = token_ids(self._vocabulary, tokens, self._device, batch)
        return self._profiled("prefill", ids, batch, tokens, lambda graph: graph)

    @cached_property
    def _device(self) -> torch.device:
        assert self._depths
        return engaged(self._setting)

    @cached_property
    def _depths(self) -> list[Depth]:
        return opened(self._setting, self._name, self._shape)

    @torch.no_grad()
    def _timed(
        self, method: str, ids: Tensor, batch: int, tokens: int, graph_of: Callable[[GraphModule], GraphModule]
    ) -> dict[str, Any]:
        """Every contender of every depth in turns, beside what is predicted.

        Raises:
            CheckFailed: one of them fails; the others have figures.
        """
        running: dict[str, Contender] = {}
        memory: dict[str, int | None] = {}
        failures: dict[str, str] = {}
        for depth in self._depths:
            for name, contender in depth.contenders.items():
                key = f"{name}, {depth.layers}"
                try:
                    contender.prefill(ids[:, :1])  # by the program of one step: it starts the states
                    getattr(contender, method)(ids)  # compiles
                    memory[key] = peak(self._device, partial(getattr(contender, method), ids))
                    running[key] = contender
                except Exception as error:
                    failures[key] = f"{type(error).__name__}: {first_line(error)}"
        seconds = turns(running, method, ids, self._setting.sizes.repeats, self._device)
        calls = ids.shape[1] if method == "decode" else 1
        rows = {name: self._row(name, seconds, calls, memory) for name in (EAGER, COMPILED, *OURS)}
        last = f", {self._depths[-1].layers}"
        for name, row in rows.items():
            if row["ms"]:
                self._predict(row, name, batch, tokens, graph_of)
            if f"{name}{last}" in seconds and f"{COMPILED}{last}" in seconds:
                row["times_as_fast"] = seconds[f"{COMPILED}{last}"] / seconds[f"{name}{last}"]
            ours, theirs = (item.get("whole_ms_estimated") for item in (row, rows[COMPILED]))
            if ours is not None and theirs is not None:
                row["whole_times_as_fast_estimated"] = theirs / ours
        result = {"layers": [depth.layers for depth in self._depths], "of": self._shape.config.n_layer, "rows": rows}
        if failures:
            raise CheckFailed(next(f"{key}: {why}" for key, why in failures.items()), {**result, "failures": failures})
        return result

    def _row(
        self, name: str, seconds: Mapping[str, float], calls: int, memory: Mapping[str, int | None]
    ) -> dict[str, Any]:
        """Milliseconds of one contender by layers, and an estimate for all layers."""
        keys = {depth.layers: f"{name}, {depth.layers}" for depth in self._depths}
        ms = {layers: 1e3 * seconds[key] / calls for layers, key in keys.items() if key in seconds}
        row: dict[str, Any] = {"ms": ms, "peak_bytes": {layers: memory.get(key) for layers, key in keys.items()}}
        if len(ms) == 2:
            (few, short), (many, long) = ms.items()
            row["whole_ms_estimated"] = long + (self._shape.config.n_layer - many) * (long - short) / (many - few)
        return row

    def _predict(
        self, row: dict[str, Any], name: str, batch: int, tokens: int, graph_of: Callable[[GraphModule], GraphModule]
    ) -> None:
        """Adds what the roofline says of the deepest one, if it knows the device and the contender has a graph."""
        try:
            predicted = self._predicted(name, batch, tokens, graph_of)
        except Skipped as reason:
            row["predicted"] = str(reason)
            return
        if predicted is None:
            return
        deepest = row["ms"].get(self._depths[-1].layers)
        row |= {"predicted_ms": 1e3 * predicted.seconds, "predicted_bytes": predicted.cost.moved}
        if deepest is not None:
            row |= {
                "measured_over_predicted": deepest / (1e3 * predicted.seconds),
                "share_of_bandwidth": predicted.cost.moved / (deepest / 1e3) / chip(self._setting).bandwidth,
            }

    def _predicted(
        self, name: str, batch: int, tokens: int, graph_of: Callable[[GraphModule], GraphModule]
    ) -> Prediction | None:
        graph, device = self._depths[-1].graphs.get(name), chip(self._setting)
        return None if graph is None else predict(count(graph_of(graph), batch, tokens, device), device)

    @torch.no_grad()
    def _profiled(
        self, method: str, ids: Tensor, batch: int, tokens: int, graph_of: Callable[[GraphModule], GraphModule]
    ) -> dict[str, Any]:
        """Kernels of every program, the longest first, beside the predicted ones."""
        found: dict[str, Any] = {}
        for name in (COMPILED, *OURS):
            contender = self._depths[-1].contenders.get(name)
            if contender is None:
                continue
            contender.prefill(ids[:, :1])
            getattr(contender, method)(ids)
            found[name] = {"measured": kernel_times(partial(getattr(contender, method), ids), self._device)}
            try:
                predicted = self._predicted(name, batch, tokens, graph_of)
            except Skipped as reason:
                found[name]["predicted"] = str(reason)
                continue
            lines = [] if predicted is None else predicted.lines
            found[name]["predicted"] = [
                {"role": line.role, "operator": line.operator, "kernels": line.cost.kernels, "us": 1e6 * line.seconds}
                for line in lines
            ]
        return found


def _reasons(depth: Depth) -> dict[str, Any]:
    return {"failures": depth.failures} if depth.failures else {}
