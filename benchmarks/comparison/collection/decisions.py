"""Values, games, transport, and equilibria of markets, traffic and chemistry."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparison.collection.problem import (
    Problem,
    Problems,
    normal,
    softmax,
)


def bellman(discount: float, reward: Any, moves: Any, v: Any) -> Any:
    return jnp.max(reward + discount * (moves @ v), axis=0)


def soft_bellman(discount: float, reward: Any, moves: Any, v: Any) -> Any:
    """With a temperature of 0.1 in the place of the maximum."""
    q = reward + discount * (moves @ v)
    return 0.1 * jax.nn.logsumexp(q / 0.1, axis=0)


def page_rank(damping: Any, links: Any, h: Any) -> Any:
    d = jax.nn.sigmoid(damping)
    return d * (links.T @ h) + (1 - d) / h.size


def sinkhorn(epsilon: Any, cost: Any, h: Any) -> Any:
    """Both soft minima of one round, its potential pinned at the first entry."""
    n = cost.shape[0]
    other = -epsilon * jax.nn.logsumexp((h[:, None] - cost) / epsilon, 0)
    other = other + epsilon * np.log(n)
    new = -epsilon * jax.nn.logsumexp((other - cost) / epsilon, 1)
    return new - new[0]


def water(total: Any, alkalinity: Any, h: Any) -> Any:
    """Carbonate in water: five concentrations from 1e-8 to 1e-3, a leaf each."""
    return {
        "co2": total - h["hco3"] - h["co3"],
        "hco3": alkalinity - 2 * h["co3"] - h["oh"] + h["h"],
        "co3": 4.69e-11 * h["hco3"] / h["h"],
        "oh": 1e-14 / h["h"],
        "h": 4.45e-7 * h["co2"] / h["hco3"],
    }


def traffic(demand: Any, roads: Any, share: Any) -> Any:
    """A logit choice of road by travel times that rise with the traffic."""
    free, capacity = roads
    times = free * (1 + 0.15 * (demand * share / capacity) ** 4)
    return jax.nn.softmax(-2 * times)


def problems() -> Problems:
    add = partial(Problem, "decisions")
    p: Problems = {}
    reward, moves = normal(501, 3, 12), softmax(3 * normal(502, 3, 12, 12))
    for discount in (0.99, 0.999):
        p[f"value iteration, discount {discount}"] = add(
            partial(bellman, discount), reward, moves, np.zeros(12)
        )
    p["soft value iteration, discount 0.99"] = add(
        partial(soft_bellman, 0.99), reward, moves, np.zeros(12)
    )
    p["policy evaluation, discount 0.9999"] = add(
        lambda reward, moves, v: reward + 0.9999 * (moves @ v),
        reward[0],
        moves[0],
        np.zeros(12),
    )
    links = (normal(503, 30, 30) > 1.2).astype(float)
    links /= np.maximum(links.sum(1, keepdims=True), 1)
    p["PageRank, damping 0.95"] = add(
        page_rank, np.array(3.0), links, np.full(30, 1 / 30)
    )
    cost = np.square(normal(504, 15)[:, None] - normal(505, 15))
    for epsilon in (0.05, 0.01):
        p[f"Sinkhorn, one potential, ε {epsilon}"] = add(
            sinkhorn, np.array(epsilon), cost, np.zeros(15), note="nearly singular"
        )
    start = {"co2": 1e-3, "hco3": 1e-3, "co3": 1e-5, "oh": 1e-7, "h": 1e-7}
    p["carbonate in water"] = add(
        water,
        np.array(2e-3),
        np.array(1.9e-3),
        {k: np.array(v) for k, v in start.items()},
        note="units",
    )
    p["logit traffic, steep"] = add(
        traffic,
        np.array(6.0),
        (1 + 0.3 * np.abs(normal(506, 6)), 0.5 + np.abs(normal(507, 6))),
        np.full(6, 1 / 6),
    )
    game = normal(508, 8, 8)
    p["quantal response, antisymmetric game, β 5"] = add(
        lambda beta, game, h: jax.nn.softmax(beta * (game @ h)),
        np.array(5.0),
        (game - game.T) / 2,
        np.full(8, 1 / 8),
    )
    return p
