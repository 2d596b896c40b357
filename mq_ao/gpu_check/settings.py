"""What is checked, and with which sizes: those for a GPU, and small ones that an interpreter can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mq_ao.models.config import MAMBA2_130M, MAMBA_130M, Mamba2Config, MambaConfig


@dataclass(frozen=True)
class Shape:
    """A model with random weights whose speed is measured.

    Attributes:
        config: the whole model.
        depths: numbers of layers that are built and run. Where these are fewer than the model has, the time of the
            whole one is estimated from the two of them: each layer more takes as long.
        batches: of decode.
        prompts: (sequences, tokens) of prefill.
    """

    config: MambaConfig | Mamba2Config
    depths: tuple[int, ...]
    batches: tuple[int, ...] = (1, 8, 64)
    prompts: tuple[tuple[int, int], ...] = ((1, 1024), (4, 1024))


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        square: rows and columns of a matrix product.
        copied: bytes of a copy.
        widths: that kernels' shapes are drawn from.
        lengths: tokens of the shapes that are drawn for each kernel, one after the other.
        prompt: tokens whose logits are compared.
        text: bytes of held-out text; of a program that was prepared, as many as were predicted then.
        written: tokens that are generated.
        shapes: models whose speed is measured, by name.
        decoded: tokens of a decode measurement.
        repeats: rounds of every measurement; medians are reported.
        images: that the bundled classifier sees.
        bundled: whether the bundled models are run; else small ones with random weights stand for them.
        calibration: tokens that the language model is calibrated with.
        published: whether configurations are timed at the sizes of published models; else at drawn ones.
    """

    square: int = 8192
    copied: int = 2**32
    widths: tuple[int, ...] = (80, 768, 1000, 1536, 2560)
    lengths: tuple[int, ...] = (1, 65, 300)
    prompt: int = 64
    text: int = 8192
    written: int = 64
    shapes: Mapping[str, Shape] = field(default_factory=lambda: _SHAPES)
    decoded: int = 32
    repeats: int = 10
    images: int = 256
    bundled: bool = True
    calibration: int = 4096
    published: bool = True


@dataclass(frozen=True)
class Setting:
    """One check.

    Attributes:
        device: "cuda", or a GPU of several such as "cuda:1"; "cpu" for a rehearsal.
        sizes: how large everything is.
        prepared: folder with programs that `prepare` made elsewhere; None: they are made here first.
        mode: how programs run, by the name of a `lowering.cuda.Mode`.
        seed: of all that is drawn.
    """

    device: str
    sizes: Sizes
    prepared: Path | None = None
    mode: str = "reduce-overhead"
    seed: int = 0

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU in it."""
        return self.device == "cpu"


_SHAPES: Mapping[str, Shape] = {
    "mamba-2.8b": Shape(replace(MAMBA_130M, d_model=2560, n_layer=64), (1, 4)),
    "mamba-130m": Shape(MAMBA_130M, (24,)),
    "mamba2-130m": Shape(MAMBA2_130M, (24,), (1, 64), ((1, 1024),)),
}
_SMALL: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "n_layer": 3}
_REHEARSED: Mapping[str, Shape] = {
    "mamba-2.8b": Shape(replace(MAMBA_130M, **_SMALL), (1, 2), (1,), ((1, 5),)),
    "mamba-130m": Shape(replace(MAMBA_130M, **_SMALL), (3,), (1,), ((2, 5),)),
    "mamba2-130m": Shape(replace(MAMBA2_130M, **_SMALL, headdim=16, d_state=16), (1,), (1,), ((1, 5),)),
}
REAL = Sizes()
"""For a GPU."""

REHEARSED = Sizes(
    square=64,
    copied=2**16,
    widths=(16, 48, 80),
    lengths=(1, 3, 18),
    prompt=3,
    text=16,
    written=2,
    shapes=_REHEARSED,
    decoded=2,
    repeats=1,
    images=2,
    bundled=False,
    calibration=64,
    published=False,
)
"""For the interpreter."""
