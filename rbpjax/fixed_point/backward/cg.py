"""Plain conjugate gradients, for symmetric Jacobians: half of the products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax.fixed_point.backward.cg_normal import refine
from rbpjax.fixed_point.backward.neumann import begin, ratio, resolved
from rbpjax.types import (
    LinearMap,
    PyTree,
    Solution,
    check_count,
    check_real,
    strategy,
)


@strategy
class CG:
    """Conjugate gradients on (I - J) z = g itself, for symmetric J.

    For steps that descend an energy: gradient descent on a loss, symmetric networks. J
    must be symmetric with all eigenvalues below 1, those below -1 included. Then exact
    up to ``tol``, in about √κ(I - J) log(2/tol)/2 steps of one product each, where
    ``CGNormal`` needs κ and two products, ``BiCGSTAB`` about as many steps and two
    products. For any other J it fails, mostly, and says so: what is reported is the
    true residual, measured when the recurrence believes to be done; the iteration
    restarts on what is left, as in ``CGNormal``.

    Cost: one VJP a step, one more a restart; memory: five states.

    Attributes:
      max_steps: budget of steps over all restarts.
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖. ``None``: three
        quarters of the digits of the coarsest dtype in the state.

    Raises:
      ValueError: if a field is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> jac = jnp.array([[0.5, 0.3], [0.3, -2.0]])  # symmetric, ρ(J) > 1
      >>> solution = CG(tol=1e-12)(lambda v: jac @ v, jnp.array([1.0, 0.0]))
      >>> bool(solution.converged), int(solution.num_steps)  # two eigenvalues
      (True, 2)

    References:
      Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems",
      J. Res. Nat. Bur. Standards 49, 1952.
    """

    max_steps: int = 1000
    tol: float | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "max_steps", self.max_steps, 1)
        if self.tol is not None:
            check_real(self, "tol", self.tol)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        apply = lambda z: tree.sub(z, vjp(z))

        def inner(z: PyTree, r: PyTree, k: jax.Array) -> tuple:
            """One pass from z, whose residual is r."""

            def unfinished(carry: tuple) -> jax.Array:
                *_, square, curvature, k = carry
                # Curvature that is not positive: J is not what it must be.
                live = (curvature > 0) & jnp.isfinite(square)
                return (square > (tol / 2) ** 2) & (k < self.max_steps) & live

            def body(carry: tuple) -> tuple:
                z, r, p, square, _, k = carry
                q = apply(p)
                curvature = tree.vdot(p, q)
                alpha = ratio(square, curvature)
                z, r = tree.axpy(alpha, p, z), tree.axpy(-alpha, q, r)
                new = tree.vdot(r, r)
                p = tree.axpy(new / square, p, r)
                return z, r, p, new, curvature, k + 1

            one = sharding.vary_like(jnp.ones((), tree.real_dtype(r)), r)
            carry = (z, r, r, tree.vdot(r, r), one, k)
            z, *_, k = lax.while_loop(unfinished, body, carry)
            return z, k

        def measure(z: PyTree) -> tuple[PyTree, jax.Array]:
            r = tree.sub(g, apply(z))
            return r, jnp.where(resolved(z, tol), tree.norm(r), jnp.inf)

        first = begin(vjp, g, start)
        z, r, k, now = refine(inner, measure, first, tol, self.max_steps)
        return Solution(tree.scale(size, z), k, tree.norm(r), now <= tol)
