"""Differential equations: implicit steps in time, and Jacobi sweeps on grids."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.comparison.collection.problem import Problem, Problems


def neighbours(h: Any) -> Any:
    """The sum over the next points of a grid with zeros around it, in 1 or 2 D."""
    padded = jnp.pad(h, 1)
    if h.ndim == 1:
        return padded[:-2] + padded[2:]
    inner = slice(1, -1)
    return (
        padded[:-2, inner] + padded[2:, inner] + padded[inner, :-2] + padded[inner, 2:]
    )


def sweep(strength: Any, load: Any, h: Any) -> Any:
    """Jacobi for -Δh = strength · load, the load scaled by the squared spacing."""
    return (neighbours(h) + strength * load) / (2 * h.ndim)


def bratu(strength: Any, load: Any, h: Any) -> Any:
    """Jacobi for -Δh = strength · eʰ."""
    return sweep(strength, load * jnp.exp(h), h)


def cavity(lid: Any, reynolds: Any, h: Any) -> Any:
    """A driven cavity: stream function and vorticity inside, Thom's formula outside."""
    psi, omega = h["psi"], h["omega"]
    spacing = 1 / (psi.shape[0] + 1)
    wall = lambda inner: -2 * inner / spacing**2
    walls = jnp.pad(omega, 1)
    walls = walls.at[1:-1, 0].set(wall(psi[:, 0])).at[1:-1, -1].set(wall(psi[:, -1]))
    walls = walls.at[0, 1:-1].set(wall(psi[0]))
    walls = walls.at[-1, 1:-1].set(wall(psi[-1]) - 2 * lid / spacing)
    stream = jnp.pad(psi, 1)
    along = lambda a: a[2:, 1:-1] - a[:-2, 1:-1]
    across = lambda a: a[1:-1, 2:] - a[1:-1, :-2]
    carried = along(stream) * across(walls) - across(stream) * along(walls)
    total = walls[2:, 1:-1] + walls[:-2, 1:-1] + walls[1:-1, 2:] + walls[1:-1, :-2]
    return {
        "psi": (neighbours(psi) + spacing**2 * omega) / 4,
        "omega": total / 4 - reynolds / 16 * carried,
    }


def van_der_pol(mu: Any, y: Any) -> Any:
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def euler(step: float, mu: Any, y: Any, h: Any) -> Any:
    return y + step * van_der_pol(mu, h)


def midpoint(step: float, mu: Any, y: Any, h: Any) -> Any:
    return y + step * van_der_pol(mu, (y + h) / 2)


def robertson(rates: Any, y: Any, h: Any) -> Any:
    """One implicit Euler step of length 1 of a stiff reaction, a leaf a species."""
    slow = rates[0] * h["a"]
    back = 1e4 * rates[1] * h["b"] * h["c"]
    fast = 3e7 * rates[2] * h["b"] ** 2
    return {
        "a": y["a"] - slow + back,
        "b": y["b"] + slow - back - fast,
        "c": y["c"] + fast,
    }


def brusselator(rates: Any, y: Any, h: Any) -> Any:
    """One implicit Euler step of length 0.5 of a reaction with diffusion."""
    u, v = h
    laplace = lambda a: jnp.pad(a, 1, mode="edge")
    spread = lambda a: laplace(a)[2:] + laplace(a)[:-2] - 2 * a
    reaction = u**2 * v
    du = rates[0] - (rates[1] + 1) * u + reaction + 0.5 * spread(u)
    dv = rates[1] * u - reaction + 0.5 * spread(v)
    return y[0] + 0.5 * du, y[1] + 0.5 * dv


def problems() -> Problems:
    add = partial(Problem, "differential")
    p: Problems = {}
    p["Jacobi for Poisson, 40 points"] = add(
        sweep, np.array(10.0), np.full(40, 1 / 41**2), np.zeros(40)
    )
    p["Bratu, Jacobi, 20 points"] = add(
        bratu, np.array(2.0), np.full(20, 1 / 21**2), np.zeros(20)
    )
    p["Bratu in two dimensions, 12 × 12"] = add(
        bratu, np.array(6.0), np.full((12, 12), 1 / 13**2), np.zeros((12, 12))
    )
    zero = np.zeros((10, 10))
    p["driven cavity, 10 × 10, Re 50"] = add(
        cavity, np.array(1.0), np.array(50.0), {"psi": zero, "omega": zero}
    )
    p["implicit Euler, rate -5 a step"] = add(
        lambda k, y, h: y - k * h,
        np.array(5.0),
        np.ones(4),
        np.ones(4),
        note="stiff",
    )
    y = np.array([2.0, 0.0])
    p["implicit Euler, van der Pol, step 0.1"] = add(
        partial(euler, 0.1), np.array(5.0), y, y
    )
    p["implicit midpoint, van der Pol, μ 50, step 0.2"] = add(
        partial(midpoint, 0.2), np.array(50.0), y, y
    )
    y = {"a": np.array(1.0), "b": np.array(0.0), "c": np.array(0.0)}
    p["Robertson's reaction, implicit Euler, step 1"] = add(
        robertson, np.array([0.04, 1.0, 1.0]), y, y, note="units; stiff"
    )
    t = np.linspace(0, 1, 20)
    y = 1 + 0.5 * np.sin(2 * np.pi * t), 3 + 0.5 * np.cos(2 * np.pi * t)
    p["Brusselator, implicit Euler, step 0.5"] = add(
        brusselator, np.array([1.0, 3.0]), y, y
    )
    return p
