"""Programs for ExecuTorch, run by the runtime of its Python package."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mq_ao.compat.executorch import reset_thread_pool
from mq_ao.errors import MqAoError, first_line
from mq_ao.files import check_output, replacing
from mq_ao.lowering.executorch.info import FORMAT, FORWARD, INFO
from mq_ao.lowering.executorch.options import Scan
from mq_ao.lowering.lowered_program import GeneratingProgram, LoweredProgram
from mq_ao.lowering.module_program import ModuleProgram
from mq_ao.models.token_inputs import one_token, refuse_mask, token_ids
from mq_ao.ops.native import executorch_build


class KeptState:
    """Stands for a state that a program keeps itself: what its last call gave, to be given to the next."""


Result = tuple[Any, ...]
"""Logits, and what stands for each state after them."""


class _Loaded(LoweredProgram):
    """A `.pte` file, loaded.

    The first program that lives in a process packs the weights that its methods share once. Others pack them twice, and
    so does one with the same integers under different scales: XNNPACK's cache knows a weight by its integers alone, and
    what it packs depends on the scales around them too.

    Args:
        path: the file, which stays open as long as the program lives.
        program: the file, loaded by ExecuTorch's runtime.
        info: what it says of itself.
    """

    _sharing: weakref.ref[_Loaded] | Callable[[], None] = staticmethod(lambda: None)
    """The program whose weights are packed once."""

    def __init__(self, path: Path, program: Any, info: Mapping[str, Any]) -> None:
        super().__init__(info)
        self._path = path
        self._program = program
        self._methods: set[str] = set()
        if _Loaded._sharing() is None and info["scan"] == Scan.NATIVE and info["packed_once"]:
            _Loaded._sharing = weakref.ref(self)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the file: weights and scales, and the little that lies around them."""
        return self._path.stat().st_size

    def save(self, path: str | Path) -> None:
        """Writes the program to a `.pte` file, under a temporary name that is renamed when it is complete.

        Raises:
            MqAoError: the path cannot be written.
        """
        with replacing(check_output(path, ".pte")) as temporary:
            shutil.copyfile(self._path, temporary)

    def _execute(self, method: str, *inputs: Tensor) -> list[Tensor]:
        """Runs a method; the first time it is loaded, and packs its weights."""
        if method not in self._methods and self._info["scan"] == Scan.NATIVE:
            executorch_build.share_packed_weights(_Loaded._sharing() is self)
        self._methods.add(method)
        try:
            return self._program.load_method(method).execute([tensor.contiguous() for tensor in inputs])
        except RuntimeError as error:
            reason = first_line(error)
            raise MqAoError(f"ExecuTorch cannot run {method!r} of {self._path}: {reason}") from error


class ExecutorchProgram(_Loaded, GeneratingProgram):
    """A language model in a `.pte` file, with the interface of a compiled one.

    Callable like the model: `(input_ids, *states) -> (logits, *states)`. The program keeps its states in its own
    memory: without one a call starts from zeros, and what a call gives stands for what the program keeps. It can be
    given to the very next call alone.

    Args:
        path: the file, which stays open as long as the program lives.
        program: the file, loaded by ExecuTorch's runtime.
        info: what it says of itself.
    """

    def __init__(self, path: Path, program: Any, info: Mapping[str, Any]) -> None:
        super().__init__(path, program, info)
        self._state = KeptState()
        self._fed = 0

    @classmethod
    def load(cls, path: str | Path) -> ExecutorchProgram:
        """Loads a program saved by `save`; the native operators are loaded or built first, where it needs them.

        Raises:
            MqAoError: the file is missing, damaged, not ours, of another version or not a language model's, or
                executorch or the native operators are missing.
        """
        program = load(path)
        if not isinstance(program, cls):
            raise MqAoError(f"{path} is not the program of a language model: load it with mq_ao.load.")
        return program

    def __call__(self, input_ids: Any, *states: Any, attention_mask: None = None) -> Result:
        """Logits of all tokens: (batch, length, vocab_size) float32, and what stands for the states after the last."""
        refuse_mask(attention_mask)
        ids = self._enter(input_ids, states)
        pieces = [self._prefill(piece, torch.arange(piece.shape[1])) for piece in ids.split(self._info["max_count"], 1)]
        return self._leave(torch.cat(pieces, dim=1))

    def prefill(self, input_ids: Any, *states: Any, attention_mask: None = None) -> Result:
        """Logits of the last token only: (batch, 1, vocab_size), and what stands for the states after it."""
        refuse_mask(attention_mask)
        for piece in self._enter(input_ids, states).split(self._info["max_length"], 1):
            logits = self._prefill(piece, torch.tensor([piece.shape[1] - 1]))
        return self._leave(logits)

    def decode(self, input_ids: Any, *states: Any) -> Result:
        """One token a sequence: input_ids (batch, 1) -> logits (batch, 1, vocab_size), and the states."""
        one_token(token_ids(input_ids))
        if not states or states[0] is None:
            raise MqAoError("the state is missing: give what the last call returned, or start with prefill.")
        return self._leave(self._run("decode", self._enter(input_ids, states)))

    def reset(self) -> None:
        """Sets the states to zero; every prompt that is given without a state does."""
        self._clear()
        self._state = KeptState()
        self._fed = 0

    def _masked(self, attention_mask: Any) -> dict[str, Any]:
        if attention_mask is not None:
            raise MqAoError(
                "a .pte program keeps the state of one batch, whose sequences have one length: generate from one "
                "prompt after the other, and leave attention_mask out."
            )
        return super()._masked(attention_mask)

    def step(self, ids: Tensor, *states: Any) -> Result:
        """See `GeneratingProgram.step`."""
        return self.prefill(ids, *states)

    def _prefill(self, ids: Tensor, positions: Tensor) -> Tensor:
        if ids.shape[1] == 1:
            return self._run("decode", ids)
        return self._run("prefill", ids, positions)

    def _enter(self, input_ids: Any, states: Sequence[Any]) -> Tensor:
        """Token ids as they are given, checked; starts from zeros where no state is given."""
        if len(states) > len(self._info["states"]):
            raise MqAoError(f"{len(states)} states are given: this program carries {len(self._info['states'])}.")
        batch = self._info["batch"]
        ids = token_ids(input_ids, self._info["vocab_size"])
        if len(ids) != batch:
            raise MqAoError(
                f"this program was made for a batch of {batch}, not {len(ids)}: lower it again with that batch in its "
                "options."
            )
        given = [state for state in states if state is not None]
        if any(state is not self._state for state in given):
            raise MqAoError(
                "this program keeps the state of its last call alone: give what that call gave, or None to start anew."
            )
        most, before = self._info.get("max_context"), self._fed if given else 0
        if most is not None and before + ids.shape[1] > most:
            raise MqAoError(
                f"{before} tokens and {ids.shape[1]} more do not fit into this program's context of {most}: lower the "
                "model again with a larger max_context in its options."
            )
        if not given:
            self.reset()
        return ids.cpu()

    def _leave(self, logits: Tensor) -> Result:
        self._state = KeptState()
        return logits, *[self._state] * len(self._info["states"])

    def _run(self, method: str, ids: Tensor, *positions: Tensor) -> Tensor:
        (result,) = self._execute(method, ids, *positions)
        self._fed += ids.shape[1]
        return result

    def _clear(self) -> None:
        """Sets what the program keeps to zero."""
        self._execute("reset")


class RunnerProgram(ExecutorchProgram):
    """One that was made for ExecuTorch's LLM runner: its method `forward` gives the logits of the last token alone."""

    def _prefill(self, ids: Tensor, positions: Tensor) -> Tensor:
        last = positions.tolist() == [ids.shape[1] - 1]
        return torch.cat([self._run(FORWARD, part) for part in ([ids] if last else ids.split(1, 1))], dim=1)

    def _run(self, method: str, ids: Tensor, *positions: Tensor) -> Tensor:
        """Runs `forward`, whatever method is asked for; its result lies in memory that the next call overwrites."""
        return super()._run(FORWARD, ids, torch.tensor([self._fed])).clone()

    def _clear(self) -> None:
        """Nothing: a call that begins anew says so."""


class ExecutorchModule(_Loaded, ModuleProgram):
    """A module of any kind in a `.pte` file, with the method `forward`.

    Args:
        path: the file, which stays open as long as the program lives.
        program: the file, loaded by ExecuTorch's runtime.
        info: what it says of itself.
    """

    def run(self, *inputs: Tensor) -> Sequence[Tensor]:
        """See `ModuleProgram.run`."""
        # The runtime's outputs lie in memory that its next call overwrites.
        return [tensor.clone() for tensor in self._execute("forward", *inputs)]


def load(path: str | Path) -> ExecutorchProgram | ExecutorchModule:
    """Loads a program saved by `save`; the native operators are loaded or built first, where it needs them.

    Raises:
        MqAoError: the file is missing, damaged, not ours or of another version, or executorch or the native operators
            are missing.
    """
    path = Path(path)
    program, info = open_program(path)
    if info["scan"] == Scan.NATIVE:
        try:
            executorch_build.load()
        except MqAoError as error:
            raise MqAoError(
                f"{path} needs the native operators for ExecuTorch, which `mq-ao build-kernels --executorch` "
                f"builds: {error}"
            ) from error
    if "signature" in info:
        return ExecutorchModule(path, program, info)
    return (RunnerProgram if FORWARD in info["methods"] else ExecutorchProgram)(path, program, info)


def open_program(path: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A file as ExecuTorch's runtime loads it, and what it says of itself; its operators are not asked for.

    Args:
        path: the file.
        options: of `executorch.runtime.Runtime.load_program`.

    Raises:
        MqAoError: the file is missing, damaged, not ours or of another version, or executorch is not installed.
    """
    if not path.is_file():
        raise MqAoError(f"there is no file {path}.")
    runtime = _runtime()
    foreign = f"{path} is not a program that mq_ao made: make one with `mq-ao quantize --backend executorch`."
    with _quiet():
        try:
            program = runtime.load_program(path, **options)
        except RuntimeError:
            raise MqAoError(foreign) from None
        if INFO not in program.method_names:
            raise MqAoError(foreign)
        info = json.loads(program.load_method(INFO).execute([])[0])
    if info["format"] != FORMAT:
        raise MqAoError(f"{path} has format {info['format']}, and this mq-ao reads {FORMAT}: quantize the model again.")
    return program, info


def set_threads(count: int) -> None:
    """Sets the number of threads of ExecuTorch's runtime in this process; nothing may be running.

    Raises:
        MqAoError: executorch is not installed.
    """
    _runtime()
    reset_thread_pool(count)


def _runtime() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "This API is experimental"
            import executorch.kernels.quantized  # noqa: F401  (registers the q/dq kernels)
            from executorch.runtime import Runtime
    except ImportError as error:
        raise MqAoError(
            'a .pte program needs the executorch package: install it with pip install "mq-ao[executorch]".'
        ) from error
    return Runtime.get()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the runtime's own complaints about a file, which say less than ours, off stderr."""
    saved = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
