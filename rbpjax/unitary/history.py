"""The two ways back through a trajectory: by the inverse, and by replaying it.

Both functions return ``seek(t, slice, state) -> (h_t, state)``, to be called with
t = T-1, …, 0 in turn; ``slice`` holds what the step of time t was given.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rbpjax.types import PyTree


def by_inverse(back: Any, kept: PyTree, stride: int, end: PyTree) -> Any:
    """Finds h_t from h_{t+1}; state: (h_{t+1}, drift so far)."""
    scale = _norm(end)

    def seek(t: jax.Array, slice_: Any, state: Any) -> Any:
        after, drift = state
        h = back(slice_, after)
        anchor = jax.tree.map(lambda x: x[t // stride], kept)
        gap = _norm(jax.tree.map(jnp.subtract, h, anchor))
        # A start at zero has no norm of its own to compare with.
        gap = jnp.where(gap == 0, 0.0, gap / jnp.maximum(_norm(anchor), scale))
        here = t % stride == 0
        h = jax.tree.map(lambda a, b: jnp.where(here, a, b), anchor, h)
        drift = jnp.where(here, jnp.maximum(drift, gap.astype(drift.dtype)), drift)
        return h, (h, drift)

    return seek


def by_replay(forth: Any, slices: Any, kept: PyTree, slots: int) -> Any:
    """Finds h_t from the snapshots; state: (top, times of the snapshots, snapshots)."""

    def advance(h: PyTree, first: jax.Array, last: jax.Array) -> PyTree:
        one = lambda t, h: forth(jax.tree.map(lambda x: x[t], slices), h)
        return jax.lax.fori_loop(first, last, one, h)

    def hop(steps: jax.Array, free: jax.Array) -> jax.Array:
        """How far from a snapshot to set the next, with ``steps`` to be reversed."""
        # With s snapshots and r replays C(s + r, s) steps are reversible; the first
        # hop is C(s + r - 1, s), that is the fraction r / (s + r) of them.
        n, s = steps.astype(float), (free + 1).astype(float)
        grow = lambda v: (v[0] + 1, v[1] * (s + v[0] + 1) / (v[0] + 1))
        r, _ = jax.lax.while_loop(lambda v: v[1] < n, grow, (0 * s, 0 * s + 1))
        far = jnp.ceil(n * r / (s + r)).astype(steps.dtype)
        return jnp.where(free > 0, jnp.clip(far, 1, steps - 1), steps - 1)

    def push(t: jax.Array, v: Any) -> Any:
        h, now, top, at, store = v
        free = slots - 1 - top
        later = now + hop(t - now + 1, free)
        h = advance(h, now, later)
        top = jnp.minimum(top + 1, slots - 1)
        # With no slot free we are at t, and the state is used without being stored.
        put = lambda all_, one: all_.at[top].set(jnp.where(free > 0, one, all_[top]))
        return h, later, top, put(at, later), jax.tree.map(put, store, h)

    def seek(t: jax.Array, _: Any, state: Any) -> Any:
        top, at, store = state
        h = jax.tree.map(lambda x: x[top], store)
        h, _, top, at, store = jax.lax.while_loop(
            lambda v: v[1] < t, partial(push, t), (h, at[top], top, at, store)
        )
        # A snapshot at t is spent now; the earlier ones serve the steps before.
        return h, (jnp.where(at[top] == t, jnp.maximum(top - 1, 0), top), at, store)

    store = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (slots, *x.shape[1:])), kept)
    return (jnp.array(0), jnp.zeros(slots, int), store), seek


def _norm(tree: PyTree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(tree)))
