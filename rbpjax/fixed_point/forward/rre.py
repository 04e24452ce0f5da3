"""Reduced rank extrapolation: plain steps, and now and then a leap."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax.fixed_point.forward.anderson import regularized_solve
from rbpjax.fixed_point.forward.iteration import relative_change
from rbpjax.types import PyTree, Solution, check_count, check_real, strategy


@strategy
class RRE:
    """Reduced rank extrapolation of h ← f(h), as forward solver or through RBP.

    A cycle is ``memory + 1`` plain steps, of which the residuals uᵢ = f(hᵢ) - hᵢ are
    kept; then the combination of the iterates with the least residual is taken, were f
    linear, and the next cycle starts from there:

        h ← h_{m+1} - Σᵢ γᵢ uᵢ₊₁,   γ = argmin ‖u_m - Σᵢ γᵢ (uᵢ₊₁ - uᵢ)‖² + ridge · …

    with the ridge of ``Anderson``, whose steps these are, taken once a cycle instead of
    in each: about as many evaluations of f, with less arithmetic beside them. On linear
    maps a cycle is ``memory + 1`` steps of
    GMRES; ``RBP(RRE())`` is its restarted form for the adjoint. Converges also for
    ρ(J) > 1 if few eigenvalues are that large. No guarantee: the best iterate is
    returned, and divergence stops the loop, as in ``FixedPointIteration``.

    Cost: one evaluation of f a step, and (memory + 1) · n multiplications on average,
    where ``Anderson`` makes 4 · memory · n; memory: 2 · memory + 6 states. The
    coefficients are common to the whole state; under ``jax.vmap`` each example has its
    own.

    Attributes:
      memory: number of differences combined, one less than the steps of a cycle.
      max_steps: budget of steps.
      tol: bound on the relative residual, as in ``FixedPointIteration``.
      ridge: as in ``Anderson``. ``None``: ten times the machine epsilon.

    Raises:
      ValueError: if a field is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> solution = RRE()(lambda h: -1.5 * jnp.sin(h) + 1, jnp.ones(2))
      >>> bool(solution.converged)  # the plain iteration diverges
      True

    References:
      Smith, Ford and Sidi, "Extrapolation Methods for Vector Sequences", SIAM Review
      29, 1987, section 3 (RRE, in cycles); Walker and Ni 2011 for the form of γ.
    """

    memory: int = 5
    max_steps: int = 1000
    tol: float | None = None
    ridge: float | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "memory", self.memory, 1)
        check_count(self, "max_steps", self.max_steps, 1)
        for name in ("tol", "ridge"):
            if getattr(self, name) is not None:
                check_real(self, name, getattr(self, name))

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.default_tol(h0) if self.tol is None else self.tol
        dtype = tree.real_dtype(h0)
        eps = float(jnp.finfo(dtype).eps)
        ridge = 10 * eps if self.ridge is None else self.ridge
        m = self.memory

        def unfinished(carry: tuple) -> jax.Array:
            *_, k, _, best, residual = carry
            sane = (residual <= best * eps**-0.5) | (k == 0)  # False for NaN
            return (best > tol) & (k <= self.max_steps) & sane

        def advance(carry: tuple) -> tuple:
            """One plain step, its residual put into row j."""
            j, (rows, h, h_best, k, k_best, best, _) = carry
            image = step(h)
            residual = relative_change(image, h)
            better = residual < best
            return j + 1, (
                tree.put(rows, j, tree.sub(image, h)),
                image,
                tree.where(better, h, h_best),
                k + 1,
                jnp.where(better, k, k_best),
                jnp.where(better, residual, best),
                residual,
            )

        def cycle(carry: tuple) -> tuple:
            more = lambda state: (state[0] <= m) & unfinished(state[1])
            _, carry = lax.while_loop(more, advance, (zero, carry))
            # Where that ended early the whole loop ends, and nobody reads the leap.
            rows, h, *rest = carry
            changes = jax.tree.map(lambda u: u[1:] - u[:-1], rows)
            gram = lax.map(lambda change: tree.products(changes, change), changes)
            target = tree.products(changes, tree.take(rows, m))
            gamma = regularized_solve(gram, target, ridge)
            for i in range(m):
                h = tree.axpy(-gamma[i], tree.take(rows, i + 1), h)
            return (rows, h, *rest)

        zero = sharding.vary_like(jnp.int32(0), h0)
        infinity = sharding.vary_like(jnp.array(jnp.inf, dtype), h0)
        rows = tree.empty_rows(m + 1, h0)
        carry = (rows, h0, h0, zero, zero, infinity, infinity)
        carry = lax.while_loop(unfinished, cycle, carry)
        _, _, value, _, steps, residual, _ = carry
        return Solution(value, steps, residual, residual <= tol)
