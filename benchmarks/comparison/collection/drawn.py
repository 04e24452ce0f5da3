"""Random fixed points beside the classic ones: nobody tunes to these.

Ten kinds, each in three sizes; the problems of a kind and size differ in all of their
numbers, and are solved in one mapped program. Not all of them have a fixed point: what
counts is that nothing wrong is called converged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparison.collection.problem import Problem, affine

Random = np.random.Generator
SIZES = (3, 12, 32)


class Kind(NamedTuple):
    """A step and how its ``(params, inputs)`` are drawn for n unknowns.

    Attributes:
      f: the step.
      draw: ``(random, n) -> (params, inputs)``.
      has_answer: False if there is no fixed point, whatever is drawn.
    """

    f: Callable[[Any, Any, Any], Any]
    draw: Callable[[Random, int], tuple[Any, Any]]
    has_answer: bool = True


def network(activation: Callable) -> Callable:
    return lambda w, x, h: activation(w @ h + x)


def weights(random: Random, n: int) -> tuple[Any, Any]:
    """A gain from 0.5 to 4."""
    gain = 0.5 * 8 ** random.uniform()
    return gain * random.normal(size=(n, n)) / n**0.5, random.normal(size=n)


def hessian(random: Random, n: int) -> tuple[Any, Any]:
    """(b, A) with a condition of A from 10 to 1e6."""
    q = np.linalg.qr(random.normal(size=(n, n)))[0]
    return random.normal(size=n), (
        q * 10 ** -np.linspace(random.uniform(1, 6), 0, n)
    ) @ q.T


def two_leaves(w: Any, given: Any, h: Any) -> Any:
    """A tanh network in two leaves, in units from 1e-5 to 1e5."""
    x, units = given
    half = (x.size + 1) // 2
    u = jnp.concatenate([h["a"] / units[0], h["b"] / units[1]])
    new = jnp.tanh(w @ u + x)
    return {"a": units[0] * new[:half], "b": units[1] * new[half:]}


def draw_two_leaves(random: Random, n: int) -> tuple[Any, Any]:
    w, x = weights(random, n)
    return w, (x, 10 ** random.uniform(-5, 5, size=2))


def small(random: Random, n: int) -> tuple[Any, Any]:
    """Weights of norm 0.2 to 2, and a drive of order one half."""
    w = random.normal(size=(n, n))
    size = 0.2 * 10 ** random.uniform()
    return size * w / np.linalg.norm(w, 2), random.normal(size=n) / 2


KINDS = {
    "tanh network": Kind(network(jnp.tanh), weights),
    "relu network": Kind(network(jax.nn.relu), weights),
    "softmax network": Kind(network(jax.nn.softmax), weights),
    "affine": Kind(affine, weights),
    "descent": Kind(lambda b, a, h: h - (a @ h - b), hessian),
    "quadratic": Kind(lambda w, x, h: x + (w @ h) * h, small),
    "two units": Kind(two_leaves, draw_two_leaves),
    "rational": Kind(lambda w, x, h: x / (1 + (w @ h) ** 2), small),
    "none: root of a square": Kind(
        lambda w, x, h: jnp.sqrt(h**2 + jnp.cos(w @ h) ** 2 + 1e-3 + 0 * x),
        weights,
        False,
    ),
    "none: ever smaller steps": Kind(
        lambda w, x, h: h + jnp.exp(x - jnp.abs(h) + 0.1 * jnp.tanh(w @ h)),
        weights,
        False,
    ),
}


def draw(kind: str, n: int, count: int, seed: int) -> list[Problem]:
    """The problems of a kind and size: ``h0`` is zero, or normal of size 0.1 to 10."""
    made = KINDS[kind]
    random = np.random.default_rng((seed, list(KINDS).index(kind), n))
    problems = []
    for _ in range(count):
        params, inputs = made.draw(random, n)
        h0 = random.normal(size=n) * random.choice([0.0, 0.1, 1.0, 10.0])
        if kind == "two units":
            half, units = (n + 1) // 2, inputs[1]
            h0 = {"a": units[0] * h0[:half], "b": units[1] * h0[half:]}
        problems.append(
            Problem(kind, made.f, params, inputs, h0, has_answer=made.has_answer)
        )
    return problems


def stacked(trees: list[Any]) -> Any:
    """Trees of arrays -> one, with an axis more in front."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
