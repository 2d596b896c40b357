"""What quantized logits cost against the float model's, sequence by sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import fields

from torch import Tensor
from torch.nn import functional

from mq_ao.measuring import Measured


def score(reference: Tensor, logits: Tensor, ids: Tensor) -> Measured:
    """Sums over each sequence, in which every token but the first is predicted.

    Args:
        reference: (batch, length, vocabulary), logits of the float model.
        logits: those of the quantized one.
        ids: (batch, length) int64.
    """
    log_p, log_q = (values[:, :-1].float().log_softmax(-1) for values in (reference, logits))
    targets = ids[:, 1:, None]
    divergence = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    same = log_p.argmax(-1) == log_q.argmax(-1)
    costs = (-values.gather(2, targets)[..., 0] for values in (log_p, log_q))
    columns = (tuple(values.double().sum(1).tolist()) for values in (*costs, divergence, same))
    tokens = (float(ids.shape[1] - 1),) * len(ids)
    return Measured(tokens, *columns)


def joined(parts: Iterable[Measured]) -> Measured:
    """The sequences of several."""
    parts = list(parts)
    return Measured(
        *(tuple(itertools.chain(*(getattr(part, field.name) for part in parts))) for field in fields(Measured))
    )
