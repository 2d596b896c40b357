"""What a bench measured, and the figures that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from mq_ao.bench.prepare import FP32, FP32_EAGER, is_int8
from mq_ao.bench.worker import Memory, Start


@dataclass
class Measured:
    """One contender's measurements.

    Attributes:
        name: what tables call it.
        prefill: seconds, one a round, by number of tokens.
        decode: seconds a token, one a round, by number of tokens before.
        memory: of its process after everything else, or None if it failed before.
        logits_error: relative L2 distance of its logits to the first contender's, or None.
        failure: why it could not be measured (further), or None.
        starts: one a round, each in a process of its own.
    """

    name: str
    prefill: dict[int, list[float]] = field(default_factory=dict)
    decode: dict[int, list[float]] = field(default_factory=dict)
    memory: Memory | None = None
    logits_error: float | None = None
    failure: str | None = None
    starts: list[Start] = field(default_factory=list)

    def prefill_median(self, tokens: int) -> float | None:
        """Median seconds for a prefill of that many tokens, or None if there was none."""
        return _median(self.prefill.get(tokens, []))

    def decode_median(self, context: int) -> float | None:
        """Median seconds a token after that many, or None."""
        return _median(self.decode.get(context, []))

    def start_median(self) -> Start | None:
        """Medians of the starts, or None if there was none."""
        if not self.starts:
            return None
        return Start(
            statistics.median(start.seconds for start in self.starts),
            int(statistics.median(start.peak for start in self.starts)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON: medians, and the samples that they come from."""
        prefill = [
            {
                "tokens": tokens,
                "ms": 1e3 * statistics.median(samples),
                "tokens_per_second": tokens / statistics.median(samples),
                "samples_ms": [1e3 * sample for sample in samples],
            }
            for tokens, samples in self.prefill.items()
        ]
        decode = [
            {
                "context": context,
                "ms_per_token": 1e3 * statistics.median(samples),
                "samples_ms": [1e3 * sample for sample in samples],
            }
            for context, samples in self.decode.items()
        ]
        memory = None if self.memory is None else asdict(self.memory)
        return {
            "name": self.name,
            "prefill": prefill,
            "decode": decode,
            "starts": [asdict(start) for start in self.starts],
            "memory_bytes": memory,
            "logits_error": self.logits_error,
            "failure": self.failure,
        }


@dataclass(frozen=True)
class Figure:
    """A ratio of two medians; between recipes the median of the ratios within a round.

    Attributes:
        name: what is set against what.
        value: the ratio.
    """

    name: str
    value: float


@dataclass(frozen=True)
class Results:
    """One model's bench.

    Attributes:
        model: what was benched.
        lengths: prefill lengths.
        contexts: tokens before the ones that decode measurements time.
        decode_tokens: tokens a decode measurement.
        contenders: by name, in the order of the rounds.
    """

    model: str
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    decode_tokens: int
    contenders: Mapping[str, Measured]

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of our quantized contenders, one a recipe."""
        return tuple(filter(is_int8, self.contenders))

    @property
    def own_failure(self) -> str | None:
        """Why one of our own contenders failed, or None."""
        ours = (
            self.contenders[name].failure for name in (FP32_EAGER, FP32, *self.quantized) if name in self.contenders
        )
        return next((failure for failure in ours if failure is not None), None)

    def figures(self) -> list[Figure]:
        """Speed of int8 and of compiled fp32 against every other contender, then `own_figures`."""
        figures = []
        for base in (*self.quantized, FP32):
            for name in self.contenders:
                if name != base and not is_int8(name):
                    figures += self._speedups(base, name)
        return figures + self.own_figures()

    def own_figures(self) -> list[Figure]:
        """Times of the recipes against the first one's; linearity, weights and memory of each."""
        figures = [figure for other in self.quantized[1:] for figure in self._times(self.quantized[0], other)]
        for name in self.quantized:
            figures += [*self._linearity(name), *self._weights(name), *self._overhead(name)]
        return figures

    def _times(self, base: str, other: str) -> list[Figure]:
        ours, theirs = self.contenders[base], self.contenders[other]
        samples = [(f"prefill of {n} tokens", ours.prefill.get(n, []), theirs.prefill.get(n, [])) for n in self.lengths]
        samples += [(self.decoding(n), ours.decode.get(n, []), theirs.decode.get(n, [])) for n in self.contexts]
        # A recipe changes a few percent: neighbours in time are compared, so that a slow minute counts for both.
        return [
            Figure(
                f"time of {other} against {base}, {what}", statistics.median(b / a for a, b in zip(x, y, strict=False))
            )
            for what, x, y in samples
            if x and y
        ]

    def _speedups(self, base: str, other: str) -> list[Figure]:
        ours, theirs = self.contenders[base], self.contenders[other]
        pairs = [
            (f"prefill of {tokens} tokens", ours.prefill_median(tokens), theirs.prefill_median(tokens))
            for tokens in self.lengths
        ]
        pairs += [(self.decoding(n), ours.decode_median(n), theirs.decode_median(n)) for n in self.contexts]
        if (our_start := ours.start_median()) and (their_start := theirs.start_median()):
            pairs.append(("first token", our_start.seconds, their_start.seconds))
        return [
            Figure(f"{base} against {other}, {what}", b / a) for what, a, b in pairs if a is not None and b is not None
        ]

    def decoding(self, context: int) -> str:
        """What a decode measurement is called."""
        return "decode" if len(self.contexts) == 1 else f"decode after {context} tokens"

    def _linearity(self, name: str) -> list[Figure]:
        row = self.contenders[name]
        prefill = [("prefill time of", n, row.prefill_median(n)) for n in self.lengths]
        decode = [("decode time after", n, row.decode_median(n)) for n in self.contexts]
        return [
            Figure(f"{name}: {what} {long} against {short} tokens", b / a)
            for medians in (prefill, decode)
            for (what, short, a), (_, long, b) in pairwise(medians)
            if a is not None and b is not None
        ]

    def _weights(self, name: str) -> list[Figure]:
        ours, theirs = self.contenders[name].memory, self.contenders[FP32].memory
        if ours is None or theirs is None:
            return []
        return [Figure(f"resident weights of {name} against {FP32}", ours.weight_bytes / theirs.weight_bytes)]

    def _overhead(self, name: str) -> list[Figure]:
        memory = self.contenders[name].memory
        share = None if memory is None else memory.decoding_overhead
        if share is None:
            return []
        return [Figure(f"memory of {name} while decoding, beyond libraries and weights, of its weights", share)]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {
            "model": self.model,
            "decode_tokens": self.decode_tokens,
            "contexts": self.contexts,
            "contenders": [measured.to_dict() for measured in self.contenders.values()],
            "ratios": {figure.name: figure.value for figure in self.figures()},
        }


def _median(samples: list[float]) -> float | None:
    return statistics.median(samples) if samples else None
