"""Anderson acceleration: extrapolates a fixed point from the last few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.strategy import budget, count, real, strategy, tolerance
from rbpjax.fixed_point.iterate import (
    Look,
    meets,
    reached,
    unknown_reach,
)
from rbpjax.fixed_point.search import Search
from rbpjax.types import PyTree, Solution


@strategy
class Anderson:
    """Anderson acceleration (type II) of h ← f(h), as forward solver or through RBP.

    Of the last ``memory`` differences of iterates ΔH and of residuals ΔR it takes the
    combination γ that explains the present residual r = f(h) - h best, and steps to

        h + βr - (ΔH + βΔR)γ,   γ = argmin ‖r - ΔRγ‖² + ridge · Σ ‖Δrᵢ‖² γᵢ²,

    with β = 1 - damping. On linear maps it is GMRES in other clothes; it often
    converges where plain iteration does not. No guarantee: the best iterate is
    returned, and divergence stops the loop, as in ``FixedPointIteration``.

    The small system is solved for columns brought to unit length, with the ridge on its
    diagonal: it is never singular, whether differences vanish or are parallel (the
    crash most often reported of other implementations).

    Cost: one evaluation of f a step and 4 · memory · n multiplications; one row of the
    Gram matrix is new in a step. Memory: 2 · memory + 8 states. The coefficients are
    common to the whole state; under ``jax.vmap`` each example has its own. AD modes:
    none of its own; ``rbp_solve`` gives its gradient.

    Attributes:
      tol: bound on the relative residual, as in ``FixedPointIteration``.
      max_steps: budget of steps.
      memory: number of differences kept.
      damping: 1 - β, in [0, 1).
      ridge: relative to the diagonal of the unit-length Gram matrix. ``None``: ten
        times the machine epsilon of the computation.

    Raises:
      ValueError: if an option is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import Anderson
      >>> solution = Anderson()(lambda h: -1.5 * jnp.sin(h) + 1, jnp.ones(2))
      >>> bool(solution.converged)  # the plain iteration diverges
      True

    References:
      Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations", SIAM Journal
      on Numerical Analysis 49, 2011, equation 2.2 (unconstrained form).
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=500)
    memory: int = count(default=5)
    damping: float = real(default=0.0, below=1.0)
    ridge: float | None = real(default=None)

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.tol_for(h0, self.tol)
        search = Search.begin(h0)
        search, k = self.run(step, search, jnp.zeros_like(search.num_steps), tol)
        return search.solution(k, tol, self.max_steps)

    def run(
        self,
        step: Callable[[PyTree], PyTree],
        search: Search,
        k: jax.Array,
        tol: float | jax.Array,
    ) -> tuple[Search, jax.Array]:
        """The loop from the best point of a search that took ``k`` evaluations."""
        h0 = search.value
        dtype = tree.real_dtype(h0)
        eps = float(jnp.finfo(dtype).eps)
        ridge = 10 * eps if self.ridge is None else self.ridge
        beta, m = 1.0 - self.damping, self.memory

        def unfinished(now: _State) -> jax.Array:
            return now.search.unfinished(now.k, self.max_steps)

        def body(now: _State) -> _State:
            image = step(now.search.to_evaluate(now.h, now.h))
            if now.search.leaves is None:
                return looked(now, image)
            return lax.cond(now.search.leaves.asks, answered, looked, now, image)

        def answered(now: _State, nudged: PyTree) -> _State:
            image = tree.add(now.h, now.last.r)
            search = now.search.answered(nudged, image, now.h)
            return now._replace(k=now.k + 1, search=search)

        def looked(now: _State, image: PyTree) -> _State:
            look = Look.at(image, now.h)
            r = tree.sub(image, now.h)
            mixed = image if beta == 1.0 else tree.axpy(beta, r, now.h)
            # The newest differences replace the oldest; in the first step there is
            # none, and a row of zeros stands for it.
            first, at = now.k == k, now.k % m
            newest = _Pair(tree.sub(mixed, now.last.mixed), tree.sub(r, now.last.r))
            newest = tree.where(first, tree.scale(0.0, newest), newest)
            rows = tree.put(now.rows, at, newest)
            # Sums here: a product of matrix and vector makes XLA copy the rows.
            products = jax.vmap(lambda row: tree.vdot(row, newest.r))(rows.r)
            gram = now.gram.at[at].set(products).at[:, at].set(products)
            target = jax.vmap(lambda row: tree.vdot(row, r))(rows.r)
            gamma = regularized_solve(gram, target, ridge)
            h = mixed
            for i in range(m):  # one pass over the rows, where a product takes two
                h = tree.axpy(-gamma[i], tree.take(rows.mixed, i), h)
            done = meets(now.search.residual_at(look, now.h), now.reach, tol)
            search = now.search.looked(look, now.h, now.k, done, tol, STUCK)
            # How far it goes from here per residual, where it does not end.
            reach = reached(h, now.h, look, jnp.where(first, 0, now.reach))
            if search.leaves is not None:  # it stays for one more evaluation near it
                h = tree.where(search.leaves.asks, now.h, h)
            return _State(h, _Pair(mixed, r), rows, gram, now.k + 1, reach, search)

        history = tree.empty_rows(m, h0)
        gram = sharding.vary_like(jnp.zeros((m, m), dtype), h0)
        last, rows = _Pair(h0, tree.scale(0.0, h0)), _Pair(history, history)
        reach = jnp.full_like(search.residual, unknown_reach(tol, h0))
        reach = sharding.vary_like(reach, h0)
        start = _State(h0, last, rows, gram, k, reach, search)
        end = lax.while_loop(unfinished, body, start)
        return end.search, end.k


STUCK = 150
"""Evaluations without a better iterate: Anderson's residuals do not fall steadily."""


class _Pair(NamedTuple):
    """The damped step H + βR and the residual R of an iterate, or differences of both.

    Stacked along a first axis, they are the rows that are kept.
    """

    mixed: PyTree
    r: PyTree


class _State(NamedTuple):
    """What the loop carries.

    The iterate, what the last one led to, the differences kept, the Gram matrix of
    those of R, the evaluations so far, and the best iterate.
    """

    h: PyTree
    last: _Pair
    rows: _Pair
    gram: jax.Array
    k: jax.Array
    reach: jax.Array
    search: Search


def regularized_solve(gram: jax.Array, target: jax.Array, ridge: float) -> jax.Array:
    """γ of (G + ridge · diag G) γ = t, by elimination on the unit-diagonal matrix.

    Positive definite, so that no pivoting is needed; m is small and static, so that the
    loop unrolls into a few fused operations instead of a library call in each step.
    """
    diagonal = jnp.diag(gram)
    used = diagonal > 0
    inverse_length = jnp.where(used, jnp.where(used, diagonal, 1) ** -0.5, 0)
    matrix = gram * inverse_length[:, None] * inverse_length[None, :]
    matrix = jnp.where(jnp.eye(len(gram), dtype=bool), 1 + ridge, matrix)
    system = jnp.concatenate([matrix, (target * inverse_length)[:, None]], axis=1)
    for i in range(len(gram)):
        row = system[i] / system[i, i]
        system = (system - system[:, i, None] * row[None, :]).at[i].set(row)
    return system[:, -1] * inverse_length
