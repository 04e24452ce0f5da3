"""The network of Liao et al. 2018, section 5.1."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Network:
    """Visible, hidden and output units; as many outputs as visible."""

    visible: int
    hidden: int

    @property
    def units(self) -> int:
        return 2 * self.visible + self.hidden

    def init(self, key: jax.Array) -> jax.Array:
        return 1e-3 * jax.random.normal(key, (self.units, self.units))

    def clamp(self, image: jax.Array) -> jax.Array:
        return jnp.concatenate([image, jnp.zeros(self.units - self.visible)])

    def step(self, weights: jax.Array, clamp: jax.Array, h: jax.Array) -> jax.Array:
        """One update; the visible units stay at the clamp."""
        free = jnp.arange(self.units) >= self.visible
        return jnp.where(free, jax.nn.sigmoid(0.5 * h) @ weights, clamp)

    def output(self, h: jax.Array) -> jax.Array:
        return h[-self.visible :]


def symmetric(w: jax.Array) -> jax.Array:
    """W + Wᵀ without self-loops, computed once and not in each update."""
    return (w + w.T) * (1 - jnp.eye(len(w), dtype=w.dtype))
