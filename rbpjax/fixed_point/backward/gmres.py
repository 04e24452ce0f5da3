"""GMRES: the Krylov rule that never increases the residual, at the price of memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.arnoldi import combine, orthogonalize
from rbpjax._core.strategy import budget, count, strategy, tolerance
from rbpjax.fixed_point.backward.rule import Progress, System, ratio
from rbpjax.types import LinearMap, PyTree, Solution


@strategy
class GMRES:
    """Generalized minimal residuals on (I - Jᵀ) z = g, restarted.

    Exact up to ``tol`` where it converges: always without a restart, that is within
    ``restart`` steps on few distinct eigenvalues; restarted it may stagnate (a restart
    that gains less than a hundredth ends it), which it reports. The residual never
    increases, and the condition number is not squared.

    Cost: one VJP a step, and 4 · restart · n multiplications of orthogonalization (two
    passes of Gram-Schmidt), one VJP more a restart; memory: restart + 4 states.
    AD modes: none of its own.

    Attributes:
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖, in [0, 1).
        ``None``: three quarters of the digits of the coarsest dtype in the state.
      max_steps: budget of steps over all restarts.
      restart: dimension of the Krylov space.

    Raises:
      ValueError: if an option is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import GMRES
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = GMRES()(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> print(z)
      [0.1429 0.4286]

    References:
      Saad and Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7, 1986. Departs from the
      textbook in two points: (1) classical Gram-Schmidt, twice, in place of the
      modified one: two products of a matrix and a vector, as orthogonal; (2) all m
      rotations are applied in each step, those not made yet being identities, so that
      all steps have one shape.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=500)
    restart: int = count(default=20)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        system = System.of(vjp, cotangent, self.tol)
        end = self.advance(system, system.begin(start))
        return system.refined(end, self.max_steps)

    def advance(self, system: System, start: Progress) -> Progress:
        """Goes on from ``start`` until the tolerance is met or it stagnates."""
        m = self.restart

        def one_pass(old: Progress) -> Progress:
            """Up to m Arnoldi steps on I - Jᵀ, a triangular solve, and the new z."""
            v, beta = tree.to_unit(old.r)
            basis = tree.put(tree.empty_rows(m + 1, v), 0, v)
            zeros = lambda *shape: sharding.vary_like(
                jnp.zeros(shape, beta.dtype), old.r
            )
            rhs = zeros(m + 1).at[0].set(beta)
            # R of the QR factorization of the Hessenberg matrix; ones on the diagonal
            # of unused columns keep the triangular solve regular, and their rhs is 0.
            upper = zeros(m, m) + jnp.eye(m, dtype=beta.dtype)
            k = old.num_steps
            j = jnp.zeros_like(k)

            def unfinished(now: _State) -> jax.Array:
                more = (now.j < m) & (k + now.j < self.max_steps)
                return more & (jnp.abs(now.rhs[now.j]) > system.tol / 2)

            def body(now: _State) -> _State:
                j = now.j
                w = system.apply(tree.take(now.basis, j))
                column, w = orthogonalize(now.basis, w)
                again, w = orthogonalize(now.basis, w)
                w, length = tree.to_unit(w)
                column = (column + again).at[j + 1].set(length)
                # Rotations not made yet have cosine 1 and sine 0.
                turn = lambda i, c: _rotate(c, i, now.cosines[i], now.sines[i])
                column = lax.fori_loop(0, m, turn, column)
                radius = jnp.hypot(column[j], column[j + 1])
                # A column of zeros: I - J is singular, and the residual stays.
                cosine = ratio(column[j], radius)
                sine = jnp.where(radius == 0, 1, ratio(column[j + 1], radius))
                column = _rotate(column, j, cosine, sine)
                pivot = jnp.where(column[j] == 0, 1, column[j])
                column = column.at[j].set(pivot)
                return _State(
                    tree.put(now.basis, j + 1, w),
                    now.upper.at[:, j].set(column[:m]),
                    now.cosines.at[j].set(cosine),
                    now.sines.at[j].set(sine),
                    _rotate(now.rhs, j, cosine, sine),
                    j + 1,
                )

            first = _State(basis, upper, zeros(m) + 1, zeros(m), rhs, j)
            end = lax.while_loop(unfinished, body, first)
            used = jnp.arange(m, dtype=end.j.dtype) < end.j
            y = jnp.where(used, end.rhs[:m], 0)

            def substitute(i: jax.Array, y: jax.Array) -> jax.Array:
                i = m - 1 - i  # upwards; what lies left of the diagonal is zero
                others = end.upper[i] @ y - end.upper[i, i] * y[i]
                return y.at[i].set((y[i] - others) / end.upper[i, i])

            y = lax.fori_loop(0, m, substitute, y)
            return old._replace(
                z=tree.add(old.z, combine(end.basis, y)),
                num_steps=k + end.j,
                num_products=old.num_products + end.j,
                error=jnp.abs(end.rhs[end.j]),
            )

        # Passes are short, and may be many that gain little each: not a breakdown.
        return system.restarted(one_pass, start, self.max_steps, stalled=0.99)


class _State(NamedTuple):
    """What the loop carries.

    The basis, R, the rotations, the right-hand side turned by them, and the steps
    of this pass.
    """

    basis: PyTree
    upper: jax.Array
    cosines: jax.Array
    sines: jax.Array
    rhs: jax.Array
    j: jax.Array


def _rotate(
    x: jax.Array, i: jax.Array, cosine: jax.Array, sine: jax.Array
) -> jax.Array:
    """The Givens rotation of entries i and i + 1."""
    a, b = x[i], x[i + 1]
    return x.at[i].set(cosine * a + sine * b).at[i + 1].set(cosine * b - sine * a)
