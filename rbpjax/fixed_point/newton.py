"""Newton's method: a forward solver whose linear systems are a backward rule's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax._core.step import has_products
from rbpjax._core.strategy import budget, count, function, strategy, tolerance
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.backward.rule import apply_rule
from rbpjax.fixed_point.iterate import Look, meets, reached, unknown_reach
from rbpjax.fixed_point.search import Search
from rbpjax.types import BackwardRule, PyTree, Solution

SHORTEST = 2.0**-10  # of a step; a direction that is no better so near is wrong


@strategy
class Newton:
    """Newton's method on h - f(h) = 0, for fixed points that iterations reach slowly.

    With J = ∂f/∂h at h and the residual r = f(h) - h, each step solves

        (I - J) d = r

    by ``backward``, which is handed v ↦ Jv in the place of v ↦ Jᵀv, and goes on from
    h + d, or from half as far while the residual is not smaller there. Converges from
    near h* wherever I - J is invertible there, ρ(J) > 1 included: by about the
    tolerance of the rule a step, and quadratically if that is as tight as the residual.
    An affine f takes one step with a tight rule. No guarantee from far away, where J
    may be much larger than at h*: ``warmup`` plain steps first bring a contraction into
    its neighbourhood cheaply. The value is the iterate with the smallest residual,
    which is reported, as in ``FixedPointIteration``.

    The default rule reduces each linear system's residual to a hundredth, whatever J.
    ``BiCGSTAB(tol=1e-2)`` and ``GMRES(tol=1e-2)`` compile to less;
    ``Direct()`` suits small states.

    Cost: one evaluation and linearization of f and one run of the rule a step; memory:
    three states, the linearization, and the rule's. ``num_steps`` counts steps, those
    of the warm-up too; ``num_products`` the evaluations of f and the rule's
    products. AD modes: none of its own; ``rbp_solve`` gives its gradient.

    Attributes:
      backward: any ``BackwardRule``; its tolerance is relative to r.
      tol: bound on the relative residual, as in ``FixedPointIteration``.
      max_steps: budget of steps, those taken back included.
      warmup: number of plain steps h ← f(h) before the first of Newton's.

    Raises:
      ValueError: if an option is out of its range or not of its kind.
      TypeError: by a call, if f holds a function without products with J.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import Newton
      >>> solution = Newton()(lambda h: 3.0 * jnp.cos(h), jnp.ones(2))
      >>> bool(solution.converged)  # |∂f/∂h| = 2.8 there: the iteration diverges
      True

    References:
      Kelley, "Iterative Methods for Linear and Nonlinear Equations", SIAM 1995,
      chapters 6 (inexact steps) and 8 (line search; here by halving alone).
    """

    backward: BackwardRule = function(
        default=Adaptive(tol=1e-2),
        meaning="a backward rule, such as Adaptive(tol=1e-2)",
        call="backward(jvp, r) -> Solution",
        kw_only=False,
    )
    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=100)
    warmup: int = count(default=0, minimum=0)

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        if not has_products(step, h0):
            raise TypeError(
                f"{self!r} needs products with J, and f has a function without, which "
                "has a backward pass of its own (custom_vjp, as rbp_solve has). Take a "
                "solver that only evaluates f, such as Anderson()."
            )
        tol = tree.tol_for(h0, self.tol)

        def unfinished(now: _State) -> jax.Array:
            more = ~now.search.done & (now.k <= self.max_steps)
            return more & (now.length >= SHORTEST)

        def body(now: _State) -> _State:
            image, jvp = jax.linearize(step, now.h)
            look, old = Look.at(image, now.h), now.search
            if old.leaves is not None:
                nudged = tree.add(image, jvp(tree.last_places(now.h)))
                old = old.answered(nudged, image, now.h)
            units = jnp.where(old.units == 0, look.size, old.units)
            better = look.merit(units) < old.merit  # False for NaN
            done = meets(old.residual_at(look, now.h), now.reach, tol)
            search = old.looked(look, now.h, now.k, done, tol)
            # Where it is not, and at the end, there is nothing to solve: of zero, the
            # rules make zero at once.
            wanted = better & ~search.done
            r = tree.sub(image, now.h)
            r = tree.where(wanted, r, tree.scale(0.0, r))
            solved = apply_rule(self.backward, jvp, r)
            direction = tree.where(better, solved.value, now.direction)
            base = tree.where(better, now.h, now.base)
            length = jnp.where(better, 1.0, now.length / 2).astype(now.length.dtype)
            h = tree.axpy(length, direction, base)
            known = jnp.where(now.k == 0, 0, now.reach)
            reach = reached(tree.add(now.h, direction), now.h, look, known)
            reach = jnp.where(better, reach, now.reach)
            products = now.num_products + 1 + solved.num_products
            return _State(
                h, base, direction, length, now.k + 1, products, reach, search
            )

        if self.warmup:
            h0 = lax.fori_loop(0, self.warmup, lambda _, h: step(h), h0)
        search = Search.begin(h0)
        zero = jnp.zeros_like(search.num_steps)
        one = jnp.ones_like(search.residual)
        nowhere = tree.scale(0.0, h0)
        unknown = one * unknown_reach(tol, h0)
        start = _State(h0, h0, nowhere, one, zero, zero + self.warmup, unknown, search)
        end = lax.while_loop(unfinished, body, start)
        found = end.search.solution(end.k, tol, self.max_steps)
        return found._replace(
            num_steps=found.num_steps + self.warmup, num_products=end.num_products
        )


class _State(NamedTuple):
    """What the loop carries.

    The iterate, where the step to it began, in which direction and how far along it;
    the evaluations so far, those and the products with J; how far steps go per
    residual, and what was found.
    """

    h: PyTree
    base: PyTree
    direction: PyTree
    length: jax.Array
    k: jax.Array
    num_products: jax.Array
    reach: jax.Array
    search: Search
