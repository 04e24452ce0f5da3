"""Plain iteration, damped or not: h ← f(h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax._core.strategy import count, real, strategy, tolerance
from rbpjax.fixed_point.iterate import Best, next_look, relative_change, repeat
from rbpjax.types import PyTree, Solution


@strategy
class FixedPointIteration:
    """Iterates h ← (1 - damping) f(h) + damping h until f(h) = h to a tolerance.

    Converges from a nearby start if and only if ρ((1 - damping) J + damping I) < 1, at
    that rate. Damping helps where J has large negative or complex eigenvalues.

    The value returned is the one with the smallest residual looked at, and the residual
    reported is that of this very value: it takes ``num_steps`` steps to reach the value
    and one evaluation of f more to know its residual. Divergence (a residual that is
    not finite, or 1/√ε times the best seen) stops the loop.

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

    tol: float | None = tolerance(default=None)
    max_steps: int = count(default=1000)
    steps: int | None = count(default=None, minimum=0, excludes="tol")
    damping: float = real(default=0.0, below=1.0)
    check_every: int | None = count(default=None)

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.default_tol(h0) if self.tol is None else self.tol
        if self.steps is not None:
            h = lax.fori_loop(0, self.steps, lambda _, h: self._mix(step(h), h), h0)
            residual = relative_change(step(h), h)
            steps = jnp.int32(self.steps)
            last = Best(h, steps, residual, residual)
            return last.solution(steps + 1, tol, exhausted=True)

        def unfinished(now: _State) -> jax.Array:
            return now.best.unfinished(now.k, tol, self.max_steps)

        def advance(pair: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            image, h = pair
            h = self._mix(image, h)
            return step(h), h

        def body(now: _State) -> _State:
            ahead = now.ahead if self.check_every is None else self.check_every
            image, h = repeat(advance, ahead, (now.image, now.h))
            k = now.k + ahead
            residual = relative_change(image, h)
            before = now.best.last
            after = next_look(self.check_every, k, ahead, residual, before, tol)
            best = now.best.updated(h, k - 1, residual)  # one evaluation looks at h
            return _State(image, h, k, jnp.minimum(after, self.max_steps + 1 - k), best)

        best = Best.none(h0)
        zero = best.num_steps
        start = _State(h0, h0, zero, zero + 1, best)
        end = lax.while_loop(unfinished, body, start)
        return end.best.solution(end.k, tol, exhausted=end.k > self.max_steps)

    def _mix(self, image: PyTree, h: PyTree) -> PyTree:
        """The damped step; without damping, f's own output, bit for bit."""
        if self.damping == 0.0:
            return image
        return tree.axpy(self.damping, tree.sub(h, image), image)


class _State(NamedTuple):
    """Of the loop: f(h), h, evaluations so far, steps to the next look, the best."""

    image: PyTree
    h: PyTree
    k: jax.Array
    ahead: jax.Array
    best: Best
