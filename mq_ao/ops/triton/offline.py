"""Compiles Triton kernels for GPUs that are not there, and says what they take of one.

Registers, stack and shared memory are read from the compiled code with the `cuobjdump` that comes with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mq_ao.errors import MqAoError
from mq_ao.ops.triton.launch import Config, Launch

SHARED_LIMITS: Mapping[int, int] = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may have, by compute capability: CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"."""

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities times ten: Ampere, Hopper, Blackwell."""

_TYPES = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
_LARGEST_INT32 = 2**31 - 1
# As the launcher does it: pointers and whole numbers that are known to be multiples of 16 can be read in wide words.
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        kernel: name of the Triton function.
        config: the configuration.
        architecture: compute capability times ten.
        registers: of a thread.
        spilled: bytes of stack of a thread: values that found no register, or arrays.
        shared: bytes of shared memory of a program.
    """

    kernel: str
    config: str
    architecture: int
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled, and the shared memory is there."""
        return self.spilled == 0 and self.shared <= SHARED_LIMITS[self.architecture]


def compile_launches(launches: Iterable[Launch], architecture: int) -> Iterator[Resources]:
    """Compiles every configuration of launches that `launch.written_down` gave.

    Args:
        launches: those that differ in nothing but sizes are compiled once.
        architecture: compute capability times ten, of `SHARED_LIMITS`.

    Raises:
        MqAoError: Triton interprets, so that there is nothing to compile.
    """
    done = set()
    for launch in launches:
        if not isinstance(launch.kernel.function, triton.JITFunction):
            raise MqAoError("Triton interprets kernels here and cannot compile them: unset TRITON_INTERPRET.")
        for config in launch.kernel.configs:
            source = _source(launch, config)
            key = (launch.kernel.name, str(config), repr(source.signature), repr(source.constants), repr(source.attrs))
            if key in done:
                continue
            done.add(key)
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            registers, stack = _usage(compiled.asm["cubin"])
            yield Resources(
                launch.kernel.name, str(config), architecture, registers, stack, int(compiled.metadata.shared)
            )


def _source(launch: Launch, config: Config) -> ASTSource:
    """The function with types and constants as Triton's own launcher derives them from arguments."""
    names = launch.kernel.parameters
    constants: dict[str, Any] = {**launch.constants, **config.constants}
    signature: dict[str, str] = {}
    attrs: dict[tuple[int], Any] = {}
    for index, (name, arg) in enumerate(zip(names, launch.args, strict=False)):
        if isinstance(arg, Tensor):
            signature[name], attrs[(index,)] = _TYPES[arg.dtype], _ALIGNED
        elif isinstance(arg, float):
            signature[name] = "fp32"
        elif arg is None or arg == 1:
            signature[name], constants[name] = "constexpr", arg
        else:
            signature[name] = "i32" if abs(arg) <= _LARGEST_INT32 else "i64"
            if arg % 16 == 0:
                attrs[(index,)] = _ALIGNED
    signature |= dict.fromkeys(names[len(launch.args) :], "constexpr")
    return ASTSource(launch.kernel.function, signature=signature, constexprs=constants, attrs=attrs)


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread of the one kernel in `cubin`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        shown = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    values = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown.stdout))
    return int(values["REG"]), int(values["STACK"]) + int(values["LOCAL"])
