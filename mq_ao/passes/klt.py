"""The KLT-enhanced rotation: eigenvectors of a covariance times a Hadamard matrix (docs/method.md, section 3)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from mq_ao.errors import Unsuitable
from mq_ao.ops import hadamard_matrix
from mq_ao.passes.base import Profile
from mq_ao.statistics import ChannelStatistics

logger = logging.getLogger(__name__)

FLAT = 1.01
"""Largest ratio of channel variances after a KLT-enhanced rotation, on the data it was computed from."""


class Basis(StrEnum):
    """What a rotation is made of."""

    KLT = "klt"
    """K H: every channel then has the same variance."""
    HADAMARD = "hadamard"
    """A Hadamard matrix with random signs, as QuaRot uses it."""


@dataclass(frozen=True)
class Rotation:
    """A rotation of some channels.

    Attributes:
        matrix: orthogonal float64 (channels, channels).
        profile: channel variances before it, after a Hadamard matrix alone, and after it.
        detail: what it is, and what it does to the variances, in words.
    """

    matrix: Tensor
    profile: Profile
    detail: str


def rotation(statistics: ChannelStatistics, basis: Basis, where: str) -> Rotation:
    """The rotation for values with these statistics.

    With too few tokens for a covariance (fewer than 4 a channel) the Hadamard matrix alone is used, after a warning.

    Raises:
        Unsuitable: there is no Hadamard matrix of that order; or a KLT-enhanced one does not flatten variances.
    """
    width, covariance = statistics.channels, statistics.covariance()
    matrix, what = random_hadamard(width), "Hadamard"
    before, alone = covariance.diagonal(), variances(covariance, matrix)
    after = alone
    if basis is Basis.KLT and statistics.enough_for_covariance:
        matrix, what = torch.linalg.eigh(covariance).eigenvectors @ hadamard_matrix.matrix(width), "KLT and Hadamard"
        after = variances(covariance, matrix)
        if not flatness(after) <= FLAT:
            raise Unsuitable(
                f"the KLT rotation at {where} leaves channel variances {flatness(after):.3g} apart: its covariance is "
                "not usable, calibrate on other data or use the basis 'hadamard'."
            )
    elif basis is Basis.KLT:
        logger.warning(
            "%d tokens are too few for the covariance of %d channels at %s: its rotation is a Hadamard matrix alone. "
            "Calibrate on at least %d tokens.",
            statistics.count,
            width,
            where,
            4 * width,
        )
        what = f"Hadamard: {statistics.count} tokens are too few for {width} channels"
    ratios = [flatness(item) for item in (before, alone, after)]
    detail = f"{what}; variance max/min {ratios[0]:.4g}, Hadamard alone {ratios[1]:.4g}, now {ratios[2]:.4g}"
    return Rotation(matrix, Profile(where, before, alone, after), detail)


def random_hadamard(width: int) -> Tensor:
    """diag(random signs) H, the same at every call."""
    signs = torch.randint(0, 2, (width, 1), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    return signs * hadamard_matrix.matrix(width)


def variances(covariance: Tensor, matrix: Tensor) -> Tensor:
    """Channel variances of x @ matrix."""
    return (matrix * (covariance @ matrix)).sum(0)


def flatness(channel_variances: Tensor) -> float:
    """Largest over smallest; 1 where all are zero."""
    low, high = float(channel_variances.min()), float(channel_variances.max())
    return 1.0 if high <= 0 else (high / low if low > 0 else float("inf"))
