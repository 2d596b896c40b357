"""llama.cpp on our weights (the optional peer `llama.cpp`), through llama-cpp-python's C interface."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import llama_cpp
import numpy.ctypeslib
import torch
from torch import Tensor

from mq_ao.errors import MqAoError


@llama_cpp.llama_log_callback
def _ignore(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Drops llama.cpp's log, which goes to stderr otherwise."""


llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


_TYPES = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def quantize(source: Path, path: Path, kind: str, threads: int) -> None:
    """Quantizes a float GGUF file with llama.cpp's own quantizer.

    Args:
        source: file of `gguf_writer.write_f32`.
        path: file to write.
        kind: "Q8_0" or "Q4_0": 8 or 4 bits in groups of 32.
        threads: threads to use.

    Raises:
        MqAoError: llama.cpp refused the model.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = _TYPES[kind]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) != 0:
        raise MqAoError(f"llama.cpp could not quantize this model to {kind}: run the bench without --peers llama.cpp.")


class Llama:
    """A GGUF model in llama.cpp, with its default batch sizes.

    Args:
        path: GGUF file.
        threads: threads to use.
        longest: most tokens in a sequence.
    """

    def __init__(self, path: Path, threads: int, longest: int) -> None:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise MqAoError(f"llama.cpp could not load {path.name}: is llama-cpp-python recent enough for Mamba?")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = longest
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise MqAoError(f"llama.cpp could not make a context of {longest} tokens for {path.name}.")
        self._batch = llama_cpp.llama_n_batch(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.weight_bytes = int(llama_cpp.llama_model_size(model))
        weakref.finalize(self, _free, self._context, model)

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        for part in ids[0].split(self._batch):
            self._run(part.tolist())
        return self._logits()

    def decode(self, ids: Tensor) -> Tensor:
        """See `Contender`."""
        for token in ids[0].tolist():
            self._run([token])
        return self._logits()

    def _run(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise MqAoError(f"llama.cpp failed on {len(tokens)} tokens (status {status}).")
        # Wait for the result: llama_decode may return before it is there.
        llama_cpp.llama_synchronize(self._context)

    def _logits(self) -> Tensor:
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(numpy.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).copy())


def _free(context: object, model: object) -> None:
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
