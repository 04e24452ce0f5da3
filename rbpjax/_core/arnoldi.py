"""Arnoldi's process: an orthonormal basis in which a linear map is a small matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax.types import LinearMap, PyTree


class Krylov(NamedTuple):
    """What Arnoldi's process knows of a linear map A after some steps from v.

    With V the first ``dim`` rows of the basis and V₊ one row more, A V = V₊ H.

    Attributes:
      basis: rows that are orthonormal, the first of them v; unused ones are zero.
      hessenberg: H, with columns of zeros for what was not reached.
      null: a vector with Hᵀ null = 0, from which GMRES has its residual: 1 / ‖null‖
        of the right-hand side v.
      dim: number of steps, products with A.
    """

    basis: PyTree
    hessenberg: jax.Array
    null: jax.Array
    dim: jax.Array

    @property
    def left(self) -> jax.Array:
        """What the least residual ‖v - A x‖ over the basis is."""
        return 1 / jnp.linalg.norm(self.null)

    def combine(self, y: jax.Array) -> PyTree:
        """Σ yᵢ vᵢ."""
        return combine(self.basis, y)


def arnoldi(product: LinearMap, v: PyTree, size: int, enough: jax.Array) -> Krylov:
    """Up to ``size`` steps of Arnoldi's process from the unit vector v.

    Ends where GMRES would: when what is left of v is ``enough``, or the space is whole.
    A product that is not finite ends it too, and is left out.

    Memory: size + 1 states. Cost: one product and two passes of Gram-Schmidt a step.
    """
    zeros = lambda *shape: sharding.vary_like(jnp.zeros(shape, tree.real_dtype(v)), v)
    basis = tree.put(tree.empty_rows(size + 1, v), 0, v)
    first = Krylov(basis, zeros(size + 1, size), zeros(size + 1).at[0].set(1), zeros())
    first = first._replace(dim=first.dim.astype(jnp.int32))

    def unfinished(now: Krylov) -> jax.Array:
        return (now.dim < size) & (now.left > enough)

    rows = jnp.arange(size + 1, dtype=jnp.int32)

    def body(now: Krylov) -> Krylov:
        j = now.dim
        w = product(tree.take(now.basis, j))
        column, w = orthogonalize(now.basis, w)
        again, w = orthogonalize(now.basis, w)
        w, length = tree.to_unit(w)
        finite = jnp.isfinite(length)
        column = jnp.where(rows == j + 1, length, column + again)
        column = jnp.where(finite, column, 0)
        # No length: the space is whole, and nothing is left.
        left = -jnp.dot(now.null, column) / jnp.where(finite, length, 0)
        left = jnp.where(length > 0, left, jnp.inf)
        here = rows[None, :size] == j
        return Krylov(
            tree.put(now.basis, j + 1, tree.where(finite, w, tree.take(now.basis, 0))),
            jnp.where(here, column[:, None], now.hessenberg),
            jnp.where(rows == j + 1, left, now.null),
            j + finite.astype(j.dtype),
        )

    return lax.while_loop(unfinished, body, first)


def orthogonalize(basis: PyTree, w: PyTree) -> tuple[jax.Array, PyTree]:
    """``(Vᵀw, w - VVᵀw)`` for the rows V of the basis; unused rows are zero."""
    coefficients = tree.products(basis, w)
    return coefficients, tree.sub(w, combine(basis, coefficients))


def combine(basis: PyTree, coefficients: jax.Array) -> PyTree:
    """Σ cᵢ vᵢ over as many rows as there are coefficients."""

    def leaf(b: jax.Array) -> jax.Array:
        c = coefficients.astype(b.dtype)
        return jnp.tensordot(c, b[: len(c)], 1, precision=lax.Precision.HIGHEST)

    return jax.tree.map(leaf, basis)
