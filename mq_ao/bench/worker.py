"""One process a contender: its memory can be measured, and its threads and crashes are its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from mq_ao.backends import EXECUTORCH, backend_of
from mq_ao.errors import MqAoError
from mq_ao.logs import quiet_libraries

T = TypeVar("T")

# A short measurement is repeated until it lasts this long, and its median is taken: a process that slept
# while the others ran has cold caches and sleeping threads.
SHORTEST_SECONDS = 0.3
MOST_REPEATS = 25


class Kind(StrEnum):
    """How a contender runs the model."""

    EAGER = "eager"
    PROGRAM = "program"
    TRANSFORMERS = "transformers"
    LLAMA = "llama.cpp"


@dataclass(frozen=True)
class Spec:
    """What a worker opens.

    Attributes:
        name: what tables call it.
        kind: how it runs the model.
        path: model folder, saved program or `.gguf` file.
        threads: threads to use.
        longest: most tokens in a sequence.
    """

    name: str
    kind: Kind
    path: Path
    threads: int
    longest: int


@dataclass(frozen=True)
class Memory:
    """Memory of a contender's process.

    Attributes:
        weight_bytes: the weights that it needs to run.
        libraries: resident bytes before the model was opened.
        peak: most resident bytes so far, opening the model included.
        decoding: resident bytes after tokens were decoded last, or None before.
    """

    weight_bytes: int
    libraries: int
    peak: int
    decoding: int | None = None

    @property
    def decoding_overhead(self) -> float | None:
        """Bytes beyond libraries and weights while decoding, as a share of the weights."""
        if self.decoding is None:
            return None
        return (self.decoding - self.libraries) / self.weight_bytes - 1


@dataclass(frozen=True)
class Start:
    """What a contender needs before it has said anything, and soon after.

    Attributes:
        seconds: from opening the model, with libraries imported and files in the system's cache, to the first token.
        peak: most resident bytes beyond the libraries while it was opened, read a prompt and decoded.
    """

    seconds: float
    peak: int


class Worker:
    """A contender in a process of its own. Use it as a context manager.

    Args:
        spec: what to open.

    Raises:
        MqAoError: here and in every method: the contender failed, with its reason.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        # A fresh interpreter: a forked one would share this process's memory and thread pools.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(spec, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=3)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def prefill(self, ids: list[int]) -> float:
        """Seconds to read `ids` and give the last token's logits."""
        return self._call("prefill", ids)

    def decode(self, prompt: list[int], ids: list[int]) -> float:
        """Seconds a token to go on with `ids` after `prompt`, one token a call."""
        return self._call("decode", prompt, ids)

    def logits(self, prompt: list[int], ids: list[int]) -> list[float]:
        """Logits after `prompt` in one call and then `ids` token by token."""
        return self._call("logits", prompt, ids)

    def start(self, prompt: list[int], ids: list[int]) -> Start:
        """What opening it took, and reading `prompt` and going on with `ids`. It has to be the first call."""
        return self._call("start", prompt, ids)

    def memory(self) -> Memory:
        """What the process has needed so far."""
        return self._call("memory")

    def _call(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
        except OSError as error:
            raise _died(self.spec.name, self._process) from error
        return self._receive()

    def _receive(self) -> Any:
        return _receive(self.spec.name, self._pipe, self._process)


def call_alone(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function in a fresh process, whose memory is then the function's, and returns its (pickled) result.

    Args:
        name: what error messages call it.
        function: of a module's top level.
        arguments: passed to it, pickled.

    Raises:
        MqAoError: it failed, with its reason.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        result = _receive(name, pipe, process)
        process.join(timeout=10)  # it clears up after itself, which a killed one does not
        return result
    finally:
        process.kill()
        process.join()
        pipe.close()


def _receive(name: str, pipe: Connection, process: BaseProcess) -> Any:
    try:
        failure, value = pipe.recv()
    except (EOFError, ConnectionError) as error:
        raise _died(name, process) from error
    if failure is not None:
        raise MqAoError(f"{name}: {failure}")
    return value


def _died(name: str, process: BaseProcess) -> MqAoError:
    process.join(timeout=10)
    return MqAoError(f"{name}: its process ended with code {process.exitcode} (-9 is usually a lack of memory).")


class _Server:
    """The other end of a `Worker`."""

    def __init__(self, spec: Spec) -> None:
        quiet_libraries()
        import torch

        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        opener = _opener(spec)
        self._libraries = resident()
        started = time.perf_counter()
        self._contender = opener()
        self._opening = time.perf_counter() - started
        self._decoding: int | None = None

    def prefill(self, ids: list[int]) -> float:
        tokens = _row(ids)
        return _median(lambda: self._contender.prefill(tokens))

    def decode(self, prompt: list[int], ids: list[int]) -> float:
        tokens = _row(ids)
        self._contender.prefill(_row(prompt))
        seconds = _median(lambda: self._contender.decode(tokens)) / len(ids)
        self._decoding = resident()
        return seconds

    def logits(self, prompt: list[int], ids: list[int]) -> list[float]:
        self._contender.prefill(_row(prompt))
        return self._contender.decode(_row(ids)).tolist()

    def start(self, prompt: list[int], ids: list[int]) -> Start:
        started = time.perf_counter()
        self._contender.prefill(_row(prompt))
        seconds = self._opening + time.perf_counter() - started
        self._contender.decode(_row(ids))
        return Start(seconds, peak() - self._libraries)

    def memory(self) -> Memory:
        return Memory(self._contender.weight_bytes, self._libraries, peak(), self._decoding)


def _serve(spec: Spec, pipe: Connection) -> None:
    """Opens the contender and answers requests until None or the end of the bench."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted bench closes its workers
    failure, server = _attempt(_Server, spec)
    pipe.send((failure, None))
    with contextlib.suppress(EOFError, OSError):
        while server is not None and (request := pipe.recv()) is not None:
            method, *arguments = request
            pipe.send(_attempt(getattr(server, method), *arguments))


def _answer(pipe: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    """The other end of `call_alone`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_libraries()
    pipe.send(_attempt(function, *arguments))


def _attempt(action: Callable[..., Any], *arguments: Any) -> tuple[str | None, Any]:
    """Why the action failed, or None, and its result."""
    try:
        return None, action(*arguments)
    except MqAoError as error:
        return str(error), None
    except Exception as error:  # whatever a peer raises belongs to its row of the table
        return f"{type(error).__name__}: {error}", None


def _opener(spec: Spec) -> Callable[[], Any]:
    """Imports what the contender needs, so that memory can be read before it is opened."""
    from mq_ao import ops
    from mq_ao.bench import contender

    ops.load_native()  # building the kernels at the first call would count as its time
    if spec.kind is Kind.LLAMA:
        from mq_ao.bench.peer_llama import Llama

        return lambda: Llama(spec.path, spec.threads, spec.longest)
    if spec.kind is Kind.PROGRAM:
        from mq_ao.loading import load

        if backend_of(spec.path) is EXECUTORCH:
            from mq_ao.lowering.executorch import set_threads

            set_threads(spec.threads)
        return lambda: contender.Program(load(spec.path))
    from mq_ao import models

    if spec.kind is Kind.TRANSFORMERS:
        from mq_ao.bench.peer_transformers import Transformers

        return lambda: Transformers(models.load(spec.path))
    return lambda: contender.Eager(models.MambaLM.from_pretrained(spec.path))


def _row(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


def _median(run: Callable[[], object]) -> float:
    times: list[float] = []
    while not times or (sum(times) < SHORTEST_SECONDS and len(times) < MOST_REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _status(key: str) -> int | None:
    """A size in bytes from Linux's /proc."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None


def peak() -> int:
    """Most resident bytes of this process so far."""
    # getrusage counts the parent's memory too when a child was started by vfork, so it comes second.
    measured = _status("VmHWM:")
    if measured is not None:
        return measured
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> int:
    """Resident bytes of this process."""
    measured = _status("VmRSS:")
    return peak() if measured is None else measured
