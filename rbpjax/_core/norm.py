"""Euclidean norms of pytrees of any magnitude, at the price of a sum of squares.

The squares of 1e-20 vanish in float32, those of 1e20 overflow. Dividing by the largest
entry first would take a second pass over the data, and a slow one. Here the sum of
squares is looked at: only where it is out of its depth is that second pass taken. The
divisor is a power of two, so that both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from rbpjax._core.tree import real_dtype
from rbpjax.types import PyTree

WINDOW = 2.0**64
"""Sums of squares between 1 / WINDOW and WINDOW lost nothing to under- or overflow."""


@custom_vmap
def agreed(holds: jax.Array) -> jax.Array:
    """A condition; under ``vmap`` it holds where it holds for all rows.

    Of a condition with a value for each row ``vmap`` makes a selection between two
    results, both of them computed. This one has one value for all.
    """
    return holds


@agreed.def_vmap
def _agreed_by_all(
    size: int, batched: list, holds: jax.Array
) -> tuple[jax.Array, bool]:
    return agreed(jnp.all(holds, 0)), False


def within(*sums: jax.Array) -> jax.Array:
    """Whether all of these sums of squares are in the window."""
    fine = [jnp.all((s > 1 / WINDOW) & (s < WINDOW)) for s in sums]
    return reduce(jnp.logical_and, fine)


def squares(tree: PyTree) -> jax.Array:
    """The sum of squares, in float32 at least."""
    dtype = real_dtype(tree)
    sums = [jnp.sum(jnp.square(u.astype(dtype))) for u in jax.tree.leaves(tree)]
    return reduce(jnp.add, sums) if sums else jnp.zeros((), dtype)


def careful(tree: PyTree) -> jax.Array:
    """The norm, whatever the magnitude."""
    dtype = real_dtype(tree)
    most = jnp.zeros((), dtype)
    for u in jax.tree.leaves(tree):
        most = jnp.maximum(most, jnp.max(jnp.abs(u).astype(dtype), initial=0))
    # Of a number that is not finite there is no exponent, and no need for one.
    fine = (most > 0) & (most < jnp.inf)
    exponent = jnp.frexp(jnp.where(fine, most, 1))[1] - 1
    by = jnp.ldexp(jnp.ones((), dtype), exponent)
    return by * jnp.sqrt(squares(jax.tree.map(lambda u: u.astype(dtype) / by, tree)))


def plain(tree: PyTree) -> jax.Array:
    """The norm where the squares are known to be representable."""
    return root(squares(tree))


def root(x: jax.Array) -> jax.Array:
    """√, with derivative 0 at 0 instead of infinity."""
    zero = x == 0  # not `> 0`, which would hide a nan
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


@jax.custom_jvp
def norm(tree: PyTree) -> jax.Array:
    """The norm of all numbers of ``tree``, which is real, in float32 at least.

    Its derivative is 0 where it is 0. All AD modes, any order.
    """
    square = squares(tree)
    fast, slow = (lambda: jnp.sqrt(square)), (lambda: careful(tree))
    return lax.cond(agreed(within(square)), fast, slow)


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


def norms(row: Callable[[jax.Array], PyTree], count: int) -> jax.Array:
    """The norms of ``row(0)`` to ``row(count - 1)``, made one after another.

    Memory one row. In the first pass rows are summed up while they are made: what looks
    at a sum before the next row is made has to store the row, and costs a third more.
    So all sums are looked at together; where one is out of its depth, rows are made
    anew. A row whose square vanishes beside that of another one counts as zero.
    """
    each = jnp.arange(count)
    sums = lax.map(lambda i: squares(row(i)), each)
    seen = lax.stop_gradient(sums)
    fine = within(jnp.where(seen == 0, 1, seen)) & jnp.any(seen > 0)
    slow = lambda: lax.map(lambda i: norm(row(i)), each)
    return lax.cond(agreed(fine), lambda: root(sums), slow)
