"""What an ExecuTorch program is made for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mq_ao import checks

_LOGITS = 2**20
"""Logits that prefill gives at most in one call: their memory is planned for the largest number."""


class Scan(StrEnum):
    """What runs convolution, scan and rotation."""

    NATIVE = "native"
    """Our operators: an app has to link them, or load the library that `mq-ao build-kernels --executorch` builds."""
    PORTABLE = "portable"
    """ExecuTorch's own operators alone, in float: any runtime with XNNPACK runs it, slowly."""


@dataclass(frozen=True)
class Options:
    """What an ExecuTorch program is made for.

    Attributes:
        batch: sequences in every call; of a model that is no language model, the first axis of its first input.
        max_length: tokens that prefill takes at most in one call; longer prompts are fed in pieces. Memory is planned
            for that many, and decode has it too. Of another model: the largest of all sizes that vary.
        max_context: tokens of a conversation, of models with attention: its keys and values are planned for that many.
            Others have no such limit.
        scan: what runs convolution, scan and rotation.
        runner: whether a language model's program has the method and constants of ExecuTorch's LLM runner
            (`executorch.extension.llm.runner.TextLLMRunner`, and the apps that are built on it) instead of ours. It
            gives the logits of the last token alone: all those of a text take a call a token.

    Raises:
        MqAoError: batch, max_length or max_context is no whole number of at least 1, or scan is not known.
    """

    batch: int = 1
    max_length: int = 256
    max_context: int = 2048
    scan: Scan = Scan.NATIVE
    runner: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "max_length", "max_context"):
            object.__setattr__(self, name, checks.whole(getattr(self, name), name, 1))
        object.__setattr__(self, "scan", checks.member(self.scan, "scan", Scan))

    def max_count(self, vocab_size: int) -> int:
        """Tokens that one prefill gives logits of at most."""
        return max(1, min(self.max_length, _LOGITS // (self.batch * vocab_size)))
