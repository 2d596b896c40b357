"""Images in a folder for each class, as ImageNet's are unpacked, read as its classifiers are evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from mq_ao import MqAoError

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, 0 to 1."""
SUFFIXES = {".jpeg", ".jpg", ".png"}


class ImageFolder:
    """Images and their classes, which are numbered by their folders' names in order.

    Args:
        folder: has a folder for each class.
        limit: so many images at most, spread over all classes.

    Raises:
        MqAoError: there are none.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        found = [
            (path, label)
            for label, place in enumerate(classes)
            for path in sorted(place.iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise MqAoError(f"{folder} has no folders with images: unpack them into a folder for each class.")
        count = min(limit or len(found), len(found))
        self.classes = len(classes)
        self._images = [found[index * len(found) // count] for index in range(count)]

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, side: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (batch, 3, side, side) float32, and their classes (batch) int64."""
        for start in range(0, len(self), batch):
            part = self._images[start : start + batch]
            yield torch.stack([read(path, side) for path, _ in part]), torch.tensor([label for _, label in part])


def read(path: Path, side: int) -> Tensor:
    """The middle of an image (3, side, side): of its shorter side, seven eighths.

    Raises:
        MqAoError: it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise MqAoError(f"{path} is no image that can be read: {error}") from error
    scale = side * 8 / 7 / min(image.size)
    image = image.resize([max(side, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    pixels = torch.from_numpy(numpy.array(image.crop((left, top, left + side, top + side))))
    return ((pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1).contiguous()
