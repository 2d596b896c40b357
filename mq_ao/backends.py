"""The backends: what runs quantized programs. One line each; everything else about one is in its own package."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, cast

from mq_ao.errors import MqAoError

if TYPE_CHECKING:
    from torch.fx import GraphModule


class Lowering(Protocol):
    """What the package of a backend has to offer: graphs in, programs out."""

    KERNELS: Any
    """What its kernels take, role by role: `quantizer.kernels.Kernels`."""

    def lower(self, converted: GraphModule, info: Mapping[str, Any], options: Any = None) -> Any:
        """Makes a program (`models.program.Program`) of what `convert_pt2e` gave.

        Args:
            converted: the graph; it is not changed.
            info: what the program is to say of itself. With a `vocab_size`, it is a language model's.
            options: of this backend, if it has any.
        """

    def lower_float(self, module: GraphModule, info: Mapping[str, Any], options: Any = None) -> Any:
        """The same of the float graph of a language model, for comparison; it has no integer kernels."""

    def load(self, path: str | Path) -> Any:
        """Loads a program that was saved."""


@dataclass(frozen=True)
class Backend:
    """Something that runs quantized programs.

    Attributes:
        name: what users call it.
        suffix: how its saved programs end.
        runs_on: in words, for lists of choices.
        integers: what its kernels compute on: backends with the same take each other's graphs.
    """

    name: str
    suffix: str
    runs_on: str
    integers: str

    @property
    def lowering(self) -> Lowering:
        """Its package, which is imported when it is asked for: commands answer `--help` without torch."""
        return cast(Lowering, importlib.import_module(f"mq_ao.lowering.{self.name}"))

    def check_options(self, options: object, kind: type | None = None) -> None:
        """Raises MqAoError if options are given that are not of this backend's `kind`; None: it has none."""
        if options is None or (kind is not None and isinstance(options, kind)):
            return
        if kind is None:
            raise MqAoError(f"backend {self.name!r} takes no options: leave them out.")
        wanted = f"mq_ao.lowering.{self.name}.{kind.__name__}"
        raise MqAoError(f"the options of backend {self.name!r} are {wanted}, and not {type(options).__name__}.")


NATIVE = Backend("native", ".ptn", "any CPU that there are kernels for, without a compiler", "uint8")
INDUCTOR = Backend("inductor", ".pt2", "this machine's CPU", "uint8")
EXECUTORCH = Backend("executorch", ".pte", "edge devices", "int8, XNNPACK")
CUDA = Backend("cuda", ".ptc", "GPUs", "int8")

BACKENDS: Mapping[str, Backend] = MappingProxyType({item.name: item for item in (NATIVE, INDUCTOR, EXECUTORCH, CUDA)})
"""The backends by name."""

DEFAULT = NATIVE
"""What runs a model where no backend is named: nothing is compiled, and integers are those of `INDUCTOR`."""


def get_backend(name: str) -> Backend:
    """The backend of that name; to be called before long work.

    Raises:
        MqAoError: there is none; the message lists those that there are.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise MqAoError(f"unknown backend {name!r}: the backends are {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def backend_for(output: str | Path, named: str | None) -> Backend:
    """The backend of a program that is to be written: the one that was named, else the one that the file's name says.

    Raises:
        MqAoError: there is none of that name, or programs end otherwise.
    """
    if named is not None:
        return get_backend(named)
    if (found := backend_of(output)) is None:
        endings = ", ".join(f"{item.suffix} ({item.name})" for item in BACKENDS.values())
        raise MqAoError(f"{output} does not say which program to write: these end in {endings}.")
    return found


def backend_of(path: str | Path) -> Backend | None:
    """The backend whose saved program a file is by its name, or None if it is none's.

    Raises:
        MqAoError: `path` is no path.
    """
    if not isinstance(path, str | Path):
        raise MqAoError(f"a saved program's path is text or a Path, and not {type(path).__name__}.")
    return next((item for item in BACKENDS.values() if Path(path).suffix == item.suffix), None)
