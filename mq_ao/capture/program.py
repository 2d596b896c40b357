"""Captures a module with torch.export."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported, UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import mq_ao.ops  # noqa: F401  (registers torch.ops.mq_ao)
from mq_ao.capture import mamba_ssm, transformers
from mq_ao.capture.layout import ChannelLast
from mq_ao.capture.replacing import replaced
from mq_ao.errors import MqAoError
from mq_ao.graph.canonical import canonicalise

logger = logging.getLogger(__name__)

_ADAPTERS = (mamba_ssm, transformers)
_IMAGES = 4
"""Axes of a batch of images."""


def export(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Captures `module` as one program for any batch and length, length 1 included.

    The module is taken as it is: the functions of mamba_ssm and transformers that it calls are replaced by our
    operators while it is traced, and put back afterwards.

    Args:
        module: model in eval mode whose scan is mamba_ssm's, transformers' or `torch.ops.mq_ao.selective_scan`.
        args: example positional inputs. Batch and length must be at least 2 here: torch.export takes a size of 1
            for a constant.
        kwargs: example keyword inputs.
        dynamic_shapes: as in torch.export; None lets every size vary that the model does not fix itself.

    Returns:
        Program over aten and mq_ao operators.

    Raises:
        MqAoError: the module is in training mode, an input is empty, its scan is of a kind that there is no operator
            for, or torch.export cannot capture it.
    """
    if module.training:
        raise MqAoError(f"{type(module).__name__} is in training mode: call .eval() before capture.")
    kwargs = dict(kwargs or {})
    for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.numel() == 0:
            raise MqAoError(
                f"an example input is empty, of shape {tuple(tensor.shape)}: give a batch and a length of 2."
            )
    if dynamic_shapes is None:
        dynamic_shapes = torch.utils._pytree.tree_map(_all_dynamic, (args, kwargs))
        dynamic_shapes = dynamic_shapes[0] if not kwargs else _by_name(module, args, dynamic_shapes)
    replacements = [item for adapter in _ADAPTERS for item in adapter.replacements(module)]
    try:
        with torch.no_grad(), replaced(replacements), ChannelLast():
            program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)
    except MqAoError as error:
        place = _place(module, error)
        raise MqAoError(f"{place} cannot be captured: {error}") from error
    except (UserError, Unsupported, GuardOnDataDependentSymNode) as error:
        reason = str(error).strip().splitlines()[0]
        raise MqAoError(f"torch.export cannot capture {type(module).__name__}: {reason}") from error
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


def _all_dynamic(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    # Batch and length; the second axis of images is their colours, which may well be one.
    vary = 1 if value.dim() == _IMAGES else 2
    fixed = [axis for axis, size in enumerate(value.shape[:vary]) if size == 1]
    if fixed:
        logger.warning(
            "axis %s of an example input of shape %s has size 1 and will be fixed to 1: give a size of 2 or more there",
            ", ".join(map(str, fixed)),
            tuple(value.shape),
        )
    return dict.fromkeys(range(value.dim()), Dim.AUTO)


def _by_name(module: nn.Module, args: tuple[Any, ...], shapes: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
    import inspect

    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names[: len(args)], shapes[0], strict=True)), **shapes[1]}
