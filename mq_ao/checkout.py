"""In a checkout, and in an editable installation, `quantizer/` and `lowering/` lie beside this folder and not in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent
_BESIDE = {f"mq_ao.{name}": _HERE.parent / name / "__init__.py" for name in ("quantizer", "lowering")}


class _Beside(MetaPathFinder):
    """Finds these two packages, and nothing else that a checkout has: not its tests, and not this package twice."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package where it lies beside this folder, or None."""
        source = _BESIDE.get(fullname)
        return spec_from_file_location(fullname, source) if source is not None and source.is_file() else None


def find_packages_beside() -> None:
    """Makes `mq_ao.quantizer` and `mq_ao.lowering` those beside this folder, unless it holds them as a wheel's does.

    They come before whatever else is installed: parts of two versions must not meet.
    """
    if not all(_HERE.joinpath(source.parent.name, "__init__.py").is_file() for source in _BESIDE.values()):
        sys.meta_path.insert(0, _Beside)
