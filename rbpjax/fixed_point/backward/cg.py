"""Plain conjugate gradients, for symmetric Jacobians: half of the products."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.strategy import budget, strategy, tolerance
from rbpjax.fixed_point.backward.rule import Progress, System, ratio
from rbpjax.types import LinearMap, PyTree, Solution


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

    Cost: one VJP a step, one more a restart; memory: five states. AD modes: none
    of its own.

    Attributes:
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖, in [0, 1).
        ``None``: three quarters of the digits of the coarsest dtype in the state.
      max_steps: budget of steps over all restarts.

    Raises:
      ValueError: if an option is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import CG
      >>> jac = jnp.array([[0.5, 0.3], [0.3, -2.0]])  # symmetric, ρ(J) > 1
      >>> solution = CG()(lambda v: jac @ v, jnp.array([1.0, 0.0]))
      >>> bool(solution.converged), int(solution.num_steps)  # two eigenvalues
      (True, 2)

    References:
      Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems",
      J. Res. Nat. Bur. Standards 49, 1952.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=1000)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        # Leaves scaled apart would make a symmetric J another kind.
        system = System.of(vjp, cotangent, self.tol, scaled=False)

        def one_pass(old: Progress) -> Progress:
            """One pass from z, whose residual is r."""

            def unfinished(now: _State) -> jax.Array:
                # Curvature that is not positive: J is not what it must be.
                live = (now.curvature > 0) & jnp.isfinite(now.square)
                more = (now.square > (system.tol / 2) ** 2) & (now.k < self.max_steps)
                return more & live

            def body(now: _State) -> _State:
                q = system.apply(now.p)
                curvature = tree.vdot(now.p, q)
                alpha = ratio(now.square, curvature)
                z = tree.axpy(alpha, now.p, now.z)
                r = tree.axpy(-alpha, q, now.r)
                square = tree.vdot(r, r)
                p = tree.axpy(square / now.square, now.p, r)
                return _State(z, r, p, square, curvature, now.k + 1)

            z, r, k = old.z, old.r, old.num_steps
            one = sharding.vary_like(jnp.ones((), tree.real_dtype(r)), r)
            first = _State(z, r, r, tree.vdot(r, r), one, k)
            end = lax.while_loop(unfinished, body, first)
            products = old.num_products + end.k - k
            return old._replace(
                z=end.z,
                num_steps=end.k,
                num_products=products,
                error=jnp.sqrt(end.square),
            )

        end = system.restarted(one_pass, system.begin(start), self.max_steps)
        return system.refined(end, self.max_steps)


class _State(NamedTuple):
    """Of the loop: iterate, residual, direction, ‖r‖², ⟨p, (I - Jᵀ)p⟩, steps so far."""

    z: PyTree
    r: PyTree
    p: PyTree
    square: jax.Array
    curvature: jax.Array
    k: jax.Array
