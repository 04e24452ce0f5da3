"""Broyden's method with limited memory; its inverse may serve the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.low_rank import LowRank
from rbpjax._core.strategy import budget, count, strategy, switch, tolerance
from rbpjax.fixed_point.iterate import Look, meets, reached, unknown_reach
from rbpjax.fixed_point.search import Search
from rbpjax.types import PyTree, Solution


@strategy
class Broyden:
    """Broyden's good method on h - f(h) = 0, as forward solver or through RBP.

    With the residual r = f(h) - h and an estimate H of (I - J)⁻¹, at first the
    identity, each step is

        h ← h + d,   d = Hr,   H ← H + (d - Hy) dᵀH / (dᵀHy),

    where y is the change of h - f(h) in the step: the least change of the estimated
    Jacobian that explains it. On affine maps of n numbers it ends after about 2n
    steps, if the memory is as long; ρ(J) > 1 is no obstacle. H is kept as the identity
    and a term a step, and begins anew when ``memory`` terms are full. Where a
    denominator is small the update is shortened, so that H stays invertible (Powell).
    No guarantee: the best iterate is returned, and divergence stops the loop, as in
    ``FixedPointIteration``.

    With ``share`` the last H goes to the backward pass of ``rbp_solve``, whose rule
    starts from Hᵀg, an estimate of the adjoint without any product (SHINE): from its
    best multiple, found by one VJP, or from none if that is worse. It is meant for
    truncated rules: ``JFB()``, which adds one term, then is nearer to the adjoint. A
    rule with a tolerance, such as ``Adaptive()``, meets it as without, in about as many
    products. H is no more than what the steps to h* have seen of J: of few steps,
    little. A probe's own ``adjoint`` goes before it.

    Cost: one evaluation of f a step and about 6 · memory · n multiplications. Memory:
    2 · memory + 8 states, of which ``share`` keeps 2 · memory for the backward pass.
    The inner products are common to the whole state; under ``jax.vmap`` each example
    has its own. AD modes: none of its own; ``rbp_solve`` gives its gradient.

    Attributes:
      tol: bound on the relative residual, as in ``FixedPointIteration``.
      max_steps: budget of steps.
      memory: number of terms in H before it begins anew.
      share: whether the backward rule starts from Hᵀg. The rule must take a start.

    Raises:
      ValueError: if an option is out of its range or not of its kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import Broyden, rbp_solve
      >>> solve = rbp_solve(
      ...     lambda a, x, h: -a * jnp.sin(h) + x, forward=Broyden(share=True))
      >>> solution = solve(1.5, 1.0, jnp.ones(2))
      >>> bool(solution.converged)  # the plain iteration diverges
      True
      >>> grad = jax.grad(lambda a: jnp.sum(solve(a, 1.0, jnp.ones(2)).value))(1.5)
      >>> h = solution.value  # dh/da = -sin h / (1 + a cos h)
      >>> bool(jnp.allclose(grad, jnp.sum(-jnp.sin(h) / (1 + 1.5 * jnp.cos(h))), 1e-4))
      True

    References:
      Broyden, "A Class of Methods for Solving Nonlinear Simultaneous Equations",
      Mathematics of Computation 19, 1965; Powell 1970 for the shortened update. Ramzi
      et al., "SHINE: SHaring the INverse Estimate from the forward pass for bi-level
      optimization and implicit models", ICLR 2022, https://arxiv.org/abs/2106.00553.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=500)
    memory: int = count(default=10)
    share: bool = switch(default=False)

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.tol_for(h0, self.tol)

        def unfinished(now: _State) -> jax.Array:
            return now.search.unfinished(now.k, self.max_steps)

        def body(now: _State) -> _State:
            image = step(now.search.to_evaluate(now.h, now.h))
            if now.search.leaves is None:
                return looked(now, image)
            return lax.cond(now.search.leaves.asks, answered, looked, now, image)

        def answered(now: _State, nudged: PyTree) -> _State:
            image = tree.add(now.h, now.r)
            search = now.search.answered(nudged, image, now.h)
            return now._replace(k=now.k + 1, search=search)

        def looked(now: _State, image: PyTree) -> _State:
            look = Look.at(image, now.h)
            r = tree.sub(image, now.h)
            inverse, terms = self._updated(now, tree.sub(now.r, r))
            d = inverse.apply(r)
            h = tree.add(now.h, d)
            done = meets(now.search.residual_at(look, now.h), now.reach, tol)
            search = now.search.looked(look, now.h, now.k, done, tol, STUCK)
            reach = reached(h, now.h, look, jnp.where(now.k == 0, 0, now.reach))
            if search.leaves is not None:  # it stays for one more evaluation near it
                d = tree.where(search.leaves.asks, tree.scale(0.0, d), d)
                h = tree.where(search.leaves.asks, now.h, h)
            return _State(h, d, r, inverse, terms, now.k + 1, reach, search)

        search = Search.begin(h0)
        zero = jnp.zeros_like(search.num_steps)
        reach = jnp.full_like(search.residual, unknown_reach(tol, h0))
        reach = sharding.vary_like(reach, h0)
        inverse = LowRank.identity(self.memory, h0)
        nowhere = tree.scale(0.0, h0)
        start = _State(h0, nowhere, nowhere, inverse, zero, zero, reach, search)
        end = lax.while_loop(unfinished, body, start)
        found = end.search.solution(end.k, tol, self.max_steps)
        return found._replace(aux=end.inverse) if self.share else found

    def _updated(self, now: _State, y: PyTree) -> tuple[LowRank, jax.Array]:
        """The inverse after the step to ``now``, in which h - f(h) changed by ``y``."""
        # By the step's length, so that no magnitude matters.
        d, length = tree.to_unit(now.d)
        moved = (length > 0) & tree.all_finite(y)
        y = tree.divide(y, jnp.where(moved, length, 1))
        full = now.terms == self.memory
        old = tree.where(full, tree.scale(0.0, now.inverse), now.inverse)
        image = old.apply(y)
        seen = tree.vdot(d, image)
        side = jnp.where(seen < 0, -LEAST, LEAST)
        part = jnp.where(jnp.abs(seen) < LEAST, (1 - side) / (1 - seen), 1)
        u = tree.scale(part / (1 - part + part * seen), tree.sub(d, image))
        at = jnp.where(full, 0, now.terms)
        new = old.put(at, u, old.transposed(d))
        usable = moved & tree.all_finite(new)
        return tree.where(usable, new, now.inverse), jnp.where(
            usable, at + 1, now.terms
        )


LEAST = 0.1
"""Of the square of a step, the smallest denominator of an update."""
STUCK = 150
"""Evaluations without a better iterate: residuals do not fall steadily."""


class _State(NamedTuple):
    """What the loop carries.

    The iterate, the step to it, the residual where that began, the inverse and the
    number of its terms, the evaluations so far, how far steps go per residual, and what
    was found.
    """

    h: PyTree
    d: PyTree
    r: PyTree
    inverse: LowRank
    terms: jax.Array
    k: jax.Array
    reach: jax.Array
    search: Search
