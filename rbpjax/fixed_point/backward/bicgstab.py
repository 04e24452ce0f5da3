"""Stabilized biconjugate gradients: fast where they converge, as they mostly do."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.strategy import budget, count, strategy, tolerance
from rbpjax.fixed_point.backward.rule import Progress, System, ratio
from rbpjax.types import LinearMap, PyTree, Solution


@strategy
class BiCGSTAB:
    """Stabilized biconjugate gradients on (I - Jᵀ) z = g itself.

    Exact up to ``tol`` where it converges, which it usually does, and fast, also for
    ρ(J) > 1; there is no guarantee, and for eigenvalues of J all around 1 it fails.
    Unlike CG on the normal equations it does not square the condition number. It keeps
    its best iterate, restarts on the true residual, and reports when it got stuck.

    Cost: two VJPs a step, one more a restart; memory: eight states. AD
    modes: none of its own.

    Attributes:
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖, in [0, 1).
        ``None``: three quarters of the digits of the coarsest dtype in the state.
      max_steps: budget of steps over all restarts.
      patience: a pass ends after so many steps without a better iterate.

    Raises:
      ValueError: if an option is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import BiCGSTAB
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = BiCGSTAB()(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> print(z)
      [0.1429 0.4286]

    References:
      van der Vorst, "Bi-CGSTAB", SIAM J. Sci. Stat. Comput. 13, 1992. Departs from it
      in three points: (1) the best iterate is kept, as ‖r‖ is not monotone; (2) a pass
      ends after ``patience`` steps without a better one, and the next starts on the
      true residual, with that as shadow; (3) a coefficient whose denominator vanishes
      is 0, which ends the pass instead of making NaN.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=500)
    patience: int = count(default=30)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        system = System.of(vjp, cotangent, self.tol)
        end = self.advance(system, system.begin(start))
        return system.refined(end, self.max_steps)

    def advance(self, system: System, start: Progress) -> Progress:
        """Goes on from ``start`` until the tolerance is met or it gets stuck."""

        def one_pass(old: Progress) -> Progress:
            """One pass from z, whose residual is the shadow too."""
            shadow = old.r

            def unfinished(now: _State) -> jax.Array:
                patient = (now.k - now.k_best < self.patience) & jnp.isfinite(now.error)
                more = (now.best > system.tol / 2) & (now.k < self.max_steps)
                return more & patient

            def body(now: _State) -> _State:
                rho = tree.vdot(shadow, now.r)
                beta = ratio(rho, now.rho) * ratio(now.alpha, now.omega)
                p = tree.axpy(beta, tree.axpy(-now.omega, now.q, now.p), now.r)
                q = system.apply(p)
                alpha = ratio(rho, tree.vdot(shadow, q))
                s = tree.axpy(-alpha, q, now.r)
                t = system.apply(s)
                omega = ratio(tree.vdot(t, s), tree.vdot(t, t))
                z = tree.axpy(omega, s, tree.axpy(alpha, p, now.z))
                r = tree.axpy(-omega, t, s)
                error = tree.norm(r)
                better, k = error < now.best, now.k + 1
                return _State(
                    z,
                    r,
                    p,
                    q,
                    rho,
                    alpha,
                    omega,
                    error,
                    k,
                    z_best=tree.where(better, z, now.z_best),
                    best=jnp.where(better, error, now.best),
                    k_best=jnp.where(better, k, now.k_best),
                )

            zero, size = tree.scale(0.0, shadow), tree.norm(shadow)
            one = sharding.vary_like(jnp.ones_like(size), shadow)
            k, z = old.num_steps, old.z
            first = _State(z, shadow, zero, zero, one, one, one, size, k, z, size, k)
            end = lax.while_loop(unfinished, body, first)
            products = old.num_products + 2 * (end.k - k)
            return old._replace(
                z=end.z_best, num_steps=end.k, num_products=products, error=end.best
            )

        return system.restarted(one_pass, start, self.max_steps)


class _State(NamedTuple):
    """Of the loop, in van der Vorst's letters.

    Attributes:
      z: the iterate, x in the paper.
      r: its residual by the recurrence.
      p: the direction.
      q: (I - Jᵀ) p, v in the paper.
      rho: ⟨shadow, r⟩ of the step before.
      alpha: step along p.
      omega: step along s = r - αq.
      error: ‖r‖.
      k: steps so far.
      z_best: the iterate with the least ‖r‖.
      best: that norm.
      k_best: its number of steps.
    """

    z: PyTree
    r: PyTree
    p: PyTree
    q: PyTree
    rho: jax.Array
    alpha: jax.Array
    omega: jax.Array
    error: jax.Array
    k: jax.Array
    z_best: PyTree
    best: jax.Array
    k_best: jax.Array
