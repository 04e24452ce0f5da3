"""Nine families of Jacobians, from easy to out of reach of the plain series."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Random = np.random.Generator


def _basis(random: Random, n: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(n, n)))[0]


def _symmetric(low: float, high: float) -> Callable[[Random, int], np.ndarray]:
    def make(random: Random, n: int) -> np.ndarray:
        q = _basis(random, n)
        return (q * np.linspace(low, high, n)) @ q.T

    return make


def _ginibre(rho: float) -> Callable[[Random, int], np.ndarray]:
    def make(random: Random, n: int) -> np.ndarray:
        a = random.normal(size=(n, n))
        return rho * a / np.abs(np.linalg.eigvals(a)).max()

    return make


def _non_normal(random: Random, n: int) -> np.ndarray:
    """Eigenvalues within ±0.5 under a strictly triangular part of norm 2."""
    a = np.triu(random.normal(size=(n, n)), 1)
    a = 2 * a / np.linalg.norm(a, 2) + np.diag(random.uniform(-0.5, 0.5, n))
    q = _basis(random, n)
    return q @ a @ q.T


FAMILIES: dict[str, Callable[[Random, int], np.ndarray]] = {
    "symmetric [0, 0.9]": _symmetric(0.0, 0.9),
    "symmetric [-0.99, 0.99]": _symmetric(-0.99, 0.99),
    "0.95 × orthogonal": lambda random, n: 0.95 * _basis(random, n),
    "Ginibre, ρ = 0.5": _ginibre(0.5),
    "Ginibre, ρ = 0.95": _ginibre(0.95),
    "Ginibre, ρ = 0.99": _ginibre(0.99),
    "non-normal, ρ = 0.5": _non_normal,
    "symmetric [-1.5, 0.9]": _symmetric(-1.5, 0.9),
    "Ginibre, ρ = 1.5": _ginibre(1.5),
}
