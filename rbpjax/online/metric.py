"""The quasi-diagonal metric: natural gradients at the price of diagonal ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rbpjax.online.estimator import check_positive
from rbpjax.types import PyTree

Rows = Callable[[PyTree], PyTree]
"""Arranges a parameter tree as matrices ``[n, 1 + k]``, one row a unit, bias first.

It must be linear and use every number exactly once: a rearrangement.
"""


class QuasiDiagonal(NamedTuple):
    """What is kept of a unit's metric M: its diagonal, and its bias row.

    Attributes:
      bias: M₀₀, ``[n]``.
      cross: M₀ₖ, ``[n, k]``.
      weights: Mₖₖ, ``[n, k]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.online.metric import outer
      >>> metric = outer(jnp.array([[2.0, 3.0, 5.0]]))  # g gᵀ for one unit
      >>> [part.tolist() for part in metric]
      [[4.0], [[6.0, 10.0]], [[9.0, 25.0]]]
    """

    bias: jax.Array
    cross: jax.Array
    weights: jax.Array


def outer(rows: jax.Array) -> QuasiDiagonal:
    """The kept part of g gᵀ for each row g."""
    bias, weights = rows[:, 0], rows[:, 1:]
    return QuasiDiagonal(bias**2, bias[:, None] * weights, weights**2)


def solve(metric: QuasiDiagonal, rows: jax.Array, damping: float) -> jax.Array:
    """Solves (M + damping) d = g for each row g, as far as M is kept.

    Exact for a bias and one weight, M⁻¹g without a weight; else the Cholesky-like
    inverse of the kept part, which is positive definite, so that d is always a
    descent direction.
    """
    bias = metric.bias + damping
    ratio = metric.cross / bias[:, None]
    # The Schur complement is ≥ damping for any average of outer products; the
    # maximum only guards its rounding.
    schur = metric.weights + damping - ratio * metric.cross
    schur = jnp.maximum(schur, damping)
    weights = (rows[:, 1:] - ratio * rows[:, :1]) / schur
    first = rows[:, 0] / bias - jnp.sum(ratio * weights, axis=1)
    return jnp.concatenate([first[:, None], weights], axis=1)


def whiten(
    metric: QuasiDiagonal, damping: float
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A map of rows g to two parts, whose squares sum to gᵀd for the d of ``solve``."""
    bias = metric.bias + damping
    ratio = metric.cross / bias[:, None]
    schur = jnp.maximum(metric.weights + damping - ratio * metric.cross, damping)
    first, others = jax.lax.rsqrt(bias), jax.lax.rsqrt(schur)
    return lambda g: (g[:, 0] * first, (g[:, 1:] - ratio * g[:, :1]) * others)


class QuasiDiagonalState(NamedTuple):
    """State of ``scale_by_quasi_diagonal``.

    Attributes:
      count: updates seen, an int32 scalar.
      metric: a ``QuasiDiagonal`` for each matrix of ``rows``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> state = online.scale_by_quasi_diagonal(0.1).init(jnp.ones((2, 3)))
      >>> int(state.count), state.metric.bias.shape  # every number stands alone
      (0, (6,))
    """

    count: jax.Array
    metric: PyTree


def scale_by_quasi_diagonal(
    decay: float,
    rows: Rows | None = None,
    *,
    damping: float = 1e-4,
    include_current: bool = True,
    prior: float | None = None,
) -> optax.GradientTransformation:
    """Multiplies gradients by the inverse of a quasi-diagonal metric.

    The metric is a running average of outer products of gradients, of which each unit
    keeps the diagonal and the row of its bias,

        M ← (1 - γₜ) M + γₜ g gᵀ,    γₜ = max(γ, 1 / (t+1)).

    A gradient that is not finite, or whose square is not (in float32 from 1.8e19, in
    float16 from 256), is not learnt: one bad step does not spoil the next.

    Used as online natural gradient θ ← θ - γ M⁻¹ g, this is an extended Kalman filter
    for a constant parameter with forgetting γ, in which the step size *is* the decay
    of the metric; chain with a learning rate for that (see the example). A filter
    needs a prior: with one, M begins as ``prior`` times the identity with the weight
    of 1 / γ gradients, so that γₜ = γ, and the parameters have at first the variance
    γ / ``prior`` around where they start. Without one the first step of a filter is as
    large as 1 / |g|.

    Deterministic. Cost: O(P) time, 2 P memory. Works under ``jit``, ``vmap``, ``scan``
    and in all AD modes.

    Args:
      decay: γ in (0, 1], the share of the newest gradient.
      rows: arranges the parameters as matrices ``[n, 1 + k]`` (or a pytree of them),
        a row a unit, its bias first. Without it every number stands alone, and the
        metric is diagonal.
      damping: positive, added to the diagonal; in units of squared gradients.
      include_current: whether M contains the gradient it is applied to. With it, steps
        are bounded; without, the direction is M⁻¹ of the past times g, so that its
        conditional mean is M⁻¹ times the mean of g.
      prior: positive, in units of squared gradients: what M is before any gradient.
        For parameters that are right to within σ take γ / σ². None: M is the plain
        mean of the first gradients, which suits a step size of its own.

    Returns:
      An ``optax.GradientTransformation``; its state is a ``QuasiDiagonalState``.

    Raises:
      ValueError: ``decay``, ``damping`` or ``prior`` out of range; from ``init``, if
        ``rows`` does not use every number exactly once, as far as it can be run on
        numbers there.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rbpjax import online
      >>> params = {"W": jnp.ones((2, 3)), "b": jnp.ones(2)}
      >>> rows = lambda p: jnp.concatenate([p["b"][:, None], p["W"]], axis=1)
      >>> kalman = optax.chain(
      ...     online.scale_by_quasi_diagonal(0.01, rows, prior=1.0),
      ...     optax.scale_by_learning_rate(0.01),
      ... )
      >>> updates, _ = kalman.update(params, kalman.init(params))
      >>> updates["W"].shape
      (2, 3)

    References:
      Ollivier, "Online Natural Gradient as a Kalman Filter",
      https://arxiv.org/abs/1703.00209. The quasi-diagonal inverse as in the public
      code clementfarabet/lua---nnx, ``QDRiemaNNLinear.lua``.
    """
    check_filter(decay, damping, prior)

    def init(params: PyTree) -> QuasiDiagonalState:
        check_rows(rows, params)
        return empty(rows, params, prior)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, QuasiDiagonalState]:
        del params
        learnt = learn(decay, rows, state, updates, prior)
        used = learnt if include_current else state
        return apply_inverse(rows, used.metric, updates, damping), learnt

    return optax.GradientTransformation(init, update)


def check_filter(decay: object, damping: object, prior: object) -> None:
    """Raises ValueError unless they are Python numbers in their ranges."""
    check_positive("decay", decay, most=1)
    check_positive("damping", damping)
    if prior is not None:
        check_positive("prior", prior)


def empty(rows: Rows | None, params: PyTree, prior: float | None) -> QuasiDiagonalState:
    """A metric that has seen nothing: ``prior`` times the identity, or zero."""

    def start(matrix: jax.Array) -> QuasiDiagonal:
        squares = jnp.full_like(matrix, prior or 0.0)
        return QuasiDiagonal(
            squares[:, 0], jnp.zeros_like(matrix[:, 1:]), squares[:, 1:]
        )

    metric = jax.tree.map(start, arrange(rows, params))
    return QuasiDiagonalState(jnp.zeros((), jnp.int32), metric)


def newest_share(decay: float, count: jax.Array) -> jax.Array:
    """γₜ = max(γ, 1 / (t+1)): a plain mean at first, then forgetting."""
    return jnp.maximum(decay, 1 / (count.astype(float) + 1))


def learn(
    decay: float,
    rows: Rows | None,
    state: QuasiDiagonalState,
    tree: PyTree,
    prior: float | None,
) -> QuasiDiagonalState:
    """Mixes the outer products of the gradient ``tree`` into the metric."""
    # A prior stands for 1 / γ gradients: the share is γ from the beginning.
    known_before = prior is not None
    gamma = jnp.asarray(decay) if known_before else newest_share(decay, state.count)
    new = jax.tree.map(outer, arrange(rows, tree))
    known = all_finite(new)
    mix = lambda old, new: old + gamma.astype(old.dtype) * (new - old)
    metric = jax.tree.map(
        lambda old, new: jnp.where(known, mix(old, new), old), state.metric, new
    )
    return QuasiDiagonalState(state.count + known.astype(jnp.int32), metric)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether all numbers of ``tree`` are finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


def apply_inverse(
    rows: Rows | None, metric: PyTree, tree: PyTree, damping: float
) -> PyTree:
    """(M + damping)⁻¹ times ``tree``."""
    matrices, back = jax.vjp(lambda t: arrange(rows, t), tree)
    solved = jax.tree.map(lambda g, m: solve(m, g, damping), matrices, metric)
    # A rearrangement is orthogonal: its transpose is its inverse.
    (result,) = back(solved)
    return result


def whitening(
    rows: Rows | None, metric: PyTree, damping: float
) -> Callable[[PyTree], PyTree]:
    """Maps a tree to one whose norm is the tree's in the metric (M + damping)⁻¹."""
    is_metric = lambda node: isinstance(node, QuasiDiagonal)
    maps = [whiten(m, damping) for m in jax.tree.leaves(metric, is_leaf=is_metric)]

    def white(tree: PyTree) -> PyTree:
        matrices = jax.tree.leaves(arrange(rows, tree))
        return [one(g) for one, g in zip(maps, matrices, strict=True)]

    return white


def check_rows(rows: Rows | None, params: PyTree) -> None:
    """Raises ValueError unless ``rows`` uses every number exactly once.

    It arranges the numbers 0, 1, … in the place of the parameters, while tracing.
    """
    if rows is None:
        return
    leaves, structure = jax.tree.flatten(params)
    sizes = [np.size(leaf) for leaf in leaves]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    with jax.ensure_compile_time_eval():
        places = [
            jnp.arange(first, first + size).reshape(np.shape(leaf))
            for first, size, leaf in zip(starts, sizes, leaves, strict=False)
        ]
        matrices = jax.tree.leaves(arrange(rows, structure.unflatten(places)))
    if any(isinstance(m, jax.core.Tracer) for m in matrices):
        return  # it uses what is not known yet
    used = np.concatenate([np.ravel(m) for m in matrices]).astype(np.int64)
    times = np.bincount(used.clip(0, starts[-1]), minlength=starts[-1])
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
    for path, first, size in zip(paths, starts, sizes, strict=False):
        mine = times[first : first + size]
        if np.any(mine != 1):
            raise ValueError(
                "`rows(params)` must arrange every parameter exactly once; those at "
                f"params{path} are used {mine.min()} to {mine.max()} times. It is a "
                "rearrangement: concatenate, reshape and transpose, and leave none out."
            )


def arrange(rows: Rows | None, tree: PyTree) -> PyTree:
    """The matrices of ``rows``, checked; without it a matrix of one column a leaf."""
    if rows is None:
        return jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, 1)), tree)
    matrices = rows(tree)
    have, want = optax.tree.size(matrices), optax.tree.size(tree)
    ranks = {jnp.ndim(m) for m in jax.tree.leaves(matrices)}
    if have != want or ranks != {2}:
        raise ValueError(
            "`rows(params)` must arrange every parameter once, in matrices [n, 1 + k]; "
            f"got {have} numbers of {want}, in arrays of {sorted(ranks)} axes. Give "
            "parameters without a unit, such as a scalar, a row of their own."
        )
    return matrices
