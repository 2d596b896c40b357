"""Hadamard matrices: orthonormal, of equal magnitudes, with the largest power of two, and clear about other sizes."""

from __future__ import annotations

import pytest
import torch

from mq_ao import MqAoError
from mq_ao.ops import hadamard_matrix as hm

# The widths and dt ranks of public checkpoints, and the smallest.
SIZES = [192, 384, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 8192, 4, 12, 24, 48, 64, 96, 128, 160, 256, 1, 2]


@pytest.mark.parametrize("n", SIZES)
def test_matrices_are_orthonormal_with_entries_of_one_magnitude(n: int) -> None:
    h = hm.matrix.__wrapped__(n)  # not kept: the largest takes 512 MB
    assert h.shape == (n, n) and h.dtype == torch.float64
    assert (h.abs() == n**-0.5).all()
    # All rows of the small matrices; of the large ones a sample, each against all rows.
    rows = torch.arange(n) if n <= 1536 else torch.randperm(n, generator=torch.Generator().manual_seed(0))[:48]
    identity = torch.zeros(len(rows), n, dtype=torch.float64)
    identity[torch.arange(len(rows)), rows] = 1
    assert (h[rows] @ h.t() - identity).abs().max() < 1e-12


# Paley I over primes (12, 20, 44) and prime powers (28: 27); Paley II over primes (36: 17) and prime powers (52: 25).
@pytest.mark.parametrize("m", [1, 4, 8, 12, 20, 24, 28, 32, 36, 44, 52, 60, 76, 100, 244])
def test_bases_are_hadamard_matrices(m: int) -> None:
    h = hm.base(m)
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.t(), m * torch.eye(m, dtype=torch.float64))


def test_matrix_is_the_kronecker_product() -> None:
    exact = torch.kron(hm.base(12), hm.sylvester(16))
    assert torch.equal(hm.matrix(192), exact * 192**-0.5)
    for i in range(4):
        for j in range(4):
            assert hm.sylvester(4)[i, j] == (-1) ** bin(i & j).count("1")


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (1, (1, 1)),
        (2, (1, 2)),
        (4, (1, 4)),
        (8192, (1, 8192)),
        (12, (12, 1)),
        (24, (12, 2)),
        (192, (12, 16)),
        (1536, (12, 128)),
        (160, (20, 8)),
        (5120, (20, 256)),
        (28, (28, 1)),
        (3584, (28, 128)),
        (52, (52, 1)),
        # 23 has no base of order 92 or 184: order 368 = 367 + 1 is the first.
        (736, (368, 2)),
    ],
)
def test_the_power_of_two_is_the_largest(n: int, factors: tuple[int, int]) -> None:
    assert hm.factor(n) == factors


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (6, "no Hadamard matrix of order 6 exists .*multiple of 4.*: the nearest orders to choose are 4 and 8"),
        (92, "order 92 is known here: the nearest orders to choose are 88 and 96"),
        (3, "2 and 4"),
        (0, "the nearest orders to choose are 1[.]"),
        (-4, "the nearest orders to choose are 1[.]"),
    ],
)
def test_other_sizes_are_refused_with_their_neighbours(n: int, message: str) -> None:
    with pytest.raises(MqAoError, match=message):
        hm.factor(n)
    with pytest.raises(MqAoError, match=message):
        hm.matrix(n)


def test_an_order_without_construction_is_refused_as_base() -> None:
    with pytest.raises(MqAoError, match="no Paley matrix of order 92"):
        hm.base(92)
