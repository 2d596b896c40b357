"""Programs in `.pt2` archives. torch.export.pt2_archive has this too, and takes seconds to import."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor


class Compiled:
    """One of the programs that AOTInductor compiled into an archive.

    Args:
        archive: the file.
        name: of the program.
    """

    def __init__(self, archive: Path, name: str) -> None:
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(archive), name, False, 1, -1)

    def weight_names(self) -> list[str]:
        """Of the tensors that it reads."""
        return self._loader.get_constant_fqns()

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Reads these tensors from now on, where they lie; whoever holds the program holds them."""
        self._loader.load_constants(dict(weights), use_inactive=False, check_full_update=True, user_managed=True)

    def __call__(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        """Outputs, of tensors alone.

        Below autograd: operators with a gradient in Python would be entered through Python.
        """
        with torch._C._AutoDispatchBelowAutograd():
            return self._loader.boxed_run(list(inputs))
