"""Every way to compile each kernel, timed; the fastest beside the roofline's time for the operator.

On a GPU at the sizes of published models, each launch with a cold second-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mq_ao.errors import first_line
from mq_ao.gpu_check.checks import CheckFailed, Skipped
from mq_ao.gpu_check.devices import chip, engaged
from mq_ao.gpu_check.drawn import drawn, shapes_of
from mq_ao.gpu_check.settings import Setting
from mq_ao.gpu_check.timing import kernel_seconds
from mq_ao.roofline import Device, Line
from mq_ao.roofline.cost import Call, cost_of, tensors

_OPERATORS = (
    "int8_conv_step_",
    "int8_scan_step_",
    "linear_rows",
    "linears_rows",
    "qselective_scan",
    "int8_gate",
    "int8_rms_norm",
    "qcausal_conv1d",
    "linear_rows_weight_only",
    "qssd_scan",
)
"""Those of quantized programs, by what they take of a model's time."""


def parts(setting: Setting) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """See `stages`."""
    import mq_ao.ops.triton  # noqa: F401  (missing, it is the stage that fails)

    return {name: partial(_timed, setting, name) for name in _OPERATORS}


def _timed(setting: Setting, name: str) -> dict[str, Any]:
    """Every call of the operator.

    Raises:
        CheckFailed: a kernel fails in one of its configurations.
    """
    from mq_ao.ops.triton import IMPLEMENTATIONS
    from mq_ao.ops.triton.launch import using, written_down

    device = engaged(setting)
    calls, failures = [], []
    for args in _calls(setting, name, device):
        with written_down() as launches:
            IMPLEMENTATIONS[name].run(*args)
        rows, total = [], 0.0
        for launch in launches:
            times: dict[str, float | str] = {}
            for index, config in enumerate(launch.kernel.configs):
                try:
                    with using(index):
                        run = partial(launch.kernel.launch, launch.grid, *launch.args, **launch.constants)
                        times[str(config)] = 1e6 * kernel_seconds(run, device)
                except Exception as error:
                    times[str(config)] = first_line(error)
                    failures.append(f"{launch.kernel.name} ({config}): {first_line(error)}")
            measured = {config: us for config, us in times.items() if isinstance(us, float)}
            best = min(measured, key=lambda config: measured[config], default=None)
            rows.append({"kernel": launch.kernel.name, "us": times, "best": best})
            total += 0.0 if best is None else measured[best]
        figures = {"kernels": rows, "us": total, **_beside(setting, name, args, total)}
        calls.append({"arguments": shapes_of(args), **figures})
    if failures:
        raise CheckFailed(failures[0], {"calls": calls})
    return {"calls": calls}


def _calls(setting: Setting, name: str, device: torch.device) -> list[Sequence[Any]]:
    """Arguments on the device."""
    from mq_ao.ops.triton import IMPLEMENTATIONS

    if setting.sizes.published:
        return [[_filled(arg, device) for arg in args] for args in IMPLEMENTATIONS[name].examples()]
    lengths = setting.sizes.lengths[:2]
    args = [drawn(name, setting.seed, setting.sizes.widths, length) for length in lengths]
    return [[arg.to(device) if isinstance(arg, Tensor) else arg for arg in call] for call in args]


def _filled(arg: Any, device: torch.device) -> Any:
    """A tensor of an example with values in it: kernels' times hardly depend on them, but a chip's clock does."""
    if not isinstance(arg, Tensor):
        return arg
    made = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=device)
    return made.uniform_(0.01, 1.0) if made.is_floating_point() else made.random_(0, 100)


def _beside(setting: Setting, name: str, args: Sequence[Any], us: float) -> dict[str, Any]:
    """The predicted time, launches left out as in the measured one."""
    try:
        device = chip(setting)
    except Skipped as reason:
        return {"predicted": str(reason)}
    line = _line(name, args, device)
    predicted = 1e6 * (line.seconds - line.cost.kernels * device.launch)
    return {"predicted_us": predicted, "bound_by": line.bound, "measured_over_predicted": us / predicted}


def _line(name: str, args: Sequence[Any], device: Device) -> Line:
    schema: Any = getattr(torch.ops.mq_ao, name).default._schema
    # Given ones, and the defaults of the rest.
    values = [*args, *(item.default_value for item in schema.arguments[len(args) :])]
    arguments = {item.name: _meta(value) for item, value in zip(schema.arguments, values, strict=True)}
    results = tensors([getattr(torch.ops.mq_ao, name)(*arguments.values())])
    changed = [arguments[item.name] for item in schema.arguments if item.alias_info and item.alias_info.is_write]
    call = Call(f"mq_ao.{name}", arguments, (*results, *changed), device.multiprocessors)
    return Line.of("kernel", name, cost_of(call), device)


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
