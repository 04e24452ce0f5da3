"""Conjugate gradients on the normal equations, which need only an invertible I - J."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax._core.strategy import budget, real, strategy, tolerance
from rbpjax.fixed_point.backward.rule import Progress, System
from rbpjax.types import LinearMap, PyTree, Solution


@strategy
class CGNormal:
    """Conjugate gradients on the normal equations (I - J)(I - Jᵀ) z = (I - J) g.

    Exact up to ``tol`` whenever I - J is invertible, ρ(J) > 1 included; the number of
    steps grows with the condition number κ(I - J), of which about κ log(2/tol)/2 are
    needed, fewer on clustered spectra. With ``ridge`` η > 0 the matrix is
    (I - J)(I - Jᵀ) + ηI: biased by η / (σ² + η) along each singular value σ of I - J.

    The recurrence is the least-squares form (CGLS), which keeps the residual of the
    adjoint equation itself rather than of its square; when it believes to be done the
    true residual is measured, and the iteration restarts on what is left, until the
    true residual meets ``tol``, the budget ends or a restart gains less than half.

    Cost: one VJP and one JVP a step (J from ``jax.linear_transpose``), one of each more
    a restart; memory: six states. AD modes: none of its own.

    Attributes:
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖; with ``ridge``,
        on that of the damped normal equations, while the report's ``residual`` stays
        the undamped one and so shows the bias. ``None``: three quarters of the digits
        of the coarsest dtype in the state.
      max_steps: budget of conjugate-gradient steps over all restarts.
      ridge: η. The paper's code has 1e-5; zero is unbiased.

    Raises:
      ValueError: if an option is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import CGNormal
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = CGNormal()(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> print(z)
      [0.1429 0.4286]

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      section 3.1; CGLS: Björck, "Numerical Methods for Least Squares Problems",
      algorithm 7.4.1. Departures from the paper's code: no ridge by default, a relative
      tolerance, J from automatic differentiation, and the last iterate is kept.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=1000)
    ridge: float = real(default=0.0)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        # With a ridge the equation is that of the state in its own units.
        system = System.of(vjp, cotangent, self.tol, scaled=not self.ridge)
        end = self.advance(system, system.begin(start))
        return system.refined(end, self.max_steps, end.error if self.ridge else None)

    def advance(self, system: System, start: Progress) -> Progress:
        """Goes on from ``start`` until the tolerance is met or it cannot be."""
        g, tol, ridge = system.g, system.tol, self.ridge
        rounding = 16 * tree.coarsest_eps(g)
        jvp = system.transposed()
        if jvp is None:
            raise ValueError(
                "CGNormal needs products with J, which JAX makes by transposing those "
                "with Jᵀ. It cannot here: f has a backward pass of its own (another "
                "rbp_solve, a custom_vjp, a callback). Use Adaptive(), BiCGSTAB() or "
                "GMRES(), which need Jᵀ alone."
            )

        def apply_adjoint(r: PyTree, z: PyTree) -> PyTree:  # Aᵀr - ηz, A = I - Jᵀ
            s = tree.sub(r, jvp(r))
            return tree.axpy(-ridge, z, s) if ridge else s

        # ‖Aᵀg‖, which only a ridge needs; the compiler removes it where there is none.
        scale = tree.norm(apply_adjoint(g, tree.scale(0.0, g)))
        scale = jnp.where(scale == 0, 1, scale).astype(scale.dtype)

        def error(r: PyTree, s: PyTree) -> jax.Array:
            """What the tolerance bounds: ‖r‖, or ‖s‖ / ‖Aᵀg‖ with a ridge."""
            return tree.norm(s) / scale if ridge else tree.norm(r)

        damped = lambda z, r: error(r, apply_adjoint(r, z))
        if ridge:
            products = start.num_products + 2
            start = start._replace(
                error=damped(start.z, start.r), num_products=products
            )

        def one_pass(old: Progress) -> Progress:
            """CGLS from z, whose residual is r."""
            s = apply_adjoint(old.r, old.z)

            def unfinished(now: _State) -> jax.Array:
                live = (now.gamma > 0) & jnp.isfinite(now.gamma)
                if not ridge:
                    # Of a singular I - J a part of g may be out of reach. Then
                    # (I - J) r is rounding, and no step makes r any less.
                    lost = now.gamma <= rounding**2 * tree.vdot(now.r, now.r)
                    live &= ~lost | (now.k == old.num_steps)
                more = (error(now.r, now.s) > tol / 2) & (now.k < self.max_steps)
                return more & live

            def body(now: _State) -> _State:
                q = system.apply(now.p)
                curvature = tree.vdot(q, q)
                if ridge:
                    curvature += ridge * tree.vdot(now.p, now.p)
                alpha = now.gamma / jnp.where(curvature == 0, 1, curvature)
                z = tree.axpy(alpha, now.p, now.z)
                r = tree.axpy(-alpha, q, now.r)
                s = apply_adjoint(r, z)
                gamma = tree.vdot(s, s)
                p = tree.axpy(gamma / now.gamma, now.p, s)
                return _State(z, r, s, p, gamma, now.k + 1)

            first = _State(old.z, old.r, s, s, tree.vdot(s, s), old.num_steps)
            end = lax.while_loop(unfinished, body, first)
            products = old.num_products + 1 + 2 * (end.k - old.num_steps)
            return old._replace(
                z=end.z,
                num_steps=end.k,
                num_products=products,
                error=error(end.r, end.s),
            )

        if ridge:
            return system.restarted(one_pass, start, self.max_steps, damped, 1)
        return system.restarted(one_pass, start, self.max_steps)


class _State(NamedTuple):
    """Of the loop: iterate, residual r, s = Aᵀr - ηz, direction, ‖s‖², steps so far."""

    z: PyTree
    r: PyTree
    s: PyTree
    p: PyTree
    gamma: jax.Array
    k: jax.Array
