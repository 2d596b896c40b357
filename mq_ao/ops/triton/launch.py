"""Launching Triton kernels: tuned on a GPU, interpreted on CPU tensors, or only written down for the offline compiler.

A kernel's constants that depend on the chip are its configurations. On a GPU the fastest for each value of the key is
found at the first call; interpreted, the first one is taken. `using` says another, in both cases.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mq_ao.errors import MqAoError

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]


class Config:
    """One way to compile a kernel.

    Args:
        num_warps: warps of a program.
        num_stages: loads that the compiler keeps in flight in loops.
        constants: the kernel's constants that this configuration sets.
    """

    def __init__(self, num_warps: int = 4, num_stages: int = 2, **constants: int) -> None:
        self.num_warps = num_warps
        self.num_stages = num_stages
        self.constants = constants

    def __str__(self) -> str:
        values = [f"{name.lower()} {value}" for name, value in self.constants.items()]
        return ", ".join([*values, f"warps {self.num_warps}", f"stages {self.num_stages}"])


class Kernel:
    """A Triton function with its configurations.

    Args:
        function: what `triton.jit` gives.
        configs: the ways to compile it, the most generally useful one first.
        key: arguments for each value of which the fastest configuration is looked for.
        changes: tensors that the kernel may read and then overwrite: they are put back after each try.
    """

    def __init__(
        self, function: Any, configs: tuple[Config, ...], key: tuple[str, ...] = (), changes: tuple[str, ...] = ()
    ) -> None:
        self.function = function
        self.configs = configs
        self.key = key
        self.changes = changes

    @property
    def name(self) -> str:
        """Name of the Triton function."""
        return str(self.function.fn.__name__)

    @property
    def parameters(self) -> list[str]:
        """Names of the function's parameters, in order."""
        return list(inspect.signature(self.function.fn).parameters)

    @functools.cached_property
    def _tuned(self) -> Any:
        configs = [
            triton.Config(config.constants, num_warps=config.num_warps, num_stages=config.num_stages)
            for config in self.configs
        ]
        return triton.autotune(configs=configs, key=list(self.key), restore_value=list(self.changes))(self.function)

    def launch(self, grid: Grid, *args: Any, **constants: Any) -> None:
        """Runs the kernel.

        Args:
            grid: number of programs along each axis, from all constants.
            args: tensors, numbers and None, as the function's first parameters.
            constants: the constants that no configuration sets.

        Raises:
            MqAoError: the tensors are not on a GPU, and Triton does not interpret.
        """
        if (written := _written.get()) is not None:
            written.append(Launch(self, grid, args, constants))
            return
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        index = _config.get()
        if device.type == "cuda":
            with torch.cuda.device(device):  # Triton launches on the current one
                if index is None:
                    self._tuned[grid](*args, **constants)
                else:
                    config = self._config(index)
                    everything = {**constants, **config.constants}
                    ways = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                    self.function[grid(everything)](*args, **everything, **ways)
            return
        if isinstance(self.function, triton.JITFunction):
            raise MqAoError(
                f"the Triton kernel {self.name} runs on CUDA tensors, or with TRITON_INTERPRET=1 set before mq_ao is "
                f"imported; these are on {device}."
            )
        from mq_ao.compat.triton_interpreter import mended

        everything = {**constants, **self._config(index or 0).constants}
        with mended():
            self.function[grid(everything)](*args, **everything)

    def _config(self, index: int) -> Config:
        return self.configs[index % len(self.configs)]


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of an example: without memory, of which a kernel's compilation needs to know no more."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Launch:
    """A launch that was written down instead of being run.

    Attributes:
        kernel: what was launched.
        grid: see `Kernel.launch`.
        args: tensors (of any device, "meta" too), numbers and None.
        constants: those that no configuration sets.
    """

    kernel: Kernel
    grid: Grid
    args: tuple[Any, ...]
    constants: Mapping[str, Any]


_written: ContextVar[list[Launch] | None] = ContextVar("written", default=None)
_config: ContextVar[int | None] = ContextVar("config", default=None)


@contextmanager
def written_down() -> Iterator[list[Launch]]:
    """Within it, launches go into the list that it gives, and nothing runs."""
    launches: list[Launch] = []
    token = _written.set(launches)
    try:
        yield launches
    finally:
        _written.reset(token)


@contextmanager
def using(index: int) -> Iterator[None]:
    """Within it, kernels take the configuration of that index, counted round where there are fewer."""
    token = _config.set(index)
    try:
        yield
    finally:
        _config.reset(token)
