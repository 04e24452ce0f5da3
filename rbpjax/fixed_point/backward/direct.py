"""The adjoint by elimination, for states small enough to hold their Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from rbpjax._core import sharding, tree
from rbpjax.fixed_point.backward.neumann import measured
from rbpjax.types import LinearMap, PyTree, Solution, check_count, check_real, strategy


@strategy
class Direct:
    """Forms J and solves (I - Jᵀ) z = g by LU factorization with partial pivoting.

    Exact up to rounding, ε κ(I - J), whenever I - J is invertible, at a cost that does
    not depend on the spectrum. For small states, a few hundred numbers, often
    the fastest rule where I - J is badly conditioned; and an oracle for the others.

    Complex states are the pairs of real numbers that they are to a step function.

    Cost: n products as one batch, for a state of n real numbers, and 2n³/3
    multiplications and additions; memory: two n × n matrices. ``num_steps`` is n.

    Attributes:
      max_size: largest n for which the matrix may be formed. Under ``jax.vmap`` each
        example has a matrix of its own.
      tol: bound on the relative adjoint residual above which the result is reported as
        not converged; nothing else depends on it. ``None``: three quarters of the
        digits of the coarsest dtype in the state.

    Raises:
      ValueError: if a field is out of its range or not a Python number; when called, if
        the state has more numbers than ``max_size``.

    Example:
      >>> import jax.numpy as jnp
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = Direct()(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> bool(jnp.abs(z - jac.T @ z - jnp.array([1.0, 0.0])).max() < 1e-14)
      True

    References:
      Liao et al. 2018, equation 8, the inverse that the paper's methods avoid.
    """

    max_size: int = 4096
    tol: float | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "max_size", self.max_size, 1)
        if self.tol is not None:
            check_real(self, "tol", self.tol)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g; a start is of no use."""
        g, size = tree.to_unit(cotangent)
        flat, restore = _as_vector(g)
        n = len(flat)
        if n > self.max_size:
            raise ValueError(
                f"Direct: the state has {n} numbers, and max_size={self.max_size} is "
                f"the largest for which a matrix, here {n} × {n}, may be formed. Use "
                "an iterative rule, such as Adaptive(), map over examples, or raise "
                "max_size."
            )
        column = lambda e: _as_vector(vjp(restore(e)))[0]
        eye = jnp.eye(n, dtype=flat.dtype)
        # Row i is Jᵀeᵢ, a column of Jᵀ.
        matrix = eye - jax.vmap(column)(eye).T
        z = restore(jnp.linalg.solve(matrix, flat))
        steps = sharding.vary_like(jnp.int32(n), g)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        return measured(vjp, g, size, z, steps, tol)


def _as_vector(x: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """The real numbers of a state as one vector, and the way back."""
    leaves, treedef = jax.tree.flatten(x)
    dtype = tree.real_dtype(x)

    def as_real(u: jax.Array) -> jax.Array:
        u = sharding.gathered(u)  # the matrix is whole
        return (jnp.stack([u.real, u.imag]) if jnp.iscomplexobj(u) else u).astype(dtype)

    def like(u: jax.Array, leaf: jax.Array) -> jax.Array:
        pair = lax.complex(u[0], u[1]) if jnp.iscomplexobj(leaf) else u
        return pair.astype(leaf.dtype)

    vector, unravel = ravel_pytree(list(map(as_real, leaves)))

    def restore(v: jax.Array) -> PyTree:
        parts = map(like, unravel(v), leaves)
        return sharding.typed_like(jax.tree.unflatten(treedef, parts), x)

    return vector, restore
