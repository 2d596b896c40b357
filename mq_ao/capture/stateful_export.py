"""Captures a language model of transformers or mamba_ssm with the states that it carries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mq_ao.capture import exporting
from mq_ao.capture.carrying import Stateful
from mq_ao.capture.exporting import export
from mq_ao.capture.replacing import replaced
from mq_ao.errors import MqAoError, first_line
from mq_ao.modes import plain
from mq_ao.turns import in_turn

BATCH, LENGTH, PAST = 2, 5, 3
"""Sizes of the example, none of which is one that torch.export takes for a constant."""


@in_turn
@plain()
def export_with_states(model: nn.Module) -> ExportedProgram:
    """Captures a model of transformers or mamba_ssm as `carrying.Stateful` has it: with its states.

    Batch and length vary, and how many tokens were before: from none on.

    Args:
        model: `...ForCausalLM` or `MambaLMHeadModel` in eval mode, whose layers are attention, Mamba or Mamba-2.

    Raises:
        MqAoError: as for `export`; its attention has a window or soft caps; or it wants a cache of another kind.
    """
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=next(model.parameters()).device)
    states = _examples(model, ids)
    stateful = Stateful(model, list(states))
    batch, length, past = Dim("batch", min=1), Dim("length", min=1), Dim("past", min=0)
    shapes = [{0: batch, 1: length}, *({0: past, 1: batch} if _grows(name) else {0: batch} for name in states)]
    return export(stateful, (ids, *states.values()), dynamic_shapes=tuple(shapes))


def _examples(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """States of the example's sequences after so many tokens."""
    stateful = Stateful(model)
    try:
        with replaced(exporting.replacements(stateful)):
            _, states = stateful.run(ids[:, :PAST])
    except MqAoError:
        raise
    except Exception as error:  # of any kind: the model's own code runs on a cache that it does not know
        reason = first_line(error, "no reason given")
        raise MqAoError(f"{type(model).__name__} does not run with states: {type(error).__name__}: {reason}") from error
    return states


def _grows(name: str) -> bool:
    return name.startswith(("key_", "value_"))
