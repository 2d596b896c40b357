"""Captures a module with torch.export."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import mq_ao.ops  # noqa: F401  (registers torch.ops.mq_ao)
from mq_ao.capture import attributes, by_hand, examples, mamba_ssm, mode_wrappers, transformers
from mq_ao.capture.examples import Call
from mq_ao.capture.frames import tensors
from mq_ao.capture.layout import ChannelLast
from mq_ao.capture.precision import outside_inference
from mq_ao.capture.replacing import Replacement, replaced
from mq_ao.capture.unwrapping import unwrapped
from mq_ao.compat.tracing import REFUSALS
from mq_ao.errors import MqAoError, first_line
from mq_ao.graph.canonical import canonicalise
from mq_ao.memory import is_out_of_memory
from mq_ao.modes import plain
from mq_ao.turns import in_turn

logger = logging.getLogger(__name__)

_ADAPTERS = (mamba_ssm, transformers)


@in_turn
@plain()
def export(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    scans: by_hand.Scans | None = None,
) -> ExportedProgram:
    """Captures `module` as one program for any batch and length, length 1 included.

    The module is taken as it is: the functions of mamba_ssm and transformers that it calls are replaced by our
    operators while it is traced, and put back afterwards. A model inside `torch.compile` or `nn.DataParallel` is taken
    out of it. Weights keep their dtype; an autocast in the model's own code is left out, and logged. Captures in
    several threads take turns. The module is changed while it is captured, and put back: let no other thread run it in
    the meantime. An autocast or inference mode around the call does not matter.

    Args:
        module: model in eval mode whose scan is mamba_ssm's, transformers' or `torch.ops.mq_ao.selective_scan`.
        args: example positional inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: as in torch.export, which takes a size of 1 for a constant; None lets every size vary that the
            model does not fix itself, batch and length of examples with one sequence or one token too.
        scans: functions of the model's own that compute a scan, such as {"MambaBlock.selective_scan":
            mq_ao.capture.SelectiveScan()}: our operator is captured in their place, if it computes the same. A key is
            "path.of.submodule.method", "Class.method", "package.function" or the function itself.

    Returns:
        Program over aten and mq_ao operators.

    Raises:
        MqAoError: the module or a part of it is in training mode, an input is empty or does not fit it, its scan is of
            a kind that there is no operator for or a loop in Python, a function of `scans` computes something else, or
            torch.export cannot capture it.
    """
    module = unwrapped(module)
    _check_mode(module)
    if not isinstance(args, tuple | list) or not isinstance(kwargs or {}, Mapping):
        raise MqAoError("example inputs are a tuple of positional inputs and a dictionary of keyword inputs.")
    call = examples.own((tuple(args), transformers.without_cache(module, kwargs or {})))
    for tensor in tensors(call):
        if tensor.numel() == 0:
            raise MqAoError(
                f"an example input is empty, of shape {tuple(tensor.shape)}: give at least one sequence and one token."
            )
    with outside_inference(module):
        return _exported(module, call, dynamic_shapes, scans)


def replacements(module: nn.Module) -> list[Replacement]:
    """What stands in for the functions of libraries while `module` runs."""
    return [item for adapter in _ADAPTERS for item in adapter.replacements(module)]


def _exported(module: nn.Module, call: Call, dynamic_shapes: Any, scans: by_hand.Scans | None) -> ExportedProgram:
    if dynamic_shapes is not None:
        examples.arguments(module, call)
        return _traced(module, call, dynamic_shapes, scans)
    forward = examples.explicit(module, call)
    with replaced([Replacement(module, "forward", forward)]):
        return _traced_at_any_size(module, call, examples.every_size(forward, call), scans)


def _check_mode(module: nn.Module) -> None:
    for name, part in module.named_modules():
        code = getattr(type(part).forward, "__code__", None)
        # Of torch's own modules few ask; those that were put in later, such as parametrizations, may say "training".
        harmless = type(part).__module__.startswith("torch.") and code is not None and "training" not in code.co_names
        if part.training and not (name and harmless):
            what = f"{name} ({type(part).__name__})" if name else type(module).__name__
            raise MqAoError(f"{what} is in training mode: call .eval() on the model before capture.")


def _traced_at_any_size(
    module: nn.Module, call: Call, shapes: dict[str, Any], scans: by_hand.Scans | None
) -> ExportedProgram:
    wide = examples.widened(call)
    if wide is call:
        return _traced(module, call, shapes, scans)
    try:
        program = _traced(module, wide, shapes, scans)
        if examples.vary(program, call, wide):
            return program
    except MqAoError as error:
        if isinstance(error.__cause__, MqAoError):
            raise  # of ours, and the same for one
        logger.info("not for more than one sequence or token: %s", error)
    program = _traced(module, call, shapes, scans)
    logger.warning("%s is captured for inputs of the example's size 1 alone", type(module).__name__)
    return program


def _traced(module: nn.Module, call: Call, dynamic_shapes: Any, scans: by_hand.Scans | None) -> ExportedProgram:
    theirs = replacements(module)
    try:
        library = replaced([*theirs, *mode_wrappers.replacements()])
        with torch.no_grad(), attributes.kept(module), library, by_hand.swapped(module, *call, scans), ChannelLast():
            program = torch.export.export(module, *call, dynamic_shapes=dynamic_shapes)
    except MqAoError as error:
        raise MqAoError(f"{_place(module, error)} cannot be captured: {error}") from error
    except REFUSALS as error:
        raise MqAoError(
            f"torch.export cannot capture {type(module).__name__}: {first_line(error, 'no reason given')}"
        ) from error
    except Exception as error:
        # Of any kind: the model's own code runs on example inputs.
        if is_out_of_memory(error):
            raise MqAoError("there is not enough memory to capture the model: give smaller example inputs.") from error
        raise MqAoError(
            f"{_place(module, error)} fails on the example inputs ({examples.described(module, call)}): "
            f"{type(error).__name__}: {first_line(error, 'no reason given')}"
        ) from error
    mode_wrappers.inline(program)
    # torch.export keeps what nobody reads, and the reordering that ChannelLast made needless is that.
    program.graph.eliminate_dead_code()
    canonicalise(program)
    return program


def _place(module: nn.Module, error: BaseException) -> str:
    """Type and name of the innermost submodule whose code raised `error`."""
    names = {id(part.__dict__): name for name, part in module.named_modules()}
    found = type(module).__name__
    trace = error.__traceback__
    while trace is not None:
        part = trace.tb_frame.f_locals.get("self")
        if isinstance(part, nn.Module) and names.get(id(part.__dict__)):
            # torch.export hands out proxies that share the module's attributes.
            found = f"{names[id(part.__dict__)]} ({type(part).__name__})"
        trace = trace.tb_next
    return found
