"""GMRES: the Krylov rule that never increases the residual, at the price of memory."""

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
class GMRES:
    """Generalized minimal residuals on (I - Jᵀ) z = g, restarted.

    Exact up to ``tol`` where it converges: always without a restart, that is within
    ``restart`` steps on few distinct eigenvalues; restarted it may stagnate (a restart
    that gains less than a hundredth ends it), which it reports. The residual never
    increases, and the condition number is not squared.

    Cost: one VJP a step, and 4 · restart · n multiplications of orthogonalization (two
    passes of Gram-Schmidt), one VJP more a restart; memory: restart + 4 states.

    Attributes:
      max_steps: budget of steps over all restarts.
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖. ``None``: three
        quarters of the digits of the coarsest dtype in the state.
      restart: dimension of the Krylov space.

    Raises:
      ValueError: if a field is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = GMRES(tol=1e-12)(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> bool(jnp.abs(z - jac.T @ z - jnp.array([1.0, 0.0])).max() < 1e-11)
      True

    References:
      Saad and Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7, 1986.
    """

    max_steps: int = 500
    tol: float | None = None
    restart: int = 20

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "max_steps", self.max_steps, 1)
        check_count(self, "restart", self.restart, 1)
        if self.tol is not None:
            check_real(self, "tol", self.tol)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        apply = lambda z: tree.sub(z, vjp(z))
        m = self.restart

        def inner(z: PyTree, r: PyTree, k: jax.Array) -> tuple:
            """Up to m Arnoldi steps on A, a triangular solve, and the new z."""
            v, beta = tree.to_unit(r)
            basis = tree.put(tree.empty_rows(m + 1, v), 0, v)
            zeros = lambda *shape: sharding.vary_like(jnp.zeros(shape, beta.dtype), r)
            rhs = zeros(m + 1).at[0].set(beta)
            # R of the QR factorization of the Hessenberg matrix; ones on the diagonal
            # of unused columns keep the triangular solve regular, and their rhs is 0.
            upper = zeros(m, m) + jnp.eye(m, dtype=beta.dtype)
            j = sharding.vary_like(jnp.int32(0), r)

            def unfinished(carry: tuple) -> jax.Array:
                rhs, j = carry[-2:]
                more = (j < m) & (k + j < self.max_steps)
                return more & (jnp.abs(rhs[j]) > tol / 2)

            def body(carry: tuple) -> tuple:
                basis, upper, cosines, sines, rhs, j = carry
                w = apply(tree.take(basis, j))
                column, w = _orthogonalize(basis, w)
                again, w = _orthogonalize(basis, w)
                w, length = tree.to_unit(w)
                column = (column + again).at[j + 1].set(length)
                basis = tree.put(basis, j + 1, w)
                # Rotations not made yet have cosine 1 and sine 0.
                column = lax.fori_loop(
                    0, m, lambda i, c: _rotate(c, i, cosines[i], sines[i]), column
                )
                radius = jnp.hypot(column[j], column[j + 1])
                cosine = jnp.where(radius == 0, 1, ratio(column[j], radius))
                sine = ratio(column[j + 1], radius)
                column = _rotate(column, j, cosine, sine)
                pivot = jnp.where(column[j] == 0, 1, column[j])
                column = column.at[j].set(pivot)
                return (
                    basis,
                    upper.at[:, j].set(column[:m]),
                    cosines.at[j].set(cosine),
                    sines.at[j].set(sine),
                    _rotate(rhs, j, cosine, sine),
                    j + 1,
                )

            carry = (basis, upper, zeros(m) + 1, zeros(m), rhs, j)
            basis, upper, _, _, rhs, j = lax.while_loop(unfinished, body, carry)
            y = jnp.where(jnp.arange(m, dtype=j.dtype) < j, rhs[:m], 0)

            def substitute(i: jax.Array, y: jax.Array) -> jax.Array:
                i = m - 1 - i  # upwards; what lies left of the diagonal is zero
                others = upper[i] @ y - upper[i, i] * y[i]
                return y.at[i].set((y[i] - others) / upper[i, i])

            y = lax.fori_loop(0, m, substitute, y)
            return tree.add(z, _combine(basis, y)), k + j

        def measure(z: PyTree) -> tuple[PyTree, jax.Array]:
            r = tree.sub(g, apply(z))
            return r, jnp.where(resolved(z, tol), tree.norm(r), jnp.inf)

        first = begin(vjp, g, start)
        # Passes are short, and may be many that gain little each: not a breakdown.
        z, r, k, now = refine(inner, measure, first, tol, self.max_steps, 0.99)
        return Solution(tree.scale(size, z), k, tree.norm(r), now <= tol)


def _orthogonalize(basis: PyTree, w: PyTree) -> tuple[jax.Array, PyTree]:
    """``(Vᵀw, w - VVᵀw)`` for the rows V of the basis; unused rows are zero."""
    coefficients = tree.products(basis, w)
    return coefficients, tree.sub(w, _combine(basis, coefficients))


def _combine(basis: PyTree, coefficients: jax.Array) -> PyTree:
    """Σ cᵢ vᵢ over as many rows as there are coefficients."""

    def leaf(b: jax.Array) -> jax.Array:
        c = coefficients.astype(b.dtype)
        return jnp.tensordot(c, b[: len(c)], 1, precision=lax.Precision.HIGHEST)

    return jax.tree.map(leaf, basis)


def _rotate(
    x: jax.Array, i: jax.Array, cosine: jax.Array, sine: jax.Array
) -> jax.Array:
    """The Givens rotation of entries i and i + 1."""
    a, b = x[i], x[i + 1]
    return x.at[i].set(cosine * a + sine * b).at[i + 1].set(cosine * b - sine * a)
