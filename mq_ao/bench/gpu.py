"""A bench of one model on a GPU: fp16 in eager mode, compiled, by mamba_ssm's kernels, and our quantized programs.

Everything runs in this process, in turns. The device is a parameter, so that all of it but the GPU's own kernels can be
rehearsed on the CPU. It was not run on a GPU.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mq_ao import api
from mq_ao.bench import peer_mamba_ssm
from mq_ao.bench.contender import Contender, Eager, Program
from mq_ao.bench.prepare import Step, calibration_of, int8_names, random_ids
from mq_ao.lowering.cuda import CudaProgram, Mode, lower_float, require_cuda
from mq_ao.models import MambaLM
from mq_ao.recipes import Recipe

_CHECKED_TOKENS = 32
_WARM_UP = 3


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        tokens: prefill lengths.
        decode_tokens: tokens of a decode measurement.
        repeats: rounds; medians over them are reported.
        dtype: of the float contenders.
        mode: how our programs are compiled.
    """

    tokens: tuple[int, ...] = (128, 1024)
    decode_tokens: int = 64
    repeats: int = 20
    dtype: torch.dtype = torch.float16
    mode: Mode = Mode.CUDA_GRAPHS


@dataclass
class Row:
    """What was measured of one contender.

    Attributes:
        name: of the contender.
        prefill_ms: median by length.
        decode_ms: median of a token.
        weight_bytes: of its weights.
        memory_bytes: most that is allocated on the GPU in a prefill, beyond what others hold; None without one.
        error: relative distance of its logits from those of the same program on the CPU; None for float contenders.
    """

    name: str
    weight_bytes: int
    prefill_ms: dict[int, float] = field(default_factory=dict)
    decode_ms: float = 0.0
    memory_bytes: int | None = None
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def run(
    model: MambaLM, recipes: Sequence[Recipe], plan: Plan, device: torch.device, step: Step
) -> tuple[list[Row], list[str]]:
    """Opens all contenders, checks ours against the CPU, and times them in turns.

    Args:
        model: float model, on the CPU; it is not changed.
        recipes: how ours is quantized; each makes a contender.
        plan: what is measured.
        device: where.
        step: shows what is being done.

    Returns:
        A row for each contender, the first of which the others are set against; and what was left out, and why.

    Raises:
        MqAoError: there is no such device, or the model cannot be quantized.
    """
    if device.type == "cuda":
        require_cuda(device)
    opened: dict[str, Contender] = {}
    rows: dict[str, Row] = {}
    left_out: list[str] = []
    vocab_size = model.config.vocab_size

    def add(name: str, make: Callable[[], Contender]) -> None:
        ids = token_ids(vocab_size, _CHECKED_TOKENS, device)
        with step(f"opening {name}"):
            before = allocated(device)
            opened[name] = make()
            opened[name].prefill(ids)  # compiles, and tries configurations with memory of their own
            opened[name].decode(ids[:, :2])
            most = peak(device, lambda: opened[name].prefill(ids))
        rows[name] = Row(name, opened[name].weight_bytes, memory_bytes=None if most is None else most - before)

    label = str(plan.dtype).removeprefix("torch.")
    add(f"{label} eager", lambda: Eager(_floats(model, plan.dtype, device)))
    add(f"{label} compiled", lambda: compiled_float(_floats(model, plan.dtype, torch.device("cpu")), device, plan.mode))
    if (missing := peer_mamba_ssm.missing(model.config)) is None:
        add(f"{label} mamba_ssm", lambda: peer_mamba_ssm.MambaSsm(model.config, plan.dtype, device))
    else:
        left_out.append(f"mamba_ssm's kernels: {missing}")
    for name, recipe in zip(int8_names(recipes), recipes, strict=True):
        with step(f"quantizing ({recipe.name})"):
            program = api.quantize(model, calibration_of(model), recipe, backend="cuda").lower()
        assert isinstance(program, CudaProgram)
        add(name, partial(_program, program, device, plan.mode))
        rows[name].error = distance(opened[name], Program(program), token_ids(vocab_size, _CHECKED_TOKENS, device))
    _time(opened, rows, plan, device, vocab_size, step)
    return list(rows.values()), left_out


def _time(
    opened: Mapping[str, Contender],
    rows: Mapping[str, Row],
    plan: Plan,
    device: torch.device,
    vocab_size: int,
    step: Step,
) -> None:
    """Fills in the times: every contender once a round."""
    for tokens in plan.tokens:
        ids = token_ids(vocab_size, tokens, device)
        with step(f"prefill, {tokens} tokens"):
            times = turns(opened, "prefill", ids, plan.repeats, device)
        for name, seconds in times.items():
            rows[name].prefill_ms[tokens] = 1e3 * seconds
    ids = token_ids(vocab_size, plan.decode_tokens, device)
    with step(f"decode, {plan.decode_tokens} tokens"):
        times = turns(opened, "decode", ids, plan.repeats, device)
    for name, seconds in times.items():
        rows[name].decode_ms = 1e3 * seconds / plan.decode_tokens


def turns(
    opened: Mapping[str, Contender], method: str, ids: Tensor, repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of a call of a method, by contender; the first few calls do not count."""
    taken: dict[str, list[float]] = {name: [] for name in opened}
    for index in range(-_WARM_UP, repeats):
        for name, contender in opened.items():
            wait(device)
            started = time.perf_counter()
            getattr(contender, method)(ids)
            wait(device)
            if index >= 0:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes that are allocated on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device, call: Callable[[], object]) -> int | None:
    """The most bytes that are allocated on a GPU during a call; None without one."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device)


def token_ids(vocab_size: int, count: int, device: torch.device, batch: int = 1) -> Tensor:
    """Random tokens (batch, count), the same each time."""
    return torch.tensor(random_ids(vocab_size, batch * count), device=device).view(batch, count)


def _floats(model: MambaLM, dtype: torch.dtype, device: torch.device) -> MambaLM:
    return copy.deepcopy(model).to(device, dtype)


def _program(program: CudaProgram, device: torch.device, mode: Mode) -> Program:
    return Program(program.on(device, mode))


def compiled_float(model: MambaLM, device: torch.device, mode: Mode) -> Program:
    """The float graph, made a program as the integer graphs are, in the model's own dtype and not in fp32."""
    info = {"recipe": str(next(model.parameters()).dtype), "vocab_size": model.config.vocab_size}
    return _program(lower_float(api.capture(model, ()), info), device, mode)


def distance(one: Contender, other: Contender, ids: Tensor) -> float:
    """Relative L2 distance of the logits of one from those of another, which runs on the CPU."""
    got, expected = one.prefill(ids).cpu().float(), other.prefill(ids.cpu()).float()
    return float((got - expected).norm() / expected.norm())
