"""Reduced rank extrapolation: plain steps, and now and then a leap."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax._core.strategy import budget, count, real, strategy, tolerance
from rbpjax.fixed_point.forward.anderson import regularized_solve
from rbpjax.fixed_point.iterate import (
    Look,
    meets,
    reached,
    unknown_reach,
)
from rbpjax.fixed_point.search import Search
from rbpjax.types import PyTree, Solution


@strategy
class RRE:
    """Reduced rank extrapolation of h ← f(h), as forward solver or through RBP.

    A cycle is ``memory + 1`` plain steps, of which the residuals uᵢ = f(hᵢ) - hᵢ are
    kept; then the combination of the iterates with the least residual is taken, were f
    linear, and the next cycle starts from there:

        h ← h_{m+1} - Σᵢ γᵢ uᵢ₊₁,   γ = argmin ‖u_m - Σᵢ γᵢ (uᵢ₊₁ - uᵢ)‖² + ridge · …

    with the ridge of ``Anderson``, whose steps these are, taken once a cycle instead of
    in each: about as many evaluations of f, with less arithmetic beside them. On linear
    maps a cycle is ``memory + 1`` steps of
    GMRES; ``RBP(RRE())`` is its restarted form for the adjoint. Converges also for
    ρ(J) > 1 if few eigenvalues are that large. No guarantee: the best iterate is
    returned, and divergence stops the loop, as in ``FixedPointIteration``.

    Cost: one evaluation of f a step, and (memory + 1) · n multiplications on average,
    where ``Anderson`` makes 4 · memory · n; memory: 2 · memory + 6 states. The
    coefficients are common to the whole state; under ``jax.vmap`` each example has its
    own. AD modes: none of its own; ``rbp_solve`` gives its gradient.

    Attributes:
      tol: bound on the relative residual, as in ``FixedPointIteration``.
      max_steps: budget of steps.
      memory: number of differences combined, one less than the steps of a cycle.
      ridge: as in ``Anderson``. ``None``: ten times the machine epsilon.

    Raises:
      ValueError: if an option is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import RRE
      >>> solution = RRE()(lambda h: -1.5 * jnp.sin(h) + 1, jnp.ones(2))
      >>> bool(solution.converged)  # the plain iteration diverges
      True

    References:
      Smith, Ford and Sidi, "Extrapolation Methods for Vector Sequences", SIAM Review
      29, 1987, section 3 (RRE, in cycles); Walker and Ni 2011 for the form of γ.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=1000)
    memory: int = count(default=5)
    ridge: float | None = real(default=None)

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.tol_for(h0, self.tol)
        eps = float(jnp.finfo(tree.real_dtype(h0)).eps)
        ridge = 10 * eps if self.ridge is None else self.ridge
        m = self.memory

        def unfinished(now: _State) -> jax.Array:
            return now.search.unfinished(now.k, self.max_steps)

        def advance(cycle: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
            """One plain step, its residual put into row j."""
            now = cycle[1]
            image = step(now.search.to_evaluate(now.h, now.h))
            if now.search.leaves is None:
                return looked(image, cycle)
            asks = now.search.leaves.asks
            return lax.cond(asks, answered, looked, image, cycle)

        def answered(
            nudged: PyTree, cycle: tuple[jax.Array, _State]
        ) -> tuple[jax.Array, _State]:
            """With the image of a neighbour; row j has the residual of the state."""
            j, now = cycle
            image = tree.add(now.h, tree.take(now.rows, j))
            search = now.search.answered(nudged, image, now.h)
            return j, now._replace(k=now.k + 1, search=search)

        def looked(
            image: PyTree, cycle: tuple[jax.Array, _State]
        ) -> tuple[jax.Array, _State]:
            """With the image of the state; it stays where the search asks for more."""
            j, now = cycle
            rows = tree.put(now.rows, j, tree.sub(image, now.h))
            look = Look.at(image, now.h)
            # The distance per residual: by the rate of plain steps, or the last leap.
            rate, measured = now.search.rate(look)
            steps = jnp.where(rate < 1, 1 / (1 - rate), jnp.inf)
            plain = jnp.where((j > 0) & measured, steps, 0)
            residual = now.search.residual_at(look, now.h)
            reach = jnp.maximum(plain, now.reach)
            reach = jnp.where(now.k == 0, unknown_reach(tol, now.h), reach)
            done = meets(residual, reach, tol)
            search = now.search.looked(look, now.h, now.k, done, tol, 150)
            now = now._replace(rows=rows, k=now.k + 1, search=search)
            moved = j + 1, now._replace(h=image)
            if search.leaves is None:
                return moved
            return tree.where(search.leaves.asks, (j, now), moved)

        def cycle(now: _State) -> _State:
            more = lambda cycle: (cycle[0] <= m) & unfinished(cycle[1])
            _, now = lax.while_loop(more, advance, (zero, now))
            # Where that ended early the whole loop ends, and nobody reads the leap.
            changes = jax.tree.map(lambda u: u[1:] - u[:-1], now.rows)
            gram = lax.map(lambda change: tree.products(changes, change), changes)
            target = tree.products(changes, tree.take(now.rows, m))
            gamma = regularized_solve(gram, target, ridge)
            h = now.h
            for i in range(m):
                h = tree.axpy(-gamma[i], tree.take(now.rows, i + 1), h)
            last = Look.at(tree.add(now.h, tree.take(now.rows, m)), now.h)
            reach = reached(h, now.h, last, now.reach)
            return now._replace(h=h, reach=reach)

        search = Search.begin(h0)
        zero = jnp.zeros_like(search.num_steps)
        near = jnp.zeros_like(search.residual)
        start = _State(h0, tree.empty_rows(m + 1, h0), zero, near, search)
        end = lax.while_loop(unfinished, cycle, start)
        return end.search.solution(end.k, tol, self.max_steps)


class _State(NamedTuple):
    """What both loops carry.

    The iterate, the residuals of the present cycle, the evaluations so far, how far
    leaps went per residual, and what was found.
    """

    h: PyTree
    rows: PyTree
    k: jax.Array
    reach: jax.Array
    search: Search
