"""The file with everything that was found: written anew, in one step, whenever something was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from mq_ao.errors import MqAoError
from mq_ao.files import write_atomically

FORMAT = 1
REHEARSAL = "A rehearsal on the CPU, kernels interpreted: no time in here is a GPU's, and none is claimed."


class Verdict(StrEnum):
    """How a part, or a stage, ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Part:
    """What came of one part.

    Attributes:
        verdict: how it ended.
        seconds: that it took; 0 if it did not run.
        result: figures, of a part that failed too if it got so far.
        reason: why it failed, was skipped or did not run.
        trace: the last lines of a failure's traceback, or of what its process wrote before it ended.
    """

    verdict: Verdict
    seconds: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    trace: tuple[str, ...] = ()


@dataclass
class Found:
    """What came of one stage.

    Attributes:
        title: what it finds out.
        seconds: that it took.
        parts: by name.
        reason: why it did not run, or not to its end.
    """

    title: str
    seconds: float = 0.0
    parts: dict[str, Part] = field(default_factory=dict)
    reason: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of its parts': one that failed, one that did not run, one that passed."""
        verdicts = {part.verdict for part in self.parts.values()} or {Verdict.NOT_RUN}
        order = (Verdict.FAILED, Verdict.NOT_RUN, Verdict.PASSED, Verdict.SKIPPED)
        return next(verdict for verdict in order if verdict in verdicts)

    @property
    def finished(self) -> bool:
        """Whether every part has run."""
        return self.verdict is not Verdict.NOT_RUN and self.reason is None

    def count(self, verdict: Verdict) -> int:
        """Parts that ended so."""
        return sum(part.verdict is verdict for part in self.parts.values())


class Results:
    """What was found, in memory and in a file.

    Args:
        path: the file. What it holds already is kept.
        head: what all of it depends on: versions, device. It must be that of the file.

    Raises:
        MqAoError: the file is not one of ours, or holds what was found elsewhere.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self._path = path
        self._head = json.loads(json.dumps({"mq_ao_gpu_check": FORMAT, **head}))
        self.stages: dict[str, Found] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            head = {key: value for key, value in content.items() if key not in ("remark", "stages")}
            stages = content["stages"]
        except (ValueError, KeyError, AttributeError):
            raise MqAoError(f"{self._path} was not written by mq-ao gpu-check: choose another --output.") from None
        if head != self._head:
            key = next(key for key in {**head, **self._head} if head.get(key) != self._head.get(key))
            raise MqAoError(
                f"{self._path} holds results for {key} {head.get(key)}, and this is {self._head.get(key)}: choose "
                "another --output."
            )
        for name, item in stages.items():
            parts = {
                key: Part(**{**part, "verdict": Verdict(part["verdict"]), "trace": tuple(part["trace"])})
                for key, part in item["parts"].items()
            }
            self.stages[name] = Found(item["title"], item["seconds"], parts, item["reason"])

    def write(self) -> None:
        """Writes everything to the file."""
        stages = {name: {"verdict": found.verdict, **asdict(found)} for name, found in self.stages.items()}
        remark = {"remark": REHEARSAL} if self._head["rehearsal"] else {}
        text = json.dumps({**self._head, **remark, "stages": stages}, indent=1)
        write_atomically(self._path, (text + "\n").encode())
