"""From a file to a program, without what makes programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mq_ao.backends import BACKENDS, backend_of
from mq_ao.errors import MqAoError
from mq_ao.models.program_interface import LanguageProgram


def load(path: str | Path) -> LanguageProgram | Any:
    """Loads a program that `save` wrote: `.pt2` (inductor), `.ptn` (native), `.pte` (executorch) or `.ptc`
    (cuda).

    A `.pt2` holds machine code, and a `.ptc` may hold pickled objects: loading either can execute code, so load only
    those that come from sources that you trust (docs/SECURITY.md).

    A program for cuda runs on the GPU if there is one, else on the CPU, slowly; `mq_ao.lowering.cuda.load` can choose.

    Raises:
        MqAoError: the file is missing, damaged, not ours, or of another version.
    """
    backend = backend_of(path)
    if backend is None:
        suffixes = ", ".join(item.suffix for item in BACKENDS.values())
        raise MqAoError(f"{path} is not a program saved by mq_ao: those end in {suffixes}.")
    return backend.lowering.load(path)
