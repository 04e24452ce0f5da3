"""The default rule: Neumann while it is fast, Krylov methods from where it stalls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax.fixed_point import tree
from rbpjax.fixed_point.backward import measured
from rbpjax.fixed_point.krylov import BiCGSTAB, CGNormal, Progress, start_at_zero
from rbpjax.types import (
    LinearMap,
    PyTree,
    Solution,
    check_count,
    check_real,
    strategy,
)


@strategy
class Adaptive:
    """Right whenever I - J is invertible, as cheap as Neumann where that is fast.

    Three loops in one compiled program, each of which ends at once when the tolerance
    is met already, and goes on from where the one before it stopped:

    1. the Neumann series, as long as its terms shrink by ``contraction`` a step on
       average (the first ``patience`` steps are free);
    2. BiCGSTAB, which does not need ρ(J) < 1 nor squares the condition number, but may
       stagnate;
    3. CG on the normal equations, which needs nothing but I - J invertible.

    Exact up to ``tol``, or reported as not converged.

    Cost: where ρ(J) is small, that of ``Neumann(tol=tol)``; else some Neumann steps
    more than the Krylov methods'. Memory: eight states.

    Attributes:
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖. ``None``: three
        quarters of the digits of the coarsest dtype in the state.
      max_steps: budget of steps over all three loops; the last may use it up alone.
      contraction: average factor a step above which Neumann is left.
      patience: number of steps before Neumann is judged.

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
    contraction: float = 0.65
    patience: int = 10

    def __post_init__(self) -> None:
        """Validates the fields."""
        if self.tol is not None:
            check_real(self, "tol", self.tol)
        check_count(self, "max_steps", self.max_steps, 1)
        check_real(self, "contraction", self.contraction, below=1.0)
        check_count(self, "patience", self.patience, 1)

    def __call__(self, vjp: LinearMap, cotangent: PyTree) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        now = self.neumann(vjp, g)
        half = self.max_steps // 2 or 1
        now = BiCGSTAB(half).solve(vjp, g, now, tol)
        z, _, k, _ = CGNormal(self.max_steps).solve(vjp, g, now, tol)
        return measured(vjp, g, size, z, k, tol)

    def neumann(self, vjp: LinearMap, g: PyTree) -> Progress:
        """The series while it contracts, for a cotangent g of unit norm."""
        tol = tree.default_tol(g) if self.tol is None else self.tol

        def fast(carry: tuple) -> jax.Array:
            _, _, k, residual = carry
            allowed = self.contraction ** k.astype(residual.dtype)
            good = (k < self.patience) | (residual <= allowed)  # False for NaN
            # Half of the tolerance is left to rounding, as in Neumann.
            return (residual > tol / 2) & good & (k < self.max_steps)

        def body(carry: tuple) -> tuple:
            z, r, k, _ = carry
            z, r = tree.add(z, r), vjp(r)
            return z, r, k + 1, tree.norm(r)

        start = start_at_zero(g)
        z, r, k, residual = lax.while_loop(fast, body, start)
        # Terms that grew are worse than nothing: the Krylov methods start afresh.
        useful = residual < 1
        z, r = tree.where(useful, z, start[0]), tree.where(useful, r, g)
        return z, r, k, jnp.where(useful, residual, start[3])
