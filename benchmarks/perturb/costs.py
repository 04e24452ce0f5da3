"""What forward-only gradients cost: against bare passes, BPTT, and units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness.measurement import interleaved_times, spread, temporary_bytes
from benchmarks.perturb.learning import SAMPLES, Method, gradient, methods
from rbpjax import perturb

MANY = dict(samples=1000, chunk=100, units=500, steps=200, inputs=10, outputs=10)
SIZES = (100, 200, 500, 1000)
STEPS, EXAMPLES = 60, 16


def loss(out: jax.Array, y: jax.Array) -> jax.Array:
    """One scalar: these runs have no batch."""
    return jnp.mean((out - y) ** 2)


def data(units: int, steps: int, *rows: int) -> tuple[Any, ...]:
    """Parameters, inputs, a first state and targets, ten inputs and ten outputs."""
    keys = jax.random.split(jax.random.key(0), 4)
    draw = jax.random.normal
    params = perturb.DenseCell().init(keys[0], inputs=10, units=units, outputs=10)
    h0 = 0.1 * draw(keys[1], (*rows, units))
    return (
        params,
        draw(keys[2], (steps, *rows, 10)),
        h0,
        draw(keys[3], (steps, *rows, 10)),
    )


def many(repetitions: int) -> dict[str, Any]:
    """A thousand perturbations of a large network, against a thousand bare passes.

    A bare pass runs the same cell and loss on the same inputs without noise, from a
    first state of its own, chunked and batched in the same way.
    """
    size = MANY
    cell, steps, units = perturb.DenseCell(), size["steps"], size["units"]
    params, xs, h0, ys = data(units, steps)
    rows, chunk = size["samples"] // size["chunk"], size["chunk"]
    starts = 0.1 * jax.random.normal(jax.random.key(8), (rows, chunk, units))
    silent = perturb.Nodes(jnp.zeros(units), jnp.zeros(10))

    def bare(params: Any, starts: jax.Array, xs: jax.Array, ys: jax.Array) -> Any:
        def one(h: jax.Array) -> jax.Array:
            def step(h: jax.Array, inputs: tuple) -> tuple:
                h, out, _ = cell(params, inputs[0], h, silent)
                return h, loss(out, inputs[1])

            return jax.lax.scan(step, h, (xs, ys))[1]

        add = lambda sums, h: (sums + jnp.sum(jax.vmap(one)(h), axis=0), None)
        return jax.lax.scan(add, jnp.zeros(steps), starts)[0]

    rules = {
        "NP": perturb.NodePerturbation,
        "NP, normal noise": partial(
            perturb.NodePerturbation, noise=perturb.noise.normal
        ),
        "ANP": perturb.ActivityPerturbation,
        "ANP, one norm a sequence": partial(
            perturb.ActivityPerturbation, norm=perturb.norm.per_sequence
        ),
    }
    make = lambda rule, k: perturb.recurrent_value_and_grad(
        cell, loss, rule(num_samples=k, chunk=chunk)
    )
    arguments = (jax.random.key(7), params, xs, h0, ys)
    calls: dict[str, Callable] = {
        "bare passes": partial(jax.jit(bare), params, starts, xs, ys)
    }
    memory = {"bare passes": {"1000": temporary_bytes(bare, params, starts, xs, ys)}}
    for name, rule in rules.items():
        calls[name] = partial(jax.jit(make(rule, size["samples"])), *arguments)
        memory[name] = {
            str(k): temporary_bytes(make(rule, k), *arguments) for k in (100, 1000)
        }
    times = interleaved_times(calls, repetitions)
    first = times["bare passes"]
    return {
        "size": size,
        "rules": {
            name: {
                "seconds": spread(t),
                # Each run against the bare run just before it.
                "ratio": spread([a / b for a, b in zip(t, first, strict=True)]),
                "temporary_bytes": memory[name],
            }
            for name, t in times.items()
        },
    }


def by_units(repetitions: int) -> dict[str, Any]:
    """Seconds and memory of one gradient against units, for every method."""
    result: dict[str, dict[str, Any]] = {}
    for units in SIZES:
        params, xs, h0, ys = data(units, STEPS, EXAMPLES)
        calls, memory = {}, {}
        for name in ("bptt", "tbptt1", "wp", "np", "anp"):
            method: Method = methods(units, 10, 10)[name]
            f = gradient(method, perturb.DenseCell())
            arguments = (jax.random.key(1), params, xs, h0, ys)
            calls[name] = partial(jax.jit(f), *arguments)
            memory[name] = temporary_bytes(f, *arguments)
        for name, t in interleaved_times(calls, repetitions).items():
            at = result.setdefault(name, {})
            at[str(units)] = {"seconds": spread(t), "temporary_bytes": memory[name]}
    return {
        "steps": STEPS,
        "examples": EXAMPLES,
        "samples": SAMPLES,
        "methods": result,
    }
