"""Compiles portable graphs, each once on a machine: later only its weights are read."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

from mq_ao.errors import MqAoError
from mq_ao.lowering.inductor import package, packaging
from mq_ao.lowering.inductor.program import InductorProgram
from mq_ao.lowering.portable import Portable
from mq_ao.lowering.prefill_decode import both
from mq_ao.ops.native.build import cache_dir, compiler

logger = logging.getLogger(__name__)


def program(graph: Portable) -> InductorProgram:
    """The compiled program of a graph, which reads the graph's weights where they lie.

    Machine code is kept beside the native kernels (see `shared_library.cache_dir`), without weights.

    Raises:
        MqAoError: there is no C++ compiler, or the folder cannot be written.
    """
    path = _place(graph)
    if not path.is_file():
        compiler()  # Inductor's own complaint would come late, and say less
        logger.warning("compiling for this machine, once: this takes a minute or some (%s)", path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            packaging.write(path, both(graph.module, graph.states), graph.info, apart=graph.weights.keys())
        except OSError as error:
            raise MqAoError(f"the compiled program cannot be kept at {path} ({error}): set MQ_AO_CACHE.") from error
    loaded = package.read(path, graph.weights)
    # Of several graphs with one code each says of itself what it is.
    return InductorProgram(replace(loaded, info={**loaded.info, **graph.info}))


def _place(graph: Portable) -> Path:
    """Where the code of a graph is kept: by what it computes and for which machine, whatever its weights."""
    shapes = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in graph.weights.items()}
    content = json.dumps([graph.module.code, shapes, graph.info["states"], package.platform()], sort_keys=True)
    return cache_dir() / "programs" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.pt2"
