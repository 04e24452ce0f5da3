"""The default rule: Neumann while that is the way, Krylov methods where it is not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax.fixed_point.backward.cg_normal import BiCGSTAB, CGNormal
from rbpjax.fixed_point.backward.neumann import Progress, add_terms, begin, measured
from rbpjax.fixed_point.forward.iteration import next_look
from rbpjax.types import (
    LinearMap,
    PyTree,
    Solution,
    check_count,
    check_real,
    strategy,
)

ALIGNED = 0.75
"""Cosine of two residuals from which the later one says little that is new."""
FEW = 8
"""Steps that are left, at most, where it is not worth while to change the method."""
GROWTH = 1e3
"""What terms may grow by before they fall: on quadratics, momentum needs about √κ/2."""


@strategy
class Adaptive:
    """Right whenever I - J is invertible, as cheap as Neumann where that is the way.

    Four loops in one compiled program, each of which ends at once when the tolerance is
    met already, and goes on from where the one before it stopped:

    1. the Neumann series, until the rate of its first terms says that more than
       ``patience`` would follow, or more than 8 that point where the last ones did
       (a cosine of 0.75). Krylov methods gain by what terms have in common: much where
       J has a few large eigenvalues, nothing where they lie on a circle;
    2. BiCGSTAB, which does not need ρ(J) < 1 nor squares the condition number, but may
       stagnate. If it does, the series goes on for as long as it contracts, up to half
       of the budget, and BiCGSTAB after it;
    3. CG on the normal equations, which needs nothing but I - J invertible.

    Exact up to ``tol``, or reported as not converged.

    Cost: that of ``Neumann(tol=tol)`` or, with some Neumann steps more, that of the
    Krylov methods. Memory: eight states.

    Attributes:
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖. ``None``: three
        quarters of the digits of the coarsest dtype in the state.
      max_steps: budget of steps over all loops; the last may use it up alone.
      patience: number of Neumann steps that are worth waiting for.

    Raises:
      ValueError: if a field is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = Adaptive(tol=1e-12)(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> bool(jnp.abs(z - jac.T @ z - jnp.array([1.0, 0.0])).max() < 1e-11)
      True

    References:
      Liao et al. 2018, algorithm 2 and section 3.1; van der Vorst 1992. The hand-over
      is ours; ``python -m benchmarks families`` measures what it rests on.
    """

    tol: float | None = None
    max_steps: int = 2000
    patience: int = 100

    def __post_init__(self) -> None:
        """Validates the fields."""
        if self.tol is not None:
            check_real(self, "tol", self.tol)
        check_count(self, "max_steps", self.max_steps, 1)
        check_count(self, "patience", self.patience, 1)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        (z, _, k, _), _ = self.solve(vjp, g, begin(vjp, g, start), tol)
        return measured(vjp, g, size, z, k, tol)

    def solve(
        self, vjp: LinearMap, g: PyTree, start: Progress, tol: float
    ) -> tuple[Progress, jax.Array]:
        """Goes on from ``start``, for a g of unit norm; counts Neumann's steps apart.

        A step of Neumann is one product with J or Jᵀ, a step of the others is two.
        """
        half = BiCGSTAB(self.max_steps // 2 or 1)

        def unsolved(carry: tuple) -> jax.Array:
            attempts, _, (_, _, _, error) = carry
            return (error > tol) & (attempts < 2)

        def attempt(carry: tuple) -> tuple:
            attempts, terms, before = carry
            now = self.neumann(vjp, before, tol, attempts > 0)
            # BiCGSTAB would get stuck again where it has been stuck.
            stuck = (attempts > 0) & (now[3] >= before[3])
            tol_now = jnp.where(stuck, jnp.inf, tol).astype(now[3].dtype)
            terms += now[2] - before[2]
            return attempts + 1, terms, half.solve(vjp, g, now, tol_now)

        zero = jnp.zeros_like(start[2])
        _, terms, now = lax.while_loop(unsolved, attempt, (zero, zero, start))
        return CGNormal(self.max_steps).solve(vjp, g, now, tol), terms

    def neumann(
        self, vjp: LinearMap, start: Progress, tol: float, stubborn: jax.Array
    ) -> Progress:
        """The series while it is worth while, or ``stubborn``: while it contracts."""
        tol = tol / 2  # Half of it is left to rounding, as in Neumann.
        half = self.max_steps // 2
        budget = jnp.where(stubborn, half, self.max_steps).astype(start[2].dtype)

        def worthwhile(carry: tuple) -> jax.Array:
            _, _, k, residual, _, good = carry
            return (residual > tol) & good & (k < budget)

        def body(carry: tuple) -> tuple:
            z, old, k, before, ahead, _ = carry
            z, r = add_terms(vjp, z, old, ahead)
            k, residual = k + ahead, tree.norm(r)
            far = jnp.log(residual / tol) / jnp.log(before / residual)
            left = jnp.where(residual < before, far * ahead.astype(far.dtype), jnp.inf)
            aligned = jnp.abs(tree.vdot(r, old)) > ALIGNED * residual * before
            taken = k - start[2]
            hopeless = (taken >= FEW) & (left > self.patience)
            slow = (taken >= FEW // 2) & aligned & (left > FEW)
            gone = (taken >= self.patience) & (left > self.max_steps)
            good = jnp.where(stubborn, ~gone, ~(hopeless | slow))
            good &= residual < GROWTH * start[3]  # False for NaN
            after = next_look(None, taken, ahead, residual, before, tol)
            return z, r, k, residual, jnp.minimum(after, budget - k), good

        # A first look after two terms: one more look costs more than one term too many.
        first = jnp.minimum(2, budget - start[2])
        carry = (*start, first, start[2] < budget)
        z, r, k, residual, _, _ = lax.while_loop(worthwhile, body, carry)
        # Terms that grew are worse than nothing: what follows starts without them.
        useful = residual < start[3]
        z, r = tree.where(useful, z, start[0]), tree.where(useful, r, start[1])
        return z, r, k, jnp.where(useful, residual, start[3])
