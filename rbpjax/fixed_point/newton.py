"""Newton's method: a forward solver whose linear systems are a backward rule's."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.forward.iteration import relative_change
from rbpjax.types import (
    BackwardRule,
    PyTree,
    Solution,
    check_count,
    check_real,
    strategy,
)

SHORTEST = 2.0**-10  # of a step; a direction that is no better so near is wrong


@strategy
class Newton:
    """Newton's method on h - f(h) = 0, for fixed points that iterations reach slowly.

    With J = ∂f/∂h at h and the residual r = f(h) - h, each step solves

        (I - J) d = r

    by ``rule``, which is handed v ↦ Jv in the place of v ↦ Jᵀv, and goes on from h + d,
    or from half as far while the residual is not smaller there. Converges from near
    h* wherever I - J is invertible there, ρ(J) > 1 included: by about the tolerance of
    the rule a step, and quadratically if that is as tight as the residual. An affine f
    takes one step with a tight rule. No guarantee from far away, where J may be much
    larger than at h*: ``warmup`` plain steps first bring a contraction into its
    neighbourhood cheaply. The value is the iterate with the smallest residual, which is
    reported, as in ``FixedPointIteration``.

    The default rule reduces each linear system's residual to a hundredth, whatever J.
    ``BiCGSTAB(tol=1e-2)`` and ``GMRES(tol=1e-2)`` compile to less;
    ``Direct()`` suits small states.

    Cost: one evaluation and linearization of f and one run of the rule a step; memory:
    three states, the linearization, and the rule's. ``num_steps`` counts steps, those
    of the warm-up too, not the rule's products.

    Attributes:
      rule: any ``BackwardRule``; its tolerance is relative to r.
      max_steps: budget of steps, those taken back included.
      tol: bound on the relative residual, as in ``FixedPointIteration``.
      warmup: number of plain steps h ← f(h) before the first of Newton's.

    Raises:
      ValueError: if a field is out of its range or not of its kind.

    Example:
      >>> import jax.numpy as jnp
      >>> solution = Newton()(lambda h: 3.0 * jnp.cos(h), jnp.ones(2))
      >>> bool(solution.converged)  # |∂f/∂h| = 2.8 there: the iteration diverges
      True

    References:
      Kelley, "Iterative Methods for Linear and Nonlinear Equations", SIAM 1995,
      chapters 6 (inexact steps) and 8 (line search; here by halving alone).
    """

    rule: BackwardRule = Adaptive(tol=1e-2)
    max_steps: int = 100
    tol: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        """Validates the fields."""
        if not callable(self.rule):
            raise ValueError(
                "Newton: `rule` must be a backward rule, called as rule(jvp, r) -> "
                f"Solution; got {self.rule!r}. Try Newton(Adaptive(tol=1e-2))."
            )
        check_count(self, "max_steps", self.max_steps, 1)
        check_count(self, "warmup", self.warmup, 0)
        if self.tol is not None:
            check_real(self, "tol", self.tol)

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.default_tol(h0) if self.tol is None else self.tol

        def unfinished(carry: tuple) -> jax.Array:
            *_, length, k, _, best = carry
            return (best > tol) & (k <= self.max_steps) & (length >= SHORTEST)

        def body(carry: tuple) -> tuple:
            h, h_best, direction, length, k, k_best, best = carry
            image, jvp = jax.linearize(step, h)
            residual = relative_change(image, h)
            better = residual < best  # False for NaN
            # Where it is not, and at the end, there is nothing to solve: of zero, the
            # rules make zero at once.
            wanted = better & (residual > tol)
            r = tree.sub(image, h)
            solved = self.rule(jvp, tree.where(wanted, r, tree.scale(0.0, r))).value
            direction = tree.where(better, solved, direction)
            length = jnp.where(better, 1.0, length / 2)
            h_best = tree.where(better, h, h_best)
            return (
                tree.axpy(length, direction, h_best),
                h_best,
                direction,
                length,
                k + 1,
                jnp.where(better, k, k_best),
                jnp.where(better, residual, best),
            )

        if self.warmup:
            h0 = lax.fori_loop(0, self.warmup, lambda _, h: step(h), h0)
        k = sharding.vary_like(jnp.int32(0), h0)
        dtype = tree.real_dtype(h0)
        infinity, one = (
            sharding.vary_like(jnp.array(x, dtype), h0) for x in (jnp.inf, 1.0)
        )
        carry = (h0, h0, tree.scale(0.0, h0), one, k, k, infinity)
        carry = lax.while_loop(unfinished, body, carry)
        _, value, _, _, _, steps, residual = carry
        return Solution(value, steps + self.warmup, residual, residual <= tol)
