"""The adjoint by elimination, for states small enough to hold their Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from rbpjax._core import sharding, tree
from rbpjax._core.strategy import count, strategy, tolerance
from rbpjax.fixed_point.backward.rule import System
from rbpjax.types import LinearMap, PyTree, Solution


@strategy
class Direct:
    """Forms J and solves (I - Jᵀ) z = g by LU factorization with partial pivoting.

    Exact up to rounding, ε κ(I - J), whenever I - J is invertible, at a cost that does
    not depend on the spectrum. For small states, a few hundred numbers, often
    the fastest rule where I - J is badly conditioned; and an oracle for the others.

    Complex states are the pairs of real numbers that they are to a step function.

    Cost: n products as one batch, for a state of n real numbers, and 2n³/3
    multiplications and additions; memory: two n × n matrices. ``num_steps`` is n.
    AD modes: those of f's.

    Attributes:
      tol: bound on the relative adjoint residual, in [0, 1), above which the result is
        reported as not converged; nothing else depends on it. ``None``: three quarters
        of the digits of the coarsest dtype in the state.
      max_size: largest n for which the matrix may be formed. Under ``jax.vmap`` each
        example has a matrix of its own.

    Raises:
      ValueError: if an option is out of its range or not a Python number; when called,
        if the state has more numbers than ``max_size``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import Direct
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = Direct()(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> print(z)
      [0.1429 0.4286]

    References:
      Liao et al. 2018, equation 8, the inverse that the paper's methods avoid.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_size: int = count(default=4096)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g; a start is of no use."""
        system = System.of(vjp, cotangent, self.tol, scaled=False)
        flat, restore = _as_vector(system.g)
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
        begin = system.begin(None)
        count = begin.num_steps + n
        end = begin._replace(z=z, num_steps=count, num_products=count)
        return system.measured(end, n + 1, jnp.array(True))


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
    vector = sharding.whole(vector)

    def restore(v: jax.Array) -> PyTree:
        parts = map(like, unravel(sharding.own_part(v)), leaves)
        return sharding.typed_like(jax.tree.unflatten(treedef, parts), x)

    return vector, restore
