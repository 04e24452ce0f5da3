"""Time and memory of a training step, and of a gradient against the truncation."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.measurement import interleaved_times, spread, temporary_bytes
from benchmarks.hopfield.learning import METHODS, loss, make_update
from benchmarks.hopfield.network import Network

SWEEP = (10, 30, 100, 300, 1000)


def costs(
    options: Any, network: Network, images: np.ndarray, repetitions: int = 30
) -> dict[str, dict[str, Any]]:
    """Time and temporary memory of one training step on one image, by method."""
    w = network.init(jax.random.key(options.seeds[0]))
    state = optax.adam(options.learning_rate).init(w)
    image = jnp.asarray(images[0])
    calls, memory = {}, {}
    for name in options.methods:
        solve = METHODS[name](options, network.step)
        compiled = jax.jit(make_update(options, network, solve)).lower(w, state, image)
        compiled = compiled.compile()
        calls[name] = partial(compiled, w, state, image)
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
    times = interleaved_times(calls, repetitions)
    return {
        name: {
            "temporary_bytes": int(memory[name]),
            "step_seconds": spread(times[name]),
        }
        for name in options.methods
    }


def sweep(
    options: Any, network: Network, images: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Time and temporary memory of one gradient against the truncation.

    The forward run has as many updates as the truncation, 50 at least.
    """
    w = network.init(jax.random.key(options.seeds[0]))
    image = jnp.asarray(images[0])
    result: dict[str, dict[str, Any]] = {n: {} for n in options.methods}
    for k in SWEEP:
        at = dataclasses.replace(
            options, truncation=k, num_steps=max(k, options.num_steps)
        )
        grads = {
            name: jax.grad(
                partial(loss, network, METHODS[name](at, network.step)), has_aux=True
            )
            for name in options.methods
        }
        jitted = {
            n: partial(jax.jit(lambda w, x, g=g: g(w, x)[0]), w, image)
            for n, g in grads.items()
        }
        times = interleaved_times(jitted, 5)
        for name, grad in grads.items():
            cost = {
                "temporary_bytes": temporary_bytes(
                    lambda w, x, g=grad: g(w, x)[0], w, image
                ),
                "seconds": spread(times[name]),
            }
            result[name][str(k)] = cost
    return result
