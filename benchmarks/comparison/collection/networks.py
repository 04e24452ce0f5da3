"""Equilibrium networks and other maps of machine learning."""

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
    normal,
    orthogonal,
)


def tanh_network(w: Any, x: Any, h: Any) -> Any:
    return jnp.tanh(w @ h + x)


def relu_network(w: Any, x: Any, h: Any) -> Any:
    return jax.nn.relu(w @ h + x)


def rounded_network(w: Any, x: Any, h: Any) -> Any:
    """The product in bfloat16, as an accelerator may make it."""
    product = w.astype(jnp.bfloat16) @ h.astype(jnp.bfloat16)
    return jnp.tanh(product.astype(h.dtype) + x)


def hopfield(beta: Any, memories: Any, h: Any) -> Any:
    return memories.T @ jax.nn.softmax(beta * (memories @ h))


def two_units(w: Any, x: Any, h: Any) -> Any:
    """A pressure near 1e6 that the velocity near 1 knows nothing of."""
    return {"p": 0.5 * h["p"] + 0.5e6, "v": jnp.tanh(w @ h["v"] + x)}


def coupled(w: Any, x: Any, h: Any) -> Any:
    """A tanh network in three leaves, in units of 1e-4, 1 and 1e4."""
    u = jnp.concatenate([1e4 * h["small"], h["one"], 1e-4 * h["large"]])
    a, b, c = jnp.split(jnp.tanh(w @ u + x), 3)
    return {"small": 1e-4 * a, "one": b, "large": 1e4 * c}


def layer_norm(h: Any) -> Any:
    centred = h - h.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def normed_relu(w: Any, x: Any, h: Any) -> Any:
    """A block of a deep equilibrium network: two products, relu, layer norm."""
    first, second = w
    return layer_norm(jax.nn.relu(h @ first + x) @ second + x)


def attention(w: Any, x: Any, h: Any) -> Any:
    """One attention head and a layer norm over the tokens h."""
    query, key, value = (h @ m for m in (w["q"], w["k"], w["v"]))
    weights = jax.nn.softmax(query @ key.T / h.shape[-1] ** 0.5)
    return layer_norm(x + weights @ value)


def gru(w: Any, x: Any, h: Any) -> Any:
    update = jax.nn.sigmoid(w["z"] @ h + x[0])
    reset = jax.nn.sigmoid(w["r"] @ h + x[1])
    return (1 - update) * h + update * jnp.tanh(w["n"] @ (reset * h) + x[2])


def self_consistent(strength: Any, chain: Any, n: Any) -> Any:
    """Densities of electrons on a chain in the field of these densities."""
    energies, states = jnp.linalg.eigh(chain + strength * jnp.diag(n))
    filling = jax.nn.sigmoid(-energies / 0.2)
    return (states**2) @ filling


def problems() -> Problems:
    add = partial(Problem, "networks")
    p: Problems = {}
    n = 32
    w, x, zero = normal(102, n, n) / n**0.5, normal(101, n), np.zeros(n)
    for gain in (0.5, 0.95, 1.5):
        p[f"tanh network, gain {gain}"] = add(tanh_network, gain * w, x, zero)
    p["tanh network, gain 3, h0 random"] = add(
        tanh_network, 3 * w, x, normal(103, n), note="several fixed points"
    )
    p["tanh network, orthogonal weights"] = add(
        tanh_network, 0.99 * orthogonal(104, n), 0.3 * x, zero
    )
    p["Hopfield, softmax form"] = add(
        hopfield, np.array(2.0), normal(105, 6, 24) / 24**0.5, normal(106, 24) / 5
    )
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    p["two units: pressure 1e6, velocity 1"] = add(
        two_units,
        0.9 * turn,
        np.array([0.5, 0.3]),
        {"p": np.full(1, 1e6), "v": np.zeros(2)},
        note="units",
    )
    p["coupled leaves 1e-4, 1, 1e4"] = add(
        coupled,
        1.5 * normal(107, 9, 9) / 3,
        0.5 * normal(108, 9),
        {"small": np.zeros(3), "one": np.zeros(3), "large": np.zeros(3)},
        note="units",
    )
    w50 = 0.9 * normal(109, 50, 50)
    w50 /= np.linalg.norm(w50, 2) / 0.9
    rows = normal(110, 8, 50)
    rows[3] = 0
    batched = lambda w, x, h: jnp.tanh(h @ w.T + x)
    p["padding row in a batch of 8 × 50"] = add(
        batched, w50, rows, np.ones((8, 50)), note="one row of the answer is zero"
    )
    p["padding row alone"] = add(
        tanh_network, w50, np.zeros(50), np.ones(50), floor=1.0, note="zero"
    )
    for gain in (1.0, 2.0, 3.0):
        weights = gain * normal(111, 24, 24) / 24**0.5, normal(112, 24, 24) / 24**0.5
        p[f"layer norm and relu, 4 × 24, gain {gain:g}"] = add(
            normed_relu, weights, normal(113, 4, 24), np.zeros((4, 24))
        )
    for gain in (1.0, 2.0):
        heads = {
            k: gain * normal(s, 8, 8) / 8**0.5
            for k, s in (("q", 114), ("k", 115), ("v", 116))
        }
        p[f"attention block, 4 × 8, gain {gain:g}"] = add(
            attention, heads, normal(117, 4, 8), np.zeros((4, 8))
        )
    gates = {
        k: 3 * normal(s, 24, 24) / 24**0.5
        for k, s in (("z", 118), ("r", 119), ("n", 120))
    }
    p["GRU cell, gain 3"] = add(gru, gates, normal(121, 3, 24), np.zeros(24))
    p["relu network, gain 1.5"] = add(
        relu_network,
        1.5 * normal(150, 24, 24) / 24**0.5,
        normal(151, 24),
        np.zeros(24),
        note="piecewise linear",
    )
    for gain in (0.5, 1.5):
        p[f"bfloat16 products, gain {gain}"] = add(
            rounded_network,
            gain * normal(124, 24, 24) / 24**0.5,
            normal(125, 24),
            np.zeros(24),
            allowed=2e-2,
            smooth=tanh_network,
            note="precision of f",
        )
    glass = normal(126, 20, 20)
    p["mean-field glass, β 1.5"] = add(
        lambda beta, jx, m: jnp.tanh(beta * (jx[0] @ m) + jx[1]),
        np.array(1.5),
        ((glass + glass.T) / 40**0.5, 0.1 * normal(127, 20)),
        0.1 * normal(128, 20),
        note="several fixed points",
    )
    chain = np.diag(0.5 * normal(129, 16)) - np.eye(16, k=1) - np.eye(16, k=-1)
    p["self-consistent field, 16 sites"] = add(
        self_consistent, np.array(2.0), chain, np.full(16, 0.5)
    )
    for norm in (0.1, 0.3, 0.5, 0.7):
        quick = normal(130, 64, 64)
        quick *= norm / np.linalg.norm(quick, 2)
        p[f"quick: tanh network, norm {norm}"] = add(
            tanh_network, quick, normal(131, 64), np.zeros(64), note="quick"
        )
    p["warm start at the fixed point"] = add(
        tanh_network, w50, np.zeros(50), np.zeros(50), floor=1.0, note="zero"
    )
    complex_normal = lambda seed, *s: normal(seed, *s) + 1j * normal(seed + 1, *s)
    a = complex_normal(132, 10, 10)
    a /= np.abs(np.linalg.eigvals(a)).max()
    for rho in (0.97, 1.6):
        p[f"complex affine, ρ {rho}"] = add(
            affine, rho * a, complex_normal(134, 10), np.zeros(10, complex)
        )
    p["complex, not holomorphic"] = add(
        lambda w, x, h: w @ (jnp.conj(h) / (1 + jnp.abs(h)).astype(h.dtype)) + x,
        1.5 * a[:6, :6],
        complex_normal(136, 6),
        np.zeros(6, complex),
    )
    return p
