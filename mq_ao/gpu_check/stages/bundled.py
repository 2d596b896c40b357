"""The bundled language model, quantized: the program on the GPU against the same program on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mq_ao.gpu_check.checks import CheckFailed
from mq_ao.gpu_check.devices import engaged, on_the_cpu
from mq_ao.gpu_check.prepared import (
    RECIPES,
    bits_per_byte,
    language_file,
    prepare_language,
    prepared,
    prompt_of,
)
from mq_ao.gpu_check.settings import Setting
from mq_ao.lowering.cuda import CudaProgram, Mode

_NEAR = 0.02
"""Relative distance of logits, less than quantization itself moves them by: values at a border of two integers go
another way where sums are in another order, which the next layers carry on."""

_BITS = 2e-4
"""Of bits per byte; judged on texts of at least `_ENOUGH` bytes, where such values average out."""

_ENOUGH = 4096


def parts(setting: Setting) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """See `stages`."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    models = {recipe: _Bundled(setting, recipe) for recipe in RECIPES}

    def ready() -> torch.device:
        if setting.rehearsal:  # from then on the CPU runs the interpreter, which is to be compared and not to prepare
            for model in models.values():
                model.opened()
        return engaged(setting)

    for recipe, model in models.items():
        model.ready = ready
        found |= {
            f"{recipe}, operator by operator": partial(model.logits, Mode.EAGER),
            f"{recipe}, compiled": partial(model.logits, Mode(setting.mode)),
            f"{recipe}, bits per byte": model.bits,
            f"{recipe}, text": model.text,
        }
    return found


class _Bundled:
    """The model in one recipe.

    Attributes:
        ready: gives the device once everything is there that is computed on the CPU.
    """

    ready: Callable[[], torch.device]

    def __init__(self, setting: Setting, recipe: str) -> None:
        self._setting, self._recipe = setting, recipe
        self._program = cache(self._placed)
        self.opened = cache(self._opened)

    def _opened(self) -> tuple[CudaProgram, dict[str, Tensor]]:
        """The program on the CPU, and what is expected of it."""
        on_the_cpu()
        make = partial(prepare_language, self._setting.sizes, self._recipe)
        with prepared(self._setting, language_file(self._recipe), make) as (path, expected):
            return CudaProgram.load(path, "cpu", Mode.EAGER), expected

    def _placed(self, mode: Mode) -> CudaProgram:
        program, _ = self.opened()
        return program.on(self.ready(), mode)

    def logits(self, mode: Mode) -> dict[str, Any]:
        """How far they are from those on the CPU.

        Raises:
            CheckFailed: too far.
        """
        _, expected = self.opened()
        wanted = expected["logits"]
        got, *_ = self._program(mode)(prompt_of(self._setting.sizes)[:, : wanted.shape[1]])
        got = got.float().cpu()
        off = float((got - wanted).norm() / wanted.norm())
        same = float((got.argmax(-1) == wanted.argmax(-1)).double().mean())
        result = {"mode": str(mode), "off": off, "allowed": _NEAR, "same_likeliest": same}
        if not off <= _NEAR:
            raise CheckFailed(f"logits are {off:.3g} off those of the same program on the CPU", result)
        return result

    def bits(self) -> dict[str, Any]:
        """Bits per byte, beside those on the CPU.

        Raises:
            CheckFailed: they differ by more than roundings explain.
        """
        _, expected = self.opened()
        text, wanted = int(expected["bytes"]), float(expected["bits"])
        got = bits_per_byte(self._program(Mode(self._setting.mode)), text)
        result = {"bytes": text, "gpu": got, "cpu": wanted, "relative": got / wanted - 1, "allowed": _BITS}
        if text >= _ENOUGH and not abs(got / wanted - 1) <= _BITS:
            raise CheckFailed(f"bits per byte are {got / wanted - 1:+.4%} off those of the same program", result)
        return result

    def text(self) -> dict[str, Any]:
        """The likeliest continuation, beside that on the CPU. It may differ: it is told, and not judged."""
        _, expected = self.opened()
        wanted, prompt = expected["written"], prompt_of(self._setting.sizes)
        got = self._program(Mode(self._setting.mode)).generate(prompt, wanted.shape[1] - prompt.shape[1]).cpu()
        same = (got == wanted).long().cumprod(1)
        return {
            "equal": torch.equal(got, wanted),
            "tokens": wanted.shape[1] - prompt.shape[1],
            "equal_tokens": int(same.sum()) - prompt.shape[1],
            "gpu": bytes(got[0].tolist()).decode(errors="replace"),
            "cpu": bytes(wanted[0].tolist()).decode(errors="replace"),
        }
