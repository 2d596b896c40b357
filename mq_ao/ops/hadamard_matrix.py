"""Orthonormal Hadamard matrices: Sylvester's powers of two, Paley's two constructions, and their Kronecker products.

`matrix(n) = kron(base(m), sylvester(2^k)) / sqrt(n)` with `n = m * 2^k` and the power of two as large as the known
bases allow, because the fast transform does that part in `k` additions an element. `native/hadamard.h` builds the
same matrices without Python; a change here is a change there.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from mq_ao.errors import MqAoError, Unsuitable


def _prime_power(q: int) -> tuple[int, int] | None:
    """The prime p and the exponent e of q = p^e, or None."""
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    e = 0
    while q > 1 and q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if q == 1 and e > 0 else None


def _powers_of_generator(p: int, e: int) -> list[tuple[int, ...]]:
    """All nonzero elements of GF(p^e) as the powers of x modulo the first monic primitive polynomial.

    An element is the tuple of its coefficients, highest first; polynomials are tried in the same order.
    """
    one = (0,) * (e - 1) + (1,)
    for low in itertools.product(range(p), repeat=e):
        powers: list[tuple[int, ...]] = []
        element = one
        while len(powers) < p**e - 1:
            powers.append(element)
            # Times x, where x^e = -low.
            element = tuple((a - element[0] * b) % p for a, b in zip((*element[1:], 0), low, strict=True))
            if element == one:
                break
        if element == one and len(powers) == p**e - 1:
            return powers
    raise AssertionError(f"every finite field has a primitive polynomial, GF({p}^{e}) too")


def _jacobsthal(p: int, e: int) -> Tensor:
    """Q[a, b] = quadratic character of a - b over GF(p^e), elements in the order of their coefficients."""
    character = dict.fromkeys(itertools.product(range(p), repeat=e), 0)
    for exponent, element in enumerate(_powers_of_generator(p, e)):
        character[element] = -1 if exponent % 2 else 1
    table = torch.tensor(list(character.values()), dtype=torch.float64)
    elements = torch.tensor(list(character))
    places = p ** torch.arange(e - 1, -1, -1)
    return table[((elements[:, None] - elements[None]) % p * places).sum(-1)]


def _bordered(q: Tensor, sign: int) -> Tensor:
    """[[0, 1], [sign, Q]], with Q bordered by ones."""
    border = q.new_ones(1, len(q))
    return torch.cat((torch.cat((q.new_zeros(1, 1), border), 1), torch.cat((sign * border.t(), q), 1)))


def _field(m: int) -> tuple[int, int, int] | None:
    """Paley's construction for order m: 1 or 2, and the field's p and e; None if neither gives it."""
    if m % 4:
        return None
    for construction, q in ((1, m - 1), (2, m // 2 - 1)):
        found = _prime_power(q)
        if found and q % 4 == (3 if construction == 1 else 1):
            return (construction, *found)
    return None


@functools.cache
def base(m: int) -> Tensor:
    """Hadamard matrix of order 1 or of a Paley order, not normalised.

    Paley I: `I + [[0, 1], [-1, Q]]`, of order q + 1, q = 3 mod 4. Paley II: `C (x) [[1, 1], [1, -1]] + I (x) [[1, -1],
    [-1, -1]]` with `C = [[0, 1], [1, Q]]`, of order 2 (q + 1), q = 1 mod 4. Q is the matrix of quadratic characters.

    Args:
        m: 1, or an order that `factor` gives.

    Returns:
        float64 (m, m) of 1 and -1; shared, not to be written to.

    Raises:
        MqAoError: neither construction gives this order.
    """
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    field = _field(m)
    if field is None:
        raise MqAoError(f"there is no Paley matrix of order {m}: take an order from mq_ao.ops.hadamard_matrix.factor.")
    construction, p, e = field
    q = _jacobsthal(p, e)
    if construction == 1:
        return torch.eye(m, dtype=torch.float64) + _bordered(q, -1)
    plus, diagonal = q.new_tensor([[1, 1], [1, -1]]), q.new_tensor([[1, -1], [-1, -1]])
    return torch.kron(_bordered(q, 1), plus) + torch.kron(torch.eye(m // 2, dtype=torch.float64), diagonal)


def _factor(n: int) -> tuple[int, int] | None:
    if n < 1:
        return None
    power = n & -n
    while power:
        m = n // power
        if m == 1 or _field(m):
            return m, power
        power //= 2
    return None


@functools.cache
def factor(n: int) -> tuple[int, int]:
    """The order m of the base and the power of two 2^k, as large as can be, with n = m * 2^k.

    Raises:
        Unsuitable: no Hadamard matrix of order n can be made; the message names the nearest orders.
    """
    found = _factor(n)
    if found is None:
        below = next((i for i in range(n - 1, 0, -1) if _factor(i)), None)
        above = next(i for i in itertools.count(max(n + 1, 1)) if _factor(i))
        nearest = f"{above}" if below is None else f"{below} and {above}"
        why = "is known here" if n > 0 and n % 4 == 0 else "exists (it is 1, 2 or a multiple of 4)"
        raise Unsuitable(f"no Hadamard matrix of order {n} {why}: the nearest orders to choose are {nearest}.")
    return found


def sylvester(n: int) -> Tensor:
    """Hadamard matrix of order n, a power of two, not normalised: float64 (n, n) of 1 and -1."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


# A matrix of order 8192 takes 512 MB: only those of the last few sizes are kept.
@functools.lru_cache(maxsize=4)
def matrix(n: int) -> Tensor:
    """Orthonormal Hadamard matrix: `matrix(n) @ matrix(n).T = I`, entries +-1/sqrt(n).

    Args:
        n: order with a known factorisation (see `factor`).

    Returns:
        float64 (n, n); shared between callers, not to be written to.

    Raises:
        MqAoError: no Hadamard matrix of order n can be made.
    """
    m, power = factor(n)
    return torch.kron(base(m), sylvester(power) * n**-0.5)
