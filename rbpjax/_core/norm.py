"""Euclidean norms of pytrees of any magnitude, at the price of a sum of squares.

The squares of 1e-20 vanish in float32, those of 1e20 overflow. Dividing by the largest
entry first would take a second pass over the data, and a slow one. Here the sum of
squares is looked at: only where it is out of its depth is that second pass taken. The
divisor is a power of two, so that both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from rbpjax._core.tree import real_dtype
from rbpjax.types import PyTree

WINDOW = 2.0**64
"""Sums of squares between 1 / WINDOW and WINDOW lost nothing to under- or overflow."""


def norm(tree: PyTree) -> jax.Array:
    """The norm of all numbers of ``tree``, in float32 at least; see ``norms``."""
    return norms(tree)[0]


@jax.custom_jvp
def norms(*trees: PyTree) -> tuple[jax.Array, ...]:
    """The norm of each pytree of real arrays; its derivative is 0 where it is 0.

    All of them are guarded together, by one condition. All AD modes, any order.
    """
    return _norms(0)(trees)


@norms.defjvp
def _norms_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    values = norms(*primals)
    slope = lambda x, dx, n: jnp.sum(x / jnp.where(n == 0, 1, n) * dx, dtype=n.dtype)
    slopes = (
        sum(
            map(lambda x, dx, n=n: slope(x, dx, n), *map(jax.tree.leaves, (x, dx))),
            n * 0,
        )
        for x, dx, n in zip(primals, tangents, values, strict=True)
    )
    return values, tuple(slopes)


@cache
def _norms(lead: int) -> Callable[[tuple], tuple]:
    """``norms`` over all axes but the first ``lead``.

    Under ``vmap`` a condition for each row would take both ways: one for all rows, a
    leading axis more, is what the rule below makes of it.
    """
    body = lambda u: tuple(range(lead, u.ndim))

    @custom_vmap
    def rows(trees: tuple) -> tuple:
        squares = tuple(map(_squares, trees))
        least = jnp.stack([jnp.min(s, initial=WINDOW) for s in squares])
        most = jnp.stack([jnp.max(s, initial=0) for s in squares])
        safe = (jnp.min(least) > 1 / WINDOW) & (jnp.max(most) < WINDOW)
        plain = lambda: tuple(map(jnp.sqrt, squares))
        return lax.cond(safe, plain, lambda: tuple(map(_careful, trees)))

    def _squares(tree: PyTree) -> jax.Array:
        dtype = real_dtype(tree)
        return sum(
            (
                jnp.sum(jnp.square(u.astype(dtype)), body(u))
                for u in jax.tree.leaves(tree)
            ),
            jnp.zeros((), dtype),
        )

    def _careful(tree: PyTree) -> jax.Array:
        dtype = real_dtype(tree)
        most = jnp.zeros((), dtype)
        for u in jax.tree.leaves(tree):
            largest = jnp.max(jnp.abs(u), body(u), initial=0).astype(dtype)
            most = jnp.maximum(most, largest)
        # Of a number that is not finite there is no exponent, and no need for one.
        fine = (most > 0) & (most < jnp.inf)
        exponent = jnp.frexp(jnp.where(fine, most, 1))[1] - 1
        by = jnp.ldexp(jnp.ones((), dtype), exponent)
        wide = lambda u: u.astype(dtype) / jnp.expand_dims(by, body(u))
        return by * jnp.sqrt(_squares(jax.tree.map(wide, tree)))

    @rows.def_vmap
    def _(size: int, batched: list, trees: tuple) -> tuple[tuple, tuple]:
        every = lambda one, u: u if one else jnp.broadcast_to(u, (size, *u.shape))
        made = _norms(lead + 1)(jax.tree.map(every, batched[0], trees))
        return made, tuple(True for _ in made)

    return rows
