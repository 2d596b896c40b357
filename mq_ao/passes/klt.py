"""The KLT-enhanced rotation: eigenvectors of a covariance times a Hadamard matrix (METHOD.md section 3)."""

from __future__ import annotations

import logging
from enum import StrEnum

import torch
from torch import Tensor

from mq_ao.errors import MqAoError
from mq_ao.ops import hadamard_matrix
from mq_ao.passes.statistics import ChannelStatistics

logger = logging.getLogger(__name__)

FLAT = 1.01
"""Largest ratio of channel variances after a KLT-enhanced rotation, on the data it was computed from."""


class Basis(StrEnum):
    """What a rotation is made of."""

    KLT = "klt"
    """K H: every channel then has the same variance."""
    HADAMARD = "hadamard"
    """A Hadamard matrix with random signs, as QuaRot uses it."""


def rotation(statistics: ChannelStatistics, basis: Basis, where: str, seed: int = 0) -> tuple[Tensor, str]:
    """An orthogonal float64 matrix (channels, channels) for values with these statistics, and what it is, in words.

    With too few tokens for a covariance (fewer than 4 a channel) the Hadamard matrix alone is used, after a warning.

    Raises:
        MqAoError: there is no Hadamard matrix of that order; or a KLT-enhanced rotation does not flatten the variances.
    """
    width = statistics.channels
    h = hadamard_matrix.matrix(width)
    if basis is Basis.KLT and not statistics.enough_for_covariance:
        logger.warning(
            "%d tokens are too few for the covariance of %d channels at %s: its rotation is a Hadamard matrix alone. "
            "Calibrate on at least %d tokens.",
            statistics.count,
            width,
            where,
            4 * width,
        )
        return random_hadamard(width, seed), f"Hadamard: {statistics.count} tokens are too few for {width} channels"
    if basis is Basis.HADAMARD:
        return random_hadamard(width, seed), "Hadamard"
    covariance = statistics.covariance()
    k = torch.linalg.eigh(covariance).eigenvectors
    combined = k @ h
    ratio = flatness(variances(covariance, combined))
    if not ratio <= FLAT:
        raise MqAoError(
            f"the KLT rotation at {where} leaves channel variances {ratio:.3g} apart: its covariance is not usable, "
            "calibrate on other data or use the basis 'hadamard'."
        )
    return combined, "KLT and Hadamard"


def random_hadamard(width: int, seed: int = 0) -> Tensor:
    """diag(random signs) H."""
    signs = torch.randint(0, 2, (width, 1), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return signs * hadamard_matrix.matrix(width)


def variances(covariance: Tensor, matrix: Tensor) -> Tensor:
    """Channel variances of x @ matrix."""
    return (matrix * (covariance @ matrix)).sum(0)


def flatness(channel_variances: Tensor) -> float:
    """Largest over smallest; 1 where all are zero."""
    low, high = float(channel_variances.min()), float(channel_variances.max())
    return 1.0 if high <= 0 else (high / low if low > 0 else float("inf"))
