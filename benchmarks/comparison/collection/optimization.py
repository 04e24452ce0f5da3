"""Fixed points that are minima, and those of linear algebra."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparison.collection.problem import (
    Problem,
    Problems,
    affine,
    definite,
    normal,
    orthogonal,
    soft,
)


def descent(b: Any, a: Any, h: Any) -> Any:
    """A step of size 1 on hᵀA h / 2 - bᵀh."""
    return h - (a @ h - b)


def momentum(b: Any, a: Any, h: Any) -> Any:
    speed = 0.8 * h["v"] - 0.5 * (a @ h["p"] - b)
    return {"p": h["p"] + speed, "v": speed}


def admm(penalty: Any, data: Any, h: Any) -> Any:
    """Lasso by the alternating direction method, in (z, u)."""
    inverse, b = data
    x = inverse @ (b + h["z"] - h["u"])
    z = soft(x + h["u"], jnp.exp(penalty))
    return {"z": z, "u": h["u"] + x - z}


def douglas_rachford(b: Any, data: Any, s: Any) -> Any:
    """The least 1-norm under A x = b."""
    a, pinv = data
    x = soft(s, 1.0)
    y = 2 * x - s
    return s + (y - pinv @ (a @ y - b)) - x


def expectation_maximization(data: Any, _: Any, h: Any) -> Any:
    """Weights, means and variances of a mixture of two normal distributions."""
    log = jnp.log(h["weight"]) - jnp.log(h["variance"]) / 2
    log = log - (data[:, None] - h["mean"]) ** 2 / (2 * h["variance"])
    share = jax.nn.softmax(log, axis=1)
    total = share.sum(0)
    mean = (share * data[:, None]).sum(0) / total
    variance = (share * (data[:, None] - mean) ** 2).sum(0) / total
    return {"weight": total / data.size, "mean": mean, "variance": variance}


def power_step(a: Any, _: Any, h: Any) -> Any:
    image = a @ h
    return image / jnp.linalg.norm(image)


def riccati(q: Any, ab: Any, x: Any) -> Any:
    """The discrete algebraic Riccati equation of a linear regulator."""
    a, b = ab
    gain = jnp.linalg.solve(jnp.eye(2, dtype=x.dtype) + b.T @ x @ b, b.T @ x @ a)
    return a.T @ x @ (a - b @ gain) + q


def problems() -> Problems:
    add = partial(Problem, "optimization")
    p: Problems = {}
    for condition in (1e1, 1e3, 1e5):
        p[f"gradient descent, condition {condition:g}"] = add(
            descent, normal(201, 40), definite(202, 40, condition), np.zeros(40)
        )
    p["momentum, state (p, v)"] = add(
        momentum,
        normal(203, 12),
        definite(204, 12, 100.0),
        {"p": np.zeros(12), "v": np.zeros(12)},
        floor=1.0,
        note="one leaf is zero",
    )
    p["ridge, for the logarithm of its penalty"] = add(
        lambda lam, ab, h: h - 0.5 * (ab[0] @ h + jnp.exp(lam) * h - ab[1]),
        np.array(-3.0),
        (definite(205, 20, 100.0), normal(206, 20)),
        np.zeros(20),
    )
    p["lasso by proximal gradient"] = add(
        lambda lam, ab, h: soft(h - (ab[0] @ h - ab[1]), jnp.exp(lam)),
        np.array(-2.0),
        (definite(207, 20, 50.0), normal(208, 20)),
        np.zeros(20),
    )
    p["lasso by ADMM, state (z, u)"] = add(
        admm,
        np.array(-1.0),
        (np.linalg.inv(definite(209, 20, 50.0) + np.eye(20)), normal(210, 20)),
        {"z": np.zeros(20), "u": np.zeros(20)},
    )
    a = normal(211, 6, 16)
    p["basis pursuit by Douglas-Rachford"] = add(
        douglas_rachford,
        a @ np.where(np.arange(16) % 7 == 0, 2.0, 0.0),
        (a, np.linalg.pinv(a)),
        np.zeros(16),
        note="the fixed point need not be unique",
    )
    p["non-negative least squares, condition 1e3"] = add(
        lambda b, a, h: jnp.maximum(h - (a @ h - b), 0),
        normal(212, 20),
        definite(213, 20, 1e3),
        np.ones(20),
    )
    random = np.random.default_rng(214)
    sample = np.concatenate([random.normal(-1, 1, 60), random.normal(1.2, 0.8, 90)])
    p["EM, two overlapping normal distributions"] = add(
        expectation_maximization,
        sample,
        None,
        {
            "weight": np.array([0.5, 0.5]),
            "mean": np.array([-0.5, 0.5]),
            "variance": np.ones(2),
        },
    )
    q = orthogonal(215, 12)
    spectrum = np.concatenate([[1.0], np.linspace(0.98, 0.1, 11)])
    p["power iteration, gap 0.98"] = add(
        power_step, (q * spectrum) @ q.T, None, np.ones(12) / 12**0.5
    )
    spectrum = np.concatenate([[-1.0], np.linspace(0.9, 0.1, 11)])
    p["power iteration, dominant eigenvalue -1"] = add(
        power_step,
        (q * spectrum) @ q.T,
        None,
        normal(216, 12) / 4,
        note="any eigenvector of a positive eigenvalue",
    )
    a = definite(217, 6, 20.0)
    p["matrix square root, Babylonian"] = add(
        lambda a, _, x: (x + jnp.linalg.solve(x, a)) / 2, a, None, np.eye(6)
    )
    p["matrix square root, X + (A - X²) / 4"] = add(
        lambda a, _, x: x + (a - x @ x) / 4, a, None, np.eye(6)
    )
    p["discrete Riccati equation, 4 × 4"] = add(
        riccati,
        np.eye(4),
        (1.2 * normal(218, 4, 4) / 2, normal(219, 4, 2)),
        np.eye(4),
    )
    a = normal(220, 4, 4)
    a *= 0.99 / np.abs(np.linalg.eigvals(a)).max()
    p["Stein equation X = A X Aᵀ + Q"] = add(
        lambda q, a, x: a @ x @ a.T + q, np.eye(4), a, np.zeros((4, 4))
    )
    turn = lambda angle: np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )
    x = normal(221, 2)
    p["affine, quarter turn, ρ 0.999"] = add(
        affine, 0.999 * turn(np.pi / 2), x, np.zeros(2)
    )
    p["affine, a turn by one radian"] = add(affine, turn(1.0), x, np.zeros(2))
    p["affine, ρ 3, I - J well conditioned"] = add(
        lambda w, x, h: -3.0 * h + w * x, np.array(1.5), normal(222, 32), np.zeros(32)
    )
    p["x - 5 h"] = add(
        lambda x, _, h: x - 5 * h, np.array([1.0, -2.0]), None, np.zeros(2)
    )
    p["affine, growth and then contraction"] = add(
        affine,
        0.3 * np.eye(24) + 1.2 * np.eye(24, k=1),
        normal(223, 24),
        np.zeros(24),
        note="transient",
    )
    p["tiny steps, 1e-7"] = add(
        lambda b, a, h: h - 1e-7 * (a @ h - b),
        normal(224, 10),
        definite(225, 10, 10.0),
        np.zeros(10),
        note="f(h) is h to rounding far from the answer in float32",
    )
    p["quick: 0.3 h + 1"] = add(
        lambda a, _, h: a * h + 1, np.array(0.3), None, np.zeros(3), note="quick"
    )
    return p
