"""Roots as fixed points: the test set of Moré, Garbow and Hillstrom, and others.

A root of F is a fixed point of h - F(h) and of h + F(h), whichever a user writes down.

References:
  Moré, Garbow and Hillstrom, "Testing unconstrained optimization software", ACM
  Transactions on Mathematical Software 1981: functions 1 to 3, 7, 13, 26 to 31, 35.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.comparison.collection.problem import Problem, Problems


def grid(x: Any) -> Any:
    """The interior points of [0, 1], as many as x has entries."""
    return jnp.arange(1, x.size + 1, dtype=x.dtype) / (x.size + 1)


def rosenbrock(x: Any) -> Any:
    return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x: Any) -> Any:
    a, b = x
    first = a - 13 + ((5 - b) * b - 2) * b
    return jnp.stack([first, a - 29 + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: Any) -> Any:
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x).sum() - 1.0001])


def helical_valley(x: Any) -> Any:
    a, b, c = x
    turn = jnp.arctan(b / a) / (2 * jnp.pi) + jnp.where(a < 0, 0.5, 0.0).astype(x.dtype)
    return jnp.stack([10 * (c - 10 * turn), 10 * (jnp.hypot(a, b) - 1), c])


def powell_singular(x: Any) -> Any:
    a, b, c, d = x
    return jnp.stack(
        [a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2]
    )


def brown_almost_linear(x: Any) -> Any:
    return (x + x.sum() - (x.size + 1)).at[-1].set(x.prod() - 1)


def trigonometric(x: Any) -> Any:
    i = jnp.arange(1, x.size + 1, dtype=x.dtype)
    return x.size - jnp.cos(x).sum() + i * (1 - jnp.cos(x)) - jnp.sin(x)


def boundary_value(x: Any) -> Any:
    padded = jnp.pad(x, 1)
    cubed = (x + grid(x) + 1) ** 3
    return 2 * x - padded[:-2] - padded[2:] + cubed / (2 * (x.size + 1) ** 2)


def integral_equation(x: Any) -> Any:
    t = grid(x)
    cubed = (x + t + 1) ** 3
    below = jnp.cumsum(t * cubed)
    above = ((1 - t) * cubed).sum() - jnp.cumsum((1 - t) * cubed)
    return x + ((1 - t) * below + t * above) / (2 * (x.size + 1))


def broyden_tridiagonal(x: Any) -> Any:
    padded = jnp.pad(x, 1)
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def broyden_banded(x: Any) -> Any:
    i = np.arange(x.size)
    ahead = i[None] - i[:, None]
    band = (ahead >= -5) & (ahead <= 1) & (ahead != 0)
    return x * (2 + 5 * x**2) + 1 - jnp.asarray(band, x.dtype) @ (x * (1 + x))


def chebyquad(x: Any) -> Any:
    """Means of the shifted Chebyshev polynomials, less their integrals."""
    shifted = 2 * x - 1
    before, now = jnp.ones_like(x), shifted
    means = []
    for i in range(1, x.size + 1):
        integral = 0.0 if i % 2 else -1 / (i**2 - 1)
        means.append(now.mean() - integral)
        before, now = now, 2 * shifted * now - before
    return jnp.stack(means)


def root(function: Callable, sign: int, shift: Any, _: Any, h: Any) -> Any:
    """The step h ± (F(h) - shift)."""
    return h + sign * (function(h) - shift)


def chandrasekhar(c: Any, mu: Any, h: Any) -> Any:
    """The H-equation of radiative transfer by the midpoint rule."""
    kernel = mu[:, None] / (mu[:, None] + mu)
    return 1 / (1 - c / (2 * mu.size) * (kernel @ h))


# Function, start, signs, and the problem's further fields.
MORE_GARBOW_HILLSTROM: dict[str, tuple[Callable, Any, str, dict[str, Any]]] = {
    "Rosenbrock": (rosenbrock, [-1.2, 1.0], "-+", {}),
    "Freudenstein-Roth": (freudenstein_roth, [0.5, -2.0], "-+", {}),
    "Powell badly scaled": (powell_badly_scaled, [0.0, 1.0], "-", {}),
    "helical valley": (helical_valley, [-1.0, 0.0, 0.0], "-+", {}),
    "Powell singular": (
        powell_singular,
        [3.0, -1.0, 0.0, 1.0],
        "-",
        {"floor": 1.0, "allowed": 0.05, "note": "zero; singular root"},
    ),
    "Brown almost linear": (brown_almost_linear, np.full(10, 0.5), "-", {}),
    "trigonometric": (
        trigonometric,
        np.full(10, 0.1),
        "-",
        {"floor": 1.0, "note": "several roots, one of them zero"},
    ),
    "discrete boundary value": (
        boundary_value,
        np.arange(1, 21) / 21 * (np.arange(1, 21) / 21 - 1),
        "-+",
        {},
    ),
    "discrete integral equation": (
        integral_equation,
        np.arange(1, 21) / 21 * (np.arange(1, 21) / 21 - 1),
        "-",
        {},
    ),
    "Broyden tridiagonal": (broyden_tridiagonal, np.full(20, -1.0), "-+", {}),
    "Broyden banded": (broyden_banded, np.full(20, -1.0), "-+", {}),
    "Chebyquad": (chebyquad, np.arange(1, 6) / 6, "-+", {}),
}


def problems() -> Problems:
    add = partial(Problem, "equations")
    p: Problems = {}
    for name, (function, start, signs, more) in MORE_GARBOW_HILLSTROM.items():
        h0 = np.array(start, float)
        for sign in signs:
            step = partial(root, function, -1 if sign == "-" else 1)
            p[f"MGH {name}, h {sign} F"] = add(
                step, np.zeros_like(h0), None, h0, **more
            )
    mu = (np.arange(50) + 0.5) / 50
    for c in (0.9, 0.9999):
        p[f"Chandrasekhar's H, c {c}"] = add(
            chandrasekhar, np.array(c), mu, np.ones(50)
        )
    kepler = lambda e, mean, h: mean + e * jnp.sin(h)
    anomalies = np.array([0.1, 0.8, 2.0, 3.0])
    p["Kepler, e 0.3"] = add(kepler, np.array(0.3), anomalies, anomalies)
    anomalies = np.array([0.001, 0.01, 0.1])
    p["Kepler, e 0.999, near 0"] = add(kepler, np.array(0.999), anomalies, anomalies)
    arctan = lambda c, _, h: h - jnp.arctan(h - c)
    for c, start in ((0.0, 2.0), (5.0, 15.0), (1.0, 1001.0)):
        p[f"h - arctan(h - {c:g}) from {start:g}"] = add(
            arctan, np.array(c), None, np.array(start), floor=1.0, note="far start"
        )
    p["h + arctan(h - 1) from 30"] = add(
        lambda c, _, h: h + jnp.arctan(h - c),
        np.array(1.0),
        None,
        np.array(30.0),
        note="far start; J = 2 at the answer",
    )
    p["exp(-h) from 1e4"] = add(
        lambda a, _, h: jnp.exp(-a * h),
        np.array(1.0),
        None,
        np.array(1e4),
        note="far start",
    )
    p["a cos(h), ρ 1.3"] = add(
        lambda a, _, h: a * jnp.cos(h), np.array(2.0), None, np.array(0.5)
    )
    p["quick: 0.5 cos(h)"] = add(
        lambda a, _, h: a * jnp.cos(h),
        np.array(0.5),
        None,
        np.ones(4),
        note="quick",
    )
    return p
