"""The rank-one trick: a sum of outer products as one random outer product."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rbpjax.types import PyTree

EPSILON = 1e-7
"""Added to both norms of a scale, so that zero vectors need no branch."""


class RankOne(NamedTuple):
    """The matrix v wᵀ.

    Attributes:
      v: same pytree as the floating-point leaves of the state.
      w: same pytree as the floating-point leaves of the parameters.
    """

    v: PyTree
    w: PyTree


def axpy(a: ArrayLike, x: PyTree, y: PyTree) -> PyTree:
    """A·x + y for a scalar ``a``, in the dtypes of ``y``."""
    return jax.tree.map(lambda u, v: (a * u).astype(v.dtype) + v, x, y)


def balance(v_norm: jax.Array, w_norm: jax.Array) -> jax.Array:
    """The scale ρ = √(‖w‖/‖v‖), after which ρv and w/ρ have equal norms.

    With ``EPSILON`` on both sides the scale is 1 where both vanish, and stays finite
    where one does. Any positive scale leaves the estimate unbiased.
    """
    return jnp.sqrt((w_norm + EPSILON) / (v_norm + EPSILON))


def rank_one_scales(vs: jax.Array, ws: jax.Array) -> jax.Array:
    """Computes the scales of minimum variance for ``rank_one``.

    By Cauchy–Schwarz, the only part of the variance that depends on ρ is least where
    ρᵢ² ∝ ‖wᵢ‖/‖vᵢ‖.

    Args:
      vs: ``[K, n]``, the left factors, none of them zero.
      ws: ``[K, P]``, the right factors, none of them zero.

    Returns:
      ρ: ``[K]``.

    Example:
      >>> rank_one_scales(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 20.0]]))
      Array([2.], dtype=float64)

    References:
      Ollivier, Tallec, Charpiat, "Training recurrent networks online without
      backtracking", https://arxiv.org/abs/1507.07680.
    """
    return jnp.sqrt(jnp.linalg.norm(ws, axis=1) / jnp.linalg.norm(vs, axis=1))


def rank_one(
    vs: jax.Array, ws: jax.Array, signs: jax.Array, scales: jax.Array
) -> RankOne:
    """Reduces Σᵢ vᵢ wᵢᵀ to one random outer product with the same mean.

    With independent signs εᵢ = ±1 and any scales ρᵢ > 0 that do not depend on them,

        (Σᵢ ρᵢ εᵢ vᵢ) (Σⱼ εⱼ wⱼ / ρⱼ)ᵀ

    has mean Σᵢ vᵢ wᵢᵀ, because E εᵢεⱼ is 1 for i = j and else 0.

    Unbiased. Cost: O(K (n + P)). All AD modes.

    Args:
      vs: ``[K, n]``, the left factors.
      ws: ``[K, P]``, the right factors.
      signs: ``[K]``, each +1 or -1.
      scales: ``[K]``, positive; ``rank_one_scales`` gives the best ones.

    Returns:
      The pair ``v [n], w [P]``.

    Example:
      >>> vs, ws = jnp.eye(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> signs = jnp.array([[1.0, 1.0], [1.0, -1.0]])  # the other two are mirrored
      >>> pairs = jax.vmap(rank_one, (None, None, 0, None))(vs, ws, signs, jnp.ones(2))
      >>> jnp.einsum("ki,kj->ij", pairs.v, pairs.w) / 2
      Array([[1., 2.],
             [3., 4.]], dtype=float64)

    References:
      Ollivier, Tallec, Charpiat, "Training recurrent networks online without
      backtracking", https://arxiv.org/abs/1507.07680.
    """
    return RankOne((signs * scales) @ vs, (signs / scales) @ ws)


def rank_one_variance(vs: jax.Array, ws: jax.Array, scales: jax.Array) -> jax.Array:
    """Computes the variance E‖v wᵀ - A‖² of ``rank_one``, A = Σᵢ vᵢ wᵢᵀ.

        (Σ ρᵢ²‖vᵢ‖²)(Σ ‖wⱼ‖²/ρⱼ²) - Σ ‖vᵢ‖²‖wᵢ‖² + Σ_{i≠j} (vᵢ·vⱼ)(wᵢ·wⱼ)

    Exact: the mean over all 2^K sign patterns, in closed form. Cost: O(K² (n + P)).

    Args:
      vs: ``[K, n]``, the left factors.
      ws: ``[K, P]``, the right factors.
      scales: ``[K]``, positive.

    Returns:
      The variance, summed over all entries of the matrix; a scalar.

    Example:
      >>> vs, ws = jnp.eye(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> rank_one_variance(vs, ws, jnp.ones(2))
      Array(30., dtype=float64)
      >>> rank_one_variance(vs, ws, rank_one_scales(vs, ws)).round(2)
      Array(22.36, dtype=float64)
    """
    v_gram, w_gram = vs @ vs.T, ws @ ws.T
    v_norms, w_norms = jnp.diagonal(v_gram), jnp.diagonal(w_gram)
    spread = jnp.sum(scales**2 * v_norms) * jnp.sum(w_norms / scales**2)
    return spread + jnp.sum(v_gram * w_gram) - 2 * jnp.sum(v_norms * w_norms)
