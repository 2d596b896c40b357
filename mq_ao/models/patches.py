"""Patches of images and videos as tokens."""

from __future__ import annotations

from torch import Tensor, nn


def embed_patches(pixels: Tensor, projection: nn.Conv2d | nn.Conv3d) -> Tensor:
    """What a strided convolution without padding computes, as a linear over unfolded patches.

    Args:
        pixels: (batch, in_channels, *size).
        projection: holds weight (d_model, in_channels, *patch_size) and bias (d_model), and the strides.

    Returns:
        tokens (batch, patches, d_model), the last axis of the grid running fastest.
    """
    axes = len(projection.kernel_size)
    for axis, (size, step) in enumerate(zip(projection.kernel_size, projection.stride, strict=True), start=2):
        pixels = pixels.unfold(axis, size, step)
    grid, inside = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
    patches = pixels.permute(0, *grid, 1, *inside).flatten(1 + axes).flatten(1, axes)
    return nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)
