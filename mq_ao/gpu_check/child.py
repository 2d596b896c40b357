"""The process that a stage runs in: it sends what came of each part as soon as that is known."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mq_ao.errors import first_line
from mq_ao.gpu_check.checks import CheckFailed, Skipped
from mq_ao.gpu_check.plan import Stage
from mq_ao.gpu_check.results import Part, Verdict
from mq_ao.gpu_check.settings import Setting

_WHERE = signal.SIGUSR1
_LINES = 12
_LONGEST = 600
Parts = Mapping[str, Callable[[], Mapping[str, Any]]]
"""What `parts(setting, **options)` of a stage's file gives: by name, what finds figures out or raises."""


class Child:
    """A stage in a process of its own, from the part after those that are done.

    Args:
        stage: which.
        setting: with what.
        done: parts that are not run.
        log: file for what the process writes.
    """

    def __init__(self, stage: Stage, setting: Setting, done: Collection[str], log: Path) -> None:
        # Forked from a process that has imported PyTorch and has not used a GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mq_ao.gpu_check.preloaded"])
        self._log = log
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(stage, setting, tuple(done), log, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self, seconds: float) -> tuple[Any, ...] | None:
        """The next message; None if there is none within that time.

        Raises:
            EOFError: the process has ended.
        """
        try:
            return self._pipe.recv() if self._pipe.poll(max(0.0, seconds)) else None
        except ConnectionError:
            raise EOFError from None

    def end(self) -> int | None:
        """Ends the process and those that it started; its exit code, or None if it had to be killed."""
        self._process.join(timeout=0.5)
        code = self._process.exitcode
        if self._process.pid is not None:
            for kill in (os.killpg, os.kill):  # as long as it has no group of its own yet, itself
                with contextlib.suppress(OSError):
                    kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._pipe.close()
        return code

    def ask_where(self) -> None:
        """Has the process write down where it is."""
        if self._process.pid is not None:
            with contextlib.suppress(OSError):
                os.kill(self._process.pid, _WHERE)
                time.sleep(0.3)

    def last_words(self) -> tuple[str, ...]:
        """The last lines that it wrote."""
        try:
            text = self._log.read_text(errors="replace")
        except OSError:
            return ()
        return tuple(line[:_LONGEST] for line in text.splitlines()[-2 * _LINES :])


def _run(stage: Stage, setting: Setting, done: tuple[str, ...], log: Path, pipe: Connection) -> None:
    os.setpgid(0, 0)  # to be ended together with what it starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.enable(file)
        faulthandler.register(_WHERE, file)
        with contextlib.suppress(BrokenPipeError):
            _send_parts(stage, setting, done, pipe)


def _send_parts(stage: Stage, setting: Setting, done: tuple[str, ...], pipe: Connection) -> None:
    try:
        parts: Parts = importlib.import_module(stage.module).parts(setting, **stage.options)
    except Exception as error:  # a package that is missing here is a result
        pipe.send(("failed", _failure(error, 0.0)))
        return
    pipe.send(("parts", tuple(parts)))
    for name, find in parts.items():
        if name in done:
            continue
        pipe.send(("begin", name))
        part = _found(find)
        pipe.send(("end", name, part))
        if part.verdict is Verdict.FAILED and not _usable(setting):
            return
    pipe.send(("over",))


def _found(find: Callable[[], Mapping[str, Any]]) -> Part:
    started = time.perf_counter()
    try:
        result = find()
    except Skipped as reason:
        return Part(Verdict.SKIPPED, time.perf_counter() - started, reason=str(reason))
    except Exception as error:
        return _failure(error, time.perf_counter() - started)
    return Part(Verdict.PASSED, time.perf_counter() - started, result)


def _failure(error: Exception, seconds: float) -> Part:
    if isinstance(error, CheckFailed):
        return Part(Verdict.FAILED, seconds, error.result, str(error)[:_LONGEST])
    reason = f"{type(error).__name__}: {first_line(error, 'no message')}"[:_LONGEST]
    lines = "".join(traceback.format_exception(error)).splitlines()
    return Part(Verdict.FAILED, seconds, reason=reason, trace=tuple(line[:_LONGEST] for line in lines[-_LINES:]))


def _usable(setting: Setting) -> bool:
    """Whether the GPU still takes work of this process: an illegal access ends that for all of it."""
    if setting.rehearsal:
        return True
    import torch

    try:
        torch.cuda.synchronize(setting.device)
    except RuntimeError:
        return False
    return True
