"""How good the gradients are: bias, spread and cosine against RTRL's."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.online.learning import CHUNK, METHODS, finite, make_learner
from benchmarks.online.tasks import brackets, gru, tasks
from rbpjax import online

RANDOM = ("uoro", "uoro16", "nobacktrack", "kf_rtrl")
QUALITY_STEPS, DRAWS = 96, 100


def quality(seeds: tuple[int, ...], units: int = 32) -> dict[str, Any]:
    """Gradients of a GRU on brackets, step by step, against RTRL's.

    Parameters at their start and after some training; the last quarter of the steps.
    Only the recurrent parameters count: the readout's gradient is exact in all.
    """
    task = tasks()["brackets"]()
    cell, loss = gru(units, task.vocabulary)
    learner = make_learner(METHODS["tbptt16"], task, units, 3e-3)
    gradients = {
        name: jax.jit(partial(streamed_gradients, METHODS[name].make(cell, loss)))
        for name in (*RANDOM, "snap1", "rflo")
    }
    exact = jax.jit(partial(streamed_gradients, online.rtrl(cell, loss)))
    cut = {
        f"tbptt{k}": jax.jit(partial(truncated, cell, loss, window=k))
        for k in (1, 4, 16)
    }

    def measure(params, seed: int) -> dict[str, dict[str, float]]:
        text = jnp.asarray(brackets(seed + 1000, QUALITY_STEPS + 1))
        key = jax.random.key(seed)
        truth = exact(params, text, key)
        rows = {}
        for name, function in gradients.items():
            draws = DRAWS if name in RANDOM else 1
            runs = [function(params, text, k) for k in jax.random.split(key, draws)]
            rows[name] = statistics(jnp.stack(runs), truth)
        for name, function in cut.items():
            rows[name] = statistics(function(params, text)[None], truth)
        return rows

    methods: dict[str, Any] = {}
    for seed in seeds:
        state = learner.init(jax.random.key(seed))
        text = jnp.asarray(brackets(seed, 4 * CHUNK + 1))
        for stage in ("start", "trained"):
            for name, row in measure(state[0], seed).items():
                entry = methods.setdefault(name, {}).setdefault(stage, [])
                entry.append({k: finite(v) for k, v in row.items()})
            if stage == "start":
                for i in range(4):
                    part = text[i * CHUNK : (i + 1) * CHUNK + 1]
                    state, _ = learner.chunk(state, part, jax.random.key(i))
    return {
        "units": units,
        "steps": QUALITY_STEPS,
        "draws": DRAWS,
        "training_characters": 4 * CHUNK,
        "methods": methods,
    }


def recurrent(grads: dict[str, jax.Array]) -> jax.Array:
    """``[step, P]``: the last quarter of the steps, the readout left out."""
    kept = [v for k, v in grads.items() if k not in ("readout", "offset")]
    rows = jnp.concatenate([v.reshape(len(v), -1) for v in kept], 1)
    return rows[QUALITY_STEPS * 3 // 4 :]


def streamed_gradients(est, params, text: jax.Array, key: jax.Array) -> jax.Array:
    """The gradients of one run."""
    carry = est.init(params, jnp.zeros(params["state"].shape[0]))

    def body(state, xy):
        carry, key = state
        key, signs = jax.random.split(key)
        carry, out = est.step(params, carry, *xy, est.noise(signs, carry))
        return (carry, key), out.grads

    _, grads = jax.lax.scan(body, (carry, key), (text[:-1], text[1:]))
    return recurrent(grads)


def statistics(grads: jax.Array, exact: jax.Array) -> dict[str, float]:
    """Measures of ``grads [draw, step, P]``, all relative to the exact gradient."""
    norm = jnp.linalg.norm
    cosine = lambda a, b: jnp.sum(a * b, -1) / (norm(a, axis=-1) * norm(b, axis=-1))
    size, mean = norm(exact), grads.mean(0)
    spread_ = jnp.sqrt(jnp.mean(jnp.sum((grads - mean) ** 2, (1, 2))))
    return {
        "bias": float(norm(mean - exact) / size),
        # What the bias of an unbiased estimator would be measured as.
        "bias_noise": float(spread_ / len(grads) ** 0.5 / size),
        "spread": float(spread_ / size),
        "cosine_step": float(jnp.mean(cosine(grads, exact[None]))),
        "cosine_sum": float(jnp.mean(cosine(grads.sum(1), exact.sum(0)[None]))),
    }


def truncated(cell, loss, params, text: jax.Array, window: int) -> jax.Array:
    """The gradient of each step's loss through the last ``window`` steps only."""
    x, y = text[:-1], text[1:]
    units = params["state"].shape[0]
    step = lambda h, x: (cell(params, x, h),) * 2
    states = jax.lax.scan(step, jnp.zeros(units), x)[1]
    before = jnp.concatenate([jnp.zeros((window, units)), states])[: len(x)]
    inputs = jnp.concatenate([jnp.zeros(window - 1, x.dtype), x])

    def last_loss(p, t):
        h = before[t]
        for i in range(window):
            # Windows that begin before the text are held at the start state.
            new = cell(p, inputs[t + i], h)
            h = jnp.where(t + i < window - 1, h, new)
        return loss(p, h, y[t])

    grad = jax.vmap(jax.grad(last_loss), (None, 0))
    return recurrent(grad(params, jnp.arange(len(x))))
