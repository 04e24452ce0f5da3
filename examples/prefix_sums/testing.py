"""Strings of bits with their parities, and tests with any number of iterations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import rbpjax
from rbpjax.nn import FixedPoint

STRINGS = {16: 64, 32: 64, 128: 32, 512: 16, 4096: 2}
"""How many strings of each length."""


def batch(
    count: int, length: int, seed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Strings of ±1 ``[count, length]``, and the parity up to each position."""
    bits = np.random.default_rng(seed).integers(0, 2, (count, length), np.int32)
    parities = np.cumsum(bits, axis=1, dtype=np.int32) % 2
    return (2 * bits - 1).astype(np.float32), parities


def moments(length: int) -> list[int]:
    """Numbers of iterations, a half octave apart, up to twice the length (256)."""
    last = max(2 * length, 256)
    found = [round(last / 2 ** (k / 2)) for k in range(2 * 12)]
    return sorted({n for n in found if n >= 8})


def tests(model: Any, length: int, seed: int) -> dict[str, Any]:
    """Bits and strings that are right, in %, and residuals, against iterations."""
    bits, parities = batch(STRINGS[length], length, (seed, 10**6, length))
    if not hasattr(model, "state"):
        right = np.asarray(nnx.jit(lambda model, bits: model(bits))(model, bits))
        hits = right.argmax(-1) == parities
        return {"bits": [100 * hits.mean()], "strings": [100 * hits.all(1).mean()]}
    x, zeros = nnx.jit(lambda model, bits: model.start(bits))(model, bits)
    found: dict[str, Any] = {"iterations": moments(length)}
    found |= {"bits": [], "strings": [], "residual": []}
    h, done = zeros, 0
    for n in found["iterations"]:
        h, residual, hits = _go_on(model, x, h, jnp.int32(n - done), parities)
        done = n
        found["bits"].append(100 * float(hits.mean()))
        found["strings"].append(100 * float(hits.all(1).mean()))
        found["residual"].append(float(residual))
    if length <= 512:  # and from elsewhere
        other = jax.random.normal(jax.random.key(seed), zeros.shape)
        other, _, _ = _go_on(model, x, other, jnp.int32(done), parities)
        found["distance"] = float(jnp.linalg.norm(other - h) / jnp.linalg.norm(h))
    return found


@nnx.jit
def _go_on(
    model: Any, x: jax.Array, h: jax.Array, steps: jax.Array, parities: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Some iterations more: the state, its residual, and which bits are right."""
    forward = rbpjax.FixedPointIteration(steps=steps)
    solution = FixedPoint(model.state.cell, forward=forward)(x, h)
    hits = model.scores(solution.value).argmax(-1) == parities
    return solution.value, solution.residual, hits
