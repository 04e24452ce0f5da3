"""Euclidean norms of pytrees of any magnitude, at the price of a sum of squares.

The squares of 1e-20 vanish in float32, those of 1e20 overflow. Dividing by the largest
entry first would take a second pass over the data, and a slow one. Here the sum of
squares is looked at: only where it is out of its depth is that second pass taken. The
divisor is a power of two, so that both ways give the same bits.

Under ``vmap`` a condition becomes a selection between two results, both of them
computed. So the functions here are written for any number of leading axes, with one
condition for all rows, and ``vmap`` adds an axis (``rowwise``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from rbpjax._core.tree import real_dtype
from rbpjax.types import PyTree

WINDOW = 2.0**64
"""Sums of squares between 1 / WINDOW and WINDOW lost nothing to under- or overflow."""


def rowwise(f: Callable[..., PyTree]) -> Callable[[int], Callable[..., PyTree]]:
    """``f(lead, tree)``, for trees of ``lead`` leading axes, as what ``vmap`` maps.

    ``rowwise(f)(0)`` is a function of ``tree``; its map over rows is ``f(1, tree)``.
    """

    @cache
    def at(lead: int) -> Callable[[PyTree], PyTree]:
        mapped = custom_vmap(lambda tree: f(lead, tree))

        @mapped.def_vmap
        def _(size: int, batched: list, tree: PyTree) -> tuple[PyTree, PyTree]:
            every = lambda one, u: u if one else jnp.broadcast_to(u, (size, *u.shape))
            made = at(lead + 1)(jax.tree.map(every, batched[0], tree))
            return made, jax.tree.map(lambda _: True, made)

        return mapped

    return at


def squares(lead: int, tree: PyTree) -> jax.Array:
    """The sum of squares over all axes but the first ``lead``, float32 at least."""
    dtype = real_dtype(tree)
    sums = [
        jnp.sum(jnp.square(u.astype(dtype)), tuple(range(lead, u.ndim)))
        for u in jax.tree.leaves(tree)
    ]
    return reduce(jnp.add, sums) if sums else jnp.zeros((), dtype)


def within(*sums: jax.Array) -> jax.Array:
    """Whether all of these sums of squares are in the window."""
    fine = [jnp.all((s > 1 / WINDOW) & (s < WINDOW)) for s in sums]
    return reduce(jnp.logical_and, fine)


def careful(lead: int, tree: PyTree) -> jax.Array:
    """The norm over all axes but the first ``lead``, whatever the magnitude."""
    dtype = real_dtype(tree)
    most = jnp.zeros((), dtype)
    for u in jax.tree.leaves(tree):
        over = tuple(range(lead, u.ndim))
        most = jnp.maximum(most, jnp.max(jnp.abs(u).astype(dtype), over, initial=0))
    # Of a number that is not finite there is no exponent, and no need for one.
    fine = (most > 0) & (most < jnp.inf)
    exponent = jnp.frexp(jnp.where(fine, most, 1))[1] - 1
    by = jnp.ldexp(jnp.ones((), dtype), exponent)

    def small(u: jax.Array) -> jax.Array:
        over = tuple(range(lead, u.ndim))
        return u.astype(dtype) / jnp.expand_dims(by, over)

    return by * jnp.sqrt(squares(lead, jax.tree.map(small, tree)))


def plain(tree: PyTree) -> jax.Array:
    """The norm where the squares are known to be representable."""
    return root(squares(0, tree))


def root(x: jax.Array) -> jax.Array:
    """√, with derivative 0 at 0 instead of infinity."""
    zero = x == 0  # not `> 0`, which would hide a nan
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def _norm(lead: int, tree: PyTree) -> jax.Array:
    square = squares(lead, tree)
    fast, slow = (lambda: jnp.sqrt(square)), (lambda: careful(lead, tree))
    return lax.cond(within(square), fast, slow)


_rows = rowwise(_norm)


@jax.custom_jvp
def norm(tree: PyTree) -> jax.Array:
    """The norm of all numbers of ``tree``, which is real, in float32 at least.

    Its derivative is 0 where it is 0. All AD modes, any order.
    """
    return _rows(0)(tree)


@norm.defjvp
def _norm_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (tree,), (moved,) = primals, tangents
    value = norm(tree)
    return value, value * log_slope(tree, moved, value)


def log_slope(tree: PyTree, moved: PyTree, value: jax.Array) -> jax.Array:
    """D log‖tree‖ along ``moved``, given the norm; 0 where the norm is 0."""
    by = jnp.where(value == 0, 1, value)
    leaf = lambda x, dx: jnp.sum((x.astype(by.dtype) / by) * (dx.astype(by.dtype) / by))
    parts = map(leaf, jax.tree.leaves(tree), jax.tree.leaves(moved))
    return reduce(jnp.add, parts, jnp.zeros_like(by))
