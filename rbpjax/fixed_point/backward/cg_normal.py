"""Krylov rules: solve (I - Jᵀ) z = g with no condition on the spectral radius.

They share one frame, ``refine``: a Krylov method runs until its own recurrence
believes to be done; then the true residual is measured, and the method starts again
on what is left. A recurrence that drifted, broke down or stagnated is found out there,
and a pass that made things worse is undone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax.fixed_point.backward.neumann import Progress, begin, ratio, resolved
from rbpjax.fixed_point.hoisting import hoist_linear
from rbpjax.types import (
    LinearMap,
    PyTree,
    Solution,
    check_count,
    check_real,
    strategy,
)


def refine(
    inner: Callable,
    measure: Callable,
    start: Progress,
    tol: float | jax.Array,
    max_steps: int,
    stalled: float = 0.5,
) -> Progress:
    """Restarts ``inner(z, r, k) -> (z, k)`` until the measured error meets ``tol``.

    Ends as well with the budget, or when a pass leaves more than ``stalled`` times the
    error. The inner method should aim at half of the tolerance, the other half is for
    rounding.
    """

    def unsolved(carry: tuple) -> jax.Array:
        _, _, k, now, before = carry
        return (now > tol) & (now <= stalled * before) & (k < max_steps)

    def body(carry: tuple) -> tuple:
        z_old, r_old, k, now, _ = carry
        z, k = inner(z_old, r_old, k)
        r, new = measure(z)
        better = new < now  # False for NaN
        z, r = tree.where(better, z, z_old), tree.where(better, r, r_old)
        return z, r, k, jnp.where(better, new, now), now

    infinity = sharding.vary_like(jnp.full_like(start[3], jnp.inf), start[1])
    return lax.while_loop(unsolved, body, (*start, infinity))[:4]


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
    a restart; memory: six states.

    Attributes:
      max_steps: budget of conjugate-gradient steps over all restarts.
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖; with ``ridge``,
        on that of the damped normal equations, while the report's ``residual`` stays
        the undamped one and so shows the bias. ``None``: three quarters of the digits
        of the coarsest dtype in the state.
      ridge: η. The paper's code has 1e-5; zero is unbiased.

    Raises:
      ValueError: if a field is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = CGNormal(tol=1e-12)(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> bool(jnp.abs(z - jac.T @ z - jnp.array([1.0, 0.0])).max() < 1e-11)
      True

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      section 3.1; CGLS: Björck, "Numerical Methods for Least Squares Problems",
      algorithm 7.4.1. Departures from the paper's code: no ridge by default, a relative
      tolerance, J from automatic differentiation, and the last iterate is kept.
    """

    max_steps: int = 1000
    tol: float | None = None
    ridge: float = 0.0

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "max_steps", self.max_steps, 1)
        if self.tol is not None:
            check_real(self, "tol", self.tol)
        check_real(self, "ridge", self.ridge)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        z, r, k, now = self.solve(vjp, g, begin(vjp, g, start), tol)
        return Solution(tree.scale(size, z), k, tree.norm(r), now <= tol)

    def solve(self, vjp: LinearMap, g: PyTree, start: Progress, tol: float) -> Progress:
        """Goes on from ``start``, for a cotangent g of unit norm."""
        jvp = hoist_linear(tree.adjoint(vjp, g), g)
        ridge = self.ridge

        apply = lambda z: tree.sub(z, vjp(z))  # A = I - Jᵀ

        def apply_adjoint(r: PyTree, z: PyTree) -> PyTree:  # Aᵀr - ηz
            s = tree.sub(r, jvp(r))
            return tree.axpy(-ridge, z, s) if ridge else s

        def error(r: PyTree, s: PyTree, scale: jax.Array) -> jax.Array:
            """What the tolerance bounds: ‖r‖, or ‖s‖ / ‖Aᵀg‖ with a ridge."""
            return tree.norm(s) / scale if ridge else tree.norm(r)

        # ‖Aᵀg‖; the compiler removes it where there is no ridge.
        scale = tree.norm(apply_adjoint(g, tree.scale(0.0, g)))
        scale = jnp.where(scale == 0, 1, scale).astype(scale.dtype)

        if ridge:
            z, r, k, _ = start
            start = z, r, k, error(r, apply_adjoint(r, z), scale)

        def inner(z: PyTree, r: PyTree, k: jax.Array) -> tuple:
            """CGLS from z, whose residual is r."""
            s = apply_adjoint(r, z)

            def unfinished(carry: tuple) -> jax.Array:
                _, r, s, _, gamma, k = carry
                live = (gamma > 0) & jnp.isfinite(gamma)
                return (error(r, s, scale) > tol / 2) & (k < self.max_steps) & live

            def body(carry: tuple) -> tuple:
                z, r, _, p, gamma, k = carry
                q = apply(p)
                curvature = tree.vdot(q, q)
                if ridge:
                    curvature += ridge * tree.vdot(p, p)
                alpha = gamma / jnp.where(curvature == 0, 1, curvature)
                z, r = tree.axpy(alpha, p, z), tree.axpy(-alpha, q, r)
                s = apply_adjoint(r, z)
                gamma, previous = tree.vdot(s, s), gamma
                p = tree.axpy(gamma / previous, p, s)
                return z, r, s, p, gamma, k + 1

            carry = (z, r, s, s, tree.vdot(s, s), k)
            z, _, _, _, _, k = lax.while_loop(unfinished, body, carry)
            return z, k

        def measure(z: PyTree) -> tuple[PyTree, jax.Array]:
            r = tree.sub(g, apply(z))
            size = error(r, apply_adjoint(r, z) if ridge else r, scale)
            return r, jnp.where(resolved(z, tol), size, jnp.inf)

        return refine(inner, measure, start, tol, self.max_steps)


@strategy
class BiCGSTAB:
    """Stabilized biconjugate gradients on (I - Jᵀ) z = g itself.

    Exact up to ``tol`` where it converges, which it usually does, and fast, also for
    ρ(J) > 1; there is no guarantee, and for eigenvalues of J all around 1 it fails.
    Unlike CG on the normal equations it does not square the condition number. It keeps
    its best iterate, restarts on the true residual, and reports when it got stuck.

    Cost: two VJPs a step, one more a restart; memory: eight states.

    Attributes:
      max_steps: budget of steps over all restarts.
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖. ``None``: three
        quarters of the digits of the coarsest dtype in the state.
      patience: a pass ends after so many steps without a better iterate.

    Raises:
      ValueError: if a field is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = BiCGSTAB(tol=1e-12)(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> bool(jnp.abs(z - jac.T @ z - jnp.array([1.0, 0.0])).max() < 1e-11)
      True

    References:
      van der Vorst, "Bi-CGSTAB", SIAM J. Sci. Stat. Comput. 13, 1992.
    """

    max_steps: int = 500
    tol: float | None = None
    patience: int = 30

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "max_steps", self.max_steps, 1)
        check_count(self, "patience", self.patience, 1)
        if self.tol is not None:
            check_real(self, "tol", self.tol)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        z, r, k, now = self.solve(vjp, g, begin(vjp, g, start), tol)
        return Solution(tree.scale(size, z), k, tree.norm(r), now <= tol)

    def solve(
        self, vjp: LinearMap, g: PyTree, start: Progress, tol: float | jax.Array
    ) -> Progress:
        """Goes on from ``start``, for a cotangent g of unit norm."""
        apply = lambda z: tree.sub(z, vjp(z))

        def inner(z: PyTree, shadow: PyTree, k: jax.Array) -> tuple:
            """One pass from z, whose residual, the shadow too, is ``shadow``."""

            def unfinished(carry: tuple) -> jax.Array:
                now, best, k, k_best = *carry[-4:-2], *carry[-2:]
                patient = (k - k_best < self.patience) & jnp.isfinite(now)
                return (best > tol / 2) & patient & (k < self.max_steps)

            def body(carry: tuple) -> tuple:
                z, r, p, q, z_best, rho, alpha, omega, _, best, k, k_best = carry
                rho, previous = tree.vdot(shadow, r), rho
                beta = ratio(rho, previous) * ratio(alpha, omega)
                p = tree.axpy(beta, tree.axpy(-omega, q, p), r)
                q = apply(p)
                alpha = ratio(rho, tree.vdot(shadow, q))
                s = tree.axpy(-alpha, q, r)
                t = apply(s)
                omega = ratio(tree.vdot(t, s), tree.vdot(t, t))
                z = tree.axpy(omega, s, tree.axpy(alpha, p, z))
                r = tree.axpy(-omega, t, s)
                now = tree.norm(r)
                better = now < best
                z_best = tree.where(better, z, z_best)
                best, k = jnp.where(better, now, best), k + 1
                k_best = jnp.where(better, k, k_best)
                return z, r, p, q, z_best, rho, alpha, omega, now, best, k, k_best

            zero, size = tree.scale(0.0, shadow), tree.norm(shadow)
            one = jnp.ones_like(size)
            one = sharding.vary_like(one, shadow)
            carry = (z, shadow, zero, zero, z, one, one, one, size, size, k, k)
            carry = lax.while_loop(unfinished, body, carry)
            return carry[4], carry[-2]

        def measure(z: PyTree) -> tuple[PyTree, jax.Array]:
            r = tree.sub(g, apply(z))
            return r, jnp.where(resolved(z, tol), tree.norm(r), jnp.inf)

        return refine(inner, measure, start, tol, self.max_steps)
