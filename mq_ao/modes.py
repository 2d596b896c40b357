"""torch's modes that a thread may be in when it calls us, and in which nothing of ours is to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain() -> Iterator[None]:
    """Within it there is no inference mode, no autocast and no default dtype of half precision; no gradient is kept.

    It decorates functions too. Those of a user may change a thread's modes while they run, such as a generator that
    yields inside an autocast: what runs after it enters its own.
    """
    default = torch.get_default_dtype()
    with (
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.no_grad(),  # the innermost: to leave inference mode is to turn gradients on
    ):
        if default in (torch.float16, torch.bfloat16):  # observers would compute scales in it
            torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
