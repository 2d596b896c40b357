"""The stages one after the other, within a budget of time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mq_ao.gpu_check.child import Child
from mq_ao.gpu_check.plan import FAILED, Stage
from mq_ao.gpu_check.results import Found, Part, Results, Verdict
from mq_ao.gpu_check.settings import Setting

START, OVER = "start", "the stage's time was over"
Told = Callable[[str], None]
"""Told what is being done, for people."""


@dataclass(frozen=True)
class Budget:
    """How long everything may take.

    Attributes:
        seconds: of all stages together.
        scale: by which stages' own times are multiplied: a rehearsal takes longer than a GPU.
    """

    seconds: float
    scale: float = 1.0


def run(
    stages: Sequence[Stage],
    setting: Setting,
    results: Results,
    budget: Budget,
    again: Collection[str] = (),
    told: Told = lambda _: None,
) -> None:
    """Runs stages, and goes on after those that fail.

    Args:
        stages: which, in order. Of those that ran before, only what did not run is run.
        setting: with what.
        results: what is known already; what is found is added, and written at once.
        budget: no stage begins when it is thought to take longer than what is left of it.
        again: stages that are run though they have results; `FAILED`: the parts that failed.
        told: told what is being done.
    """
    ends = time.monotonic() + budget.seconds
    for stage in stages:
        found = results.stages.setdefault(stage.name, Found(stage.title))
        _forget(found, stage, again)
        if found.finished:
            told(f"{stage.name}: kept, it has run before")
            continue
        left, expected = ends - time.monotonic(), budget.scale * stage.expected
        if expected > left:
            found.reason = f"it is thought to take {expected:.0f} s, and {max(0.0, left):.0f} s were left"
            told(f"{stage.name}: not run, {found.reason}")
        else:
            _run_stage(stage, setting, results, budget, min(left, budget.scale * stage.limit), told)
        results.write()


def _forget(found: Found, stage: Stage, again: Collection[str]) -> None:
    """Takes out what is to be run, and why it was not."""
    kept = (Verdict.PASSED, Verdict.SKIPPED) if FAILED in again else (Verdict.PASSED, Verdict.SKIPPED, Verdict.FAILED)
    parts = {} if stage.name in again else found.parts
    found.parts = {name: part for name, part in parts.items() if part.verdict in kept}
    if not found.parts or len(found.parts) < len(parts):
        found.reason = "it has not run to its end" if found.parts else "it has not run"


def _run_stage(stage: Stage, setting: Setting, results: Results, budget: Budget, limit: float, told: Told) -> None:
    found, started = results.stages[stage.name], time.monotonic()
    found.reason = None
    with tempfile.TemporaryDirectory(prefix="mq_ao_") as folder:
        part_limit = budget.scale * stage.part_limit
        following = _Following(stage, setting, results, Path(folder) / "log", started + limit, part_limit, told)
        while following.go_on():
            pass
    found.seconds += time.monotonic() - started


class _Following:
    """One stage, in as many processes as it takes."""

    def __init__(
        self, stage: Stage, setting: Setting, results: Results, log: Path, ends: float, part_limit: float, told: Told
    ) -> None:
        self._stage, self._setting, self._results = stage, setting, results
        self._found = results.stages[stage.name]
        self._log, self._ends, self._told = log, ends, told
        self._part_limit = part_limit
        self._current: str | None = None
        self._began = 0.0

    def go_on(self) -> bool:
        """Runs the parts that have not run until there is none, or the process ends; whether there are more."""
        child = Child(self._stage, self._setting, self._found.parts.keys(), self._log)
        self._current, over = None, False
        names: tuple[str, ...] = ()
        self._began = time.monotonic()
        try:
            while not over:
                message = child.receive(min(self._ends, self._began + self._part_limit) - time.monotonic())
                if message is None:
                    self._cut(child)
                    break
                kind, *values = message
                if kind == "parts":
                    names = values[0]
                elif kind == "begin":
                    self._current, self._began = values[0], time.monotonic()
                    self._told(f"{self._stage.name}: {self._current}")
                elif kind == "end":
                    self._keep(*values)
                    self._current = None
                elif kind == "failed":
                    self._keep(START, *values)
                    over = True
                else:
                    over = True
        except EOFError:
            code = child.end()
            if self._current is not None or not names:
                how = f"ended its process with code {code} (-9 is usually a lack of memory)"
                self._broken_off(child, Verdict.FAILED, how)
        finally:
            child.end()
        return not over and self._rest(names)

    def _cut(self, child: Child) -> None:
        """A part has taken too long, or all the time that the stage had left."""
        seconds = time.monotonic() - self._began
        child.ask_where()
        hangs = seconds >= self._part_limit
        verdict = Verdict.FAILED if hangs else Verdict.NOT_RUN
        self._broken_off(child, verdict, f"was ended after {seconds:.0f} s" + ("" if hangs else ", with the stage"))

    def _broken_off(self, child: Child, verdict: Verdict, how: str) -> None:
        """Notes how the part that ran, or the start of the process, ended."""
        name, seconds = self._current or START, time.monotonic() - self._began
        self._keep(name, Part(verdict, seconds, reason=f"{name} {how}", trace=child.last_words()))
        if verdict is Verdict.NOT_RUN:
            self._found.reason = OVER

    def _rest(self, names: Sequence[str]) -> bool:
        """Whether there are parts to run, and time for them; where there is none, they are noted."""
        missing = [name for name in names if name not in self._found.parts]
        if not missing or time.monotonic() < self._ends:
            return bool(missing)
        self._found.reason = OVER
        for name in missing:
            self._keep(name, Part(Verdict.NOT_RUN, reason=OVER))
        return False

    def _keep(self, name: str, part: Part) -> None:
        self._found.parts[name] = part
        self._results.write()
