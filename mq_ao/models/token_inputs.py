"""What a language model is given, checked before anything reads it: compiled code reads memory as it was told to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mq_ao.arrays import as_tensor
from mq_ao.compat.operators import is_fake
from mq_ao.errors import MqAoError

_INTEGERS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
# Up to so many ids are looked at by Python, which is quicker than operators are called.
_FEW = 64


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is values in memory: not sparse, nested, on the meta device, or traced."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta and not is_fake(tensor)


def token_ids(given: Any, vocab_size: int | None = None, what: str = "input_ids") -> Tensor:
    """The (batch, length) int64 tensor of token ids that is meant by `given`, on the device where it lies.

    Args:
        given: (batch, length) integers of any width: a tensor, a numpy array, or a list of lists of one length.
        vocab_size: ids lie below it; None: not checked.
        what: they are, for messages.

    Raises:
        MqAoError: it is something else, empty, or outside the vocabulary.
    """
    ids = as_tensor(given)
    if ids is None:
        raise _wrong(what, f"a {type(given).__name__} that is no rectangle of whole numbers")
    if ids.dim() != 2 or not is_plain(ids):
        raise _wrong(what, f"a tensor {_describe(ids)}")
    if ids.numel() == 0:
        raise MqAoError(f"{what} is empty, of shape {tuple(ids.shape)}: give at least one token.")
    if ids.dtype not in _INTEGERS:
        raise _wrong(what, f"a tensor {_describe(ids)}")
    ids = ids.long()
    if vocab_size is not None:
        extremes = ids if ids.numel() <= _FEW else torch.stack(torch.aminmax(ids))
        values = extremes.flatten().tolist()  # a GPU is waited for once
        least, most = min(values), max(values)
        if least < 0 or most >= vocab_size:
            raise MqAoError(
                f"{what} holds {least}..{most}, outside the vocabulary of {vocab_size} tokens: encode the text with "
                "the model's own tokenizer."
            )
    return ids


def one_token(ids: Tensor) -> None:
    """Raises MqAoError unless `ids`, from `token_ids`, is one token a sequence."""
    if ids.shape[1] != 1:
        raise MqAoError(
            f"decode takes one token a sequence, and input_ids of shape {tuple(ids.shape)} holds {ids.shape[1]}: call "
            "prefill, or the program itself."
        )


def refuse_mask(attention_mask: Any) -> None:
    """Raises MqAoError if there is an attention mask: models with states have no use for one."""
    if attention_mask is not None:
        raise MqAoError(
            "this model takes no attention_mask: padding would change its states. Give sequences of one length, or one "
            "after the other, and leave the mask out; generate takes prompts that are padded on the left."
        )


def _describe(tensor: Tensor) -> str:
    kind = "" if is_plain(tensor) else f", {'meta' if tensor.is_meta else tensor.layout}"
    return f"of shape {tuple(tensor.shape)}, {tensor.dtype}{kind}"


def _wrong(what: str, got: str) -> MqAoError:
    return MqAoError(f"{what} must be (batch, length) int64 or other integers; got {got}.")
