"""Plain iteration, damped or not: h ← f(h)."""

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
    error_tol,
    judged,
    meets,
    next_look,
    once,
    ratio,
    unknown_reach,
)
from rbpjax.fixed_point.search import AWAY, Search
from rbpjax.types import PyTree, Solution


@strategy
class FixedPointIteration:
    """Iterates h ← (1 - damping) f(h) + damping h until f(h) = h to a tolerance.

    Converges from a nearby start if and only if ρ((1 - damping) J + damping I) < 1, at
    that rate. Damping helps where J has large negative or complex eigenvalues.

    Converged means that the residual is small, and that its rate says the same of the
    distance to the fixed point. The residual reported is that of the very value
    returned: it takes ``num_steps`` steps to reach the value and one evaluation of f
    more to know its residual. The loop stops, too, where residuals explode or, for 40
    evaluations and as many as there were before, stay where they are; then the last
    iterate is returned, or the best if that is ten times better.

    Of a state with several leaves one may tend to zero, as a momentum does. It counts
    as at rest when it is below the tolerance beside what passes through f to it: one
    evaluation more, or a few.

    Cost: one evaluation of f a step; memory: three states. AD modes: none of its own
    (its loop is a ``while_loop``); ``rbp_solve`` gives its gradient.

    Attributes:
      tol: bound on the relative residual ‖f(h) - h‖ / max(‖h‖, ‖f(h)‖), in [0, 1).
        ``None`` asks for three quarters of the digits of the coarsest dtype in the
        state (6e-6 in float32, 2e-12 in float64).
      max_steps: budget of steps.
      steps: if given, take exactly this many steps and return the last iterate,
        whatever its residual, which is still reported (``converged`` compares it with
        the default tolerance); excludes ``tol``.
      damping: weight of the old iterate, in [0, 1).
      check_every: look at the residual after every so many steps, and use the budget in
        whole multiples. ``None``: rarely while it is far from the tolerance at the rate
        so far, about log(num_steps) times in all, and never later than after twice the
        steps. A look costs passes over the state and, where that is sharded, a
        collective.

    Raises:
      ValueError: if an option is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import FixedPointIteration
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> solution = FixedPointIteration()(lambda h: 0.5 * jnp.cos(h), jnp.ones(2))
      >>> print(solution.converged, solution.value)
      True [0.4502 0.4502]

    References:
      Banach's iteration; Kelley, "Iterative Methods for Linear and Nonlinear
      Equations", SIAM 1995, section 4.2.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=1000)
    steps: int | jax.Array | None = budget(default=None, minimum=0, excludes="tol")
    damping: float = real(default=0.0, below=1.0)
    check_every: int | None = count(default=None)

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.tol_for(h0, self.tol)
        if self.steps is not None:
            h = lax.fori_loop(0, self.steps, lambda _, h: self._mix(step(h), h), h0)
            return judged(step, h, self.steps, tol, self.damping)
        end = self.run(step, h0, tol)
        return end.kept().solution(end.k, tol, self.max_steps)

    def run(
        self,
        step: Callable[[PyTree], PyTree],
        h0: PyTree,
        tol: float | jax.Array,
        patience: int | None = None,
    ) -> Iterates:
        """The loop; with ``patience`` it ends where more steps than that are left."""

        def unfinished(now: Iterates) -> jax.Array:
            return now.search.unfinished(now.k, self.max_steps)

        def body(now: Iterates) -> Iterates:
            h = now.search.to_evaluate(self._mix(now.image, now.h), now.h)
            image, k = step(h), now.k + 1
            # One loop, not one inside another for the steps between two looks: the
            # compiler moves what f computes without h out of one, not out of two. And
            # a loop of one turn or none for the look, which copies nothing, in place
            # of a `cond`, which copies its operands.
            moved = now._replace(image=image, h=h, k=k)
            if now.search.leaves is None:
                return once(k >= now.due, look, moved)
            asks, answered = now.search.leaves.asks, now.answered
            rare = lambda moved: lax.cond(
                asks, lambda m: answered(m.image), look, moved
            )
            return once(k >= now.due, rare, moved)

        def look(now: Iterates) -> Iterates:
            k, before, found = now.k, now.search, Look.at(now.image, now.h)
            residual = before.residual_at(found, now.h)
            merit = found.merit(jnp.where(before.units == 0, found.size, before.units))
            rate = now.rate.measured(merit, k)
            reach = ratio(1 - self.damping, 1 - jnp.minimum(rate.slower, 1))
            reach = jnp.where(rate.slower < 1, reach, jnp.inf)
            # Negative before there are two residuals: only rounding passes then.
            reach = jnp.where(rate.slower < 0, unknown_reach(tol, now.h), reach)
            done = meets(residual, reach, tol)
            search = before.looked(found, now.h, now.num_steps, done, tol)
            goal = jnp.minimum(tol, ratio(error_tol(tol), reach))
            every = self.check_every
            span = k - now.looked
            after = next_look(every, k, span, residual, before.last, goal)
            if search.leaves is not None:
                after = jnp.where(search.leaves.asks, 1, after)
            if patience is not None:
                left = jnp.log(goal / residual) / jnp.log(rate.slower)
                left = jnp.where(rate.slower < 1, left, jnp.inf)
                lost = now.num_steps - search.num_steps
                good = ((k < EARLY) | (left <= patience)) & (lost < 3)
                search = search._replace(good=search.good & good)
            due = k + jnp.minimum(after, self.max_steps + 1 - k)
            rank = ratio(merit, search.merit)
            return now._replace(due=due, looked=k, rank=rank, rate=rate, search=search)

        zero = sharding.vary_like(jnp.int32(0), h0)
        search = Search.begin(h0)
        rate = Rate.begin(search.residual)
        due = zero + (self.check_every or 1)
        one = jnp.ones_like(search.residual)
        start = Iterates(h0, h0, zero, due, zero, one, rate, search)
        return lax.while_loop(unfinished, body, start)

    def _mix(self, image: PyTree, h: PyTree) -> PyTree:
        """The damped step; without damping, f's own output, bit for bit."""
        if self.damping == 0.0:
            return image
        return tree.axpy(self.damping, tree.sub(h, image), image)


EARLY = 25
"""Evaluations before which nothing is called slow: some maps are so at first only."""


class Rate(NamedTuple):
    """By what residuals fall in a step.

    Measured over the last eighth of the steps: where J has complex eigenvalues
    residuals oscillate as they fall, and from one step to the next they may grow.

    Attributes:
      rate: the last one measured, and
      slower: the larger of the last two; negative if not known yet.
      size: the size of the residual where the last measure ended.
      k: the evaluations of f then.
    """

    rate: jax.Array
    slower: jax.Array
    size: jax.Array
    k: jax.Array

    @classmethod
    def begin(cls, infinity: jax.Array) -> Rate:
        """Before the first look."""
        unknown = -jnp.ones_like(infinity)
        return cls(unknown, unknown, infinity, (infinity < 0).astype(jnp.int32))

    def measured(self, size: jax.Array, k: jax.Array) -> Rate:
        """After a residual of that size; not where it is rounding."""
        span = k - self.k
        rate = ratio(size, self.size) ** (1 / span.astype(size.dtype))
        eps = float(jnp.finfo(size.dtype).eps)
        known = jnp.isfinite(self.size) & (size > 8 * eps)
        rate = jnp.where(known, rate, self.rate)
        new = Rate(rate, jnp.maximum(rate, self.rate), size, k)
        return tree.where(span >= k // 8, new, self)


class Iterates(NamedTuple):
    """What the loop carries.

    Attributes:
      image: f(h).
      h: the iterate.
      k: evaluations so far.
      due: evaluations after which the next look is due.
      looked: evaluations at the last look.
      rank: the size of the last residual, relative to that of the best.
      rate: by which residuals fall in a step.
      search: what was found.
    """

    image: PyTree
    h: PyTree
    k: jax.Array
    due: jax.Array
    looked: jax.Array
    rank: jax.Array
    rate: Rate
    search: Search

    @property
    def num_steps(self) -> jax.Array:
        """Steps to the iterate."""
        leaves = self.search.leaves
        return self.k - 1 - (0 if leaves is None else leaves.asked)

    def answered(self, nudged: PyTree) -> Iterates:
        """With the image of a neighbour of ``h``."""
        search = self.search.answered(nudged, self.image, self.h)
        rate = self.rate._replace(size=jnp.full_like(self.rate.size, jnp.inf))
        k = self.k + 1
        return self._replace(k=k, due=k + 1, rate=rate, search=search)

    def kept(self) -> Search:
        """What the solver returns: the last iterate, unless the best is far better.

        An early iterate may be better by chance alone: who trains a network of thirty
        steps would be given one of three.
        """
        found = self.search
        last = found._replace(
            value=self.h, num_steps=self.num_steps, residual=found.last
        )
        return tree.where(self.rank <= AWAY, last, found)
