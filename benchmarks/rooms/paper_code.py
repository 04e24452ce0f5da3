"""Cases of activity perturbation and of the scalings of the authors' public code."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rooms.streaming import EPS, Random, distance, transformed
from rbpjax import perturb


def cell(p: Any, x: jax.Array, h: jax.Array, noise: Any) -> tuple[Any, Any, Any]:
    """A dense network with a readout."""
    a = h @ p["R"].T + x @ p["A"].T + noise.recurrent
    h = jnp.tanh(a)
    out = h @ p["B"].T + noise.readout
    return h, out, perturb.Nodes(a, out)


def loop_by_loop(random: Random, size: int) -> tuple[str, np.ndarray]:
    """Node and activity rules from given noise, against loops in NumPy."""
    n, steps, examples = (int(random.integers(1, 5)) for _ in range(3))
    inputs, outputs = int(random.integers(1, 3)), int(random.integers(1, 3))
    sigma = 10.0 ** random.uniform(-4, -2)
    units = n + inputs + outputs
    normal = lambda *shape: random.standard_normal((size, *shape))
    params = {"R": normal(n, n), "A": normal(n, inputs), "B": normal(outputs, n)}
    xs, ys = normal(steps, examples, inputs), normal(steps, examples, outputs)
    h0 = 0.3 * normal(examples, n)
    xi, nu = normal(steps, examples, n), normal(steps, examples, outputs)
    kind = str(random.choice(["node", "activity"]))
    flat = [v.reshape(size, -1) for v in (xi, nu)]
    drawn = np.concatenate(flat, 1)

    def one(params: Any, xs: Any, ys: Any, h0: Any, drawn: jax.Array) -> Any:
        given = lambda key, indices, size, dtype: drawn[None].astype(dtype)
        code = perturb.paper_code(units, sigma=sigma)
        options = dict(difference=code.node.difference, noise=given)
        credit = dict(credit=perturb.credit.instant)
        rule = (
            perturb.NodePerturbation(scale=sigma, **options, **credit)
            if kind == "node"
            else perturb.ActivityPerturbation(
                norm=code.activity.norm, scale=code.activity.scale, **options, **credit
            )
        )
        estimate = perturb.recurrent_value_and_grad(
            cell, lambda o, y: jnp.mean((o - y) ** 2), rule
        )
        return estimate(jax.random.key(0), params, xs, h0, ys)[1]

    way, mapped = transformed(random, one)
    got = mapped(*jax.tree.map(jnp.asarray, (params, xs, ys, h0, drawn)))
    want = {name: np.zeros_like(p) for name, p in params.items()}
    for i in range(size):
        p = {name: v[i] for name, v in params.items()}
        clean = noisy = h0[i]
        for t in range(steps):
            x, y, before = xs[i, t], ys[i, t], clean
            pre = clean @ p["R"].T + x @ p["A"].T
            moved = noisy @ p["R"].T + x @ p["A"].T + sigma * xi[i, t]
            clean, noisy = np.tanh(pre), np.tanh(moved)
            out, seen = clean @ p["B"].T, noisy @ p["B"].T + sigma * nu[i, t]
            delta = np.mean((seen - y) ** 2) - np.mean((out - y) ** 2)
            if kind == "node":
                e, f = delta * xi[i, t], delta * nu[i, t]
            else:
                e, f = (
                    math.sqrt(units) * delta * d / np.sum(d * d)
                    for d in (moved - pre, seen - out)
                )
            want["R"][i] += e.T @ before
            want["A"][i] += e.T @ x
            want["B"][i] += f.T @ clean
    # Losses of size one are known to ε, their differences are of size σ.
    return f"{kind} as in the code, {way}", distance(got, want) * sigma / (1e4 * EPS)


def preconditioned(random: Random, size: int) -> tuple[str, np.ndarray]:
    """The mean of activity perturbation: the covariance of δa times the errors.

    One step from a given state, so that all is in closed form: with the loss exact and
    every sign pattern drawn, E e = C g, C = E δa δaᵀ, per layer.
    """
    n, outputs = int(random.integers(1, 4)), int(random.integers(1, 3))
    normal = lambda *shape: random.standard_normal((size, *shape))
    params = {"R": normal(n, n), "A": normal(n, 1), "B": normal(outputs, n)}
    x, y, h0 = normal(1, 1, 1), normal(1, 1, outputs), 0.3 * normal(1, n)
    count = n + outputs
    rule = perturb.ActivityPerturbation(
        num_samples=2**count,
        difference=perturb.difference.Exact(),
        noise=lambda key, indices, size, dtype: (
            2.0 * ((indices[:, None] >> jnp.arange(size)) & 1).astype(dtype) - 1
        ),
        norm=None,
    )
    estimate = perturb.recurrent_value_and_grad(
        cell, lambda o, y: jnp.mean((o - y) ** 2), rule
    )
    one = lambda *args: estimate(jax.random.key(0), *args)[1]
    way, mapped = transformed(random, one)
    got = mapped(*jax.tree.map(jnp.asarray, (params, x, h0, y)))
    want = {name: np.zeros_like(p) for name, p in params.items()}
    for i in range(size):
        p = {name: v[i] for name, v in params.items()}
        h, u = h0[i, 0], x[i, 0, 0]
        a = p["R"] @ h + p["A"] @ u
        s = np.tanh(a)
        g_out = 2 * (p["B"] @ s - y[i, 0, 0]) / outputs
        through = p["B"] * (1 - s * s)  # ∂out/∂a
        e = through.T @ g_out  # the covariance of the first layer's δa is I
        f = (through @ through.T + np.eye(outputs)) @ g_out
        want["R"][i], want["A"][i] = np.outer(e, h), np.outer(e, u)
        want["B"][i] = np.outer(f, s)
    return f"activity, one step, {way}", distance(got, want) / (1e5 * EPS)


KINDS = {
    "perturbation: the code's loops": loop_by_loop,
    "perturbation: activity": preconditioned,
}
