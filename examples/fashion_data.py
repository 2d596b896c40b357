"""Fashion-MNIST (Xiao et al., 2017) from its four files, as Debian's package dataset-fashion-mnist installs them."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import typer
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
VALIDATION = 5_000
"""Training images that are not trained on: the last ones."""
CALIBRATION = 256
"""Training images that ship with the model: the first ones."""
SHIPPED = 1_000
"""Test images that ship with the model: the first ones."""


@dataclass(frozen=True)
class Images:
    """Images and what they show.

    Attributes:
        pixels: (images, 28, 28) uint8.
        labels: (images,) int64, 0 to 9.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Images:
        """Images start..stop."""
        return Images(self.pixels[start:stop], self.labels[start:stop])


def read(folder: Path, kind: str) -> Images:
    """The images of a kind, "train" (60,000) or "t10k" (10,000).

    Raises:
        typer.BadParameter: the files are not there or are no such files.
    """
    pixels = _read_idx(folder / f"{kind}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(folder / f"{kind}-labels-idx1-ubyte.gz", 1)
    if len(pixels) != len(labels):
        raise typer.BadParameter(f"{folder} holds {len(pixels)} images and {len(labels)} labels of kind {kind}.")
    return Images(pixels, labels.long())


def _read_idx(path: Path, axes: int) -> Tensor:
    try:
        raw = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise typer.BadParameter(
            f"{path} cannot be read ({error}): install Debian's package dataset-fashion-mnist, or give --data."
        ) from error
    # Two zero bytes, the type (8: unsigned bytes), the number of axes, then their sizes.
    sizes = numpy.frombuffer(raw, ">i4", axes, offset=4).tolist() if raw[:4] == bytes([0, 0, 8, axes]) else []
    start = 4 + 4 * axes
    if not sizes or len(raw) - start != numpy.prod(sizes):
        raise typer.BadParameter(f"{path} is no IDX file of {axes} axes: fetch it again.")
    return torch.from_numpy(numpy.frombuffer(raw, numpy.uint8, offset=start).reshape(sizes).copy())
