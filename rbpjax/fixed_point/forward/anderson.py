"""Anderson acceleration: extrapolates a fixed point from the last few steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax.fixed_point.forward.iteration import relative_change
from rbpjax.types import PyTree, Solution, check_count, check_real, strategy


@strategy
class Anderson:
    """Anderson acceleration (type II) of h ← f(h), as forward solver or through RBP.

    Of the last ``memory`` differences of iterates ΔH and of residuals ΔR it takes the
    combination γ that explains the present residual r = f(h) - h best, and steps to

        h + βr - (ΔH + βΔR)γ,   γ = argmin ‖r - ΔRγ‖² + ridge · Σ ‖Δrᵢ‖² γᵢ²,

    with β = 1 - damping. On linear maps it is GMRES in other clothes; it often
    converges where plain iteration does not. No guarantee: the best iterate is
    returned, and divergence stops the loop, as in ``FixedPointIteration``.

    The small system is solved for columns brought to unit length, with the ridge on its
    diagonal: it is never singular, whether differences vanish or are parallel (the
    crash most often reported of other implementations).

    Cost: one evaluation of f a step and 4 · memory · n multiplications; one row of the
    Gram matrix is new in a step. Memory: 2 · memory + 8 states. The coefficients are
    common to the whole state; under ``jax.vmap`` each example has its own.

    Attributes:
      memory: number of differences kept.
      max_steps: budget of steps.
      tol: bound on the relative residual, as in ``FixedPointIteration``.
      damping: 1 - β, in [0, 1).
      ridge: relative to the diagonal of the unit-length Gram matrix. ``None``: ten
        times the machine epsilon of the computation.

    Raises:
      ValueError: if a field is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> solution = Anderson()(lambda h: -1.5 * jnp.sin(h) + 1, jnp.ones(2))
      >>> bool(solution.converged)  # the plain iteration diverges
      True

    References:
      Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations", SIAM Journal
      on Numerical Analysis 49, 2011, equation 2.2 (unconstrained form).
    """

    memory: int = 5
    max_steps: int = 500
    tol: float | None = None
    damping: float = 0.0
    ridge: float | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "memory", self.memory, 1)
        check_count(self, "max_steps", self.max_steps, 1)
        check_real(self, "damping", self.damping, below=1.0)
        for name in ("tol", "ridge"):
            if getattr(self, name) is not None:
                check_real(self, name, getattr(self, name))

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.default_tol(h0) if self.tol is None else self.tol
        dtype = tree.real_dtype(h0)
        eps = float(jnp.finfo(dtype).eps)
        ridge = 10 * eps if self.ridge is None else self.ridge
        beta, m = 1.0 - self.damping, self.memory

        def unfinished(carry: tuple) -> jax.Array:
            *_, k, _, best, residual = carry
            sane = (residual <= best * eps**-0.5) | (k == 0)  # False for NaN
            return (best > tol) & (k <= self.max_steps) & sane

        def body(carry: tuple) -> tuple:
            h, mixed_old, r_old, rows, gram, h_best, k, k_best, best, _ = carry
            image = step(h)
            residual = relative_change(image, h)
            r = tree.sub(image, h)
            mixed = image if beta == 1.0 else tree.axpy(beta, r, h)
            # The newest differences replace the oldest; in the first step there is
            # none, and a row of zeros stands for it.
            at = k % m
            newest = (tree.sub(mixed, mixed_old), tree.sub(r, r_old))
            newest = tree.where(k == 0, tree.scale(0.0, newest), newest)
            rows = tree.put(rows, at, newest)
            # Sums here: a product of matrix and vector makes XLA copy the rows.
            products = jax.vmap(lambda row: tree.vdot(row, newest[1]))(rows[1])
            gram = gram.at[at].set(products).at[:, at].set(products)
            target = jax.vmap(lambda row: tree.vdot(row, r))(rows[1])
            gamma = regularized_solve(gram, target, ridge)
            h_next = mixed
            for i in range(m):  # one pass over the rows, where a product takes two
                h_next = tree.axpy(-gamma[i], tree.take(rows[0], i), h_next)
            better = residual < best
            return (
                h_next,
                mixed,
                r,
                rows,
                gram,
                tree.where(better, h, h_best),
                k + 1,
                jnp.where(better, k, k_best),
                jnp.where(better, residual, best),
                residual,
            )

        history = tree.empty_rows(m, h0)
        k = sharding.vary_like(jnp.int32(0), h0)
        infinity = sharding.vary_like(jnp.array(jnp.inf, dtype), h0)
        gram = sharding.vary_like(jnp.zeros((m, m), dtype), h0)
        rows = (history, history)  # of Δ(H + βR), and of ΔR
        zero = tree.scale(0.0, h0)
        carry = (h0, h0, zero, rows, gram, h0, k, k, infinity, infinity)
        carry = lax.while_loop(unfinished, body, carry)
        *_, value, _, steps, residual, _ = carry
        return Solution(value, steps, residual, residual <= tol)


def regularized_solve(gram: jax.Array, target: jax.Array, ridge: float) -> jax.Array:
    """γ of (G + ridge · diag G) γ = t, by elimination on the unit-diagonal matrix.

    Positive definite, so that no pivoting is needed; m is small and static, so that the
    loop unrolls into a few fused operations instead of a library call in each step.
    """
    diagonal = jnp.diag(gram)
    used = diagonal > 0
    inverse_length = jnp.where(used, jnp.where(used, diagonal, 1) ** -0.5, 0)
    matrix = gram * inverse_length[:, None] * inverse_length[None, :]
    matrix = jnp.where(jnp.eye(len(gram), dtype=bool), 1 + ridge, matrix)
    system = jnp.concatenate([matrix, (target * inverse_length)[:, None]], axis=1)
    for i in range(len(gram)):
        row = system[i] / system[i, i]
        system = (system - system[:, i, None] * row[None, :]).at[i].set(row)
    return system[:, -1] * inverse_length
