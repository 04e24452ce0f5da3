"""Backward rules: solve (I - Jᵀ) z = g.

Every rule is called as ``rule(vjp, cotangent)`` with ``vjp(v)`` = Jᵀv, and returns a
``Solution`` whose residual is ‖g + Jᵀz - z‖ / ‖g‖, measured with the returned z. The
rules work on g / ‖g‖ and scale the result back, so that tolerances are relative to the
cotangent and float32 keeps gradients of any magnitude that it can represent.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax.fixed_point import tree
from rbpjax.fixed_point.forward import FixedPointIteration
from rbpjax.types import (
    ForwardSolver,
    LinearMap,
    PyTree,
    Solution,
    check_count,
    check_real,
    strategy,
)


def adjoint_defect(vjp: LinearMap, g: PyTree, z: PyTree) -> PyTree:
    """The vector g + Jᵀz - z, zero at the adjoint."""
    return tree.sub(tree.add(g, vjp(z)), z)


def _measured(
    vjp: LinearMap, g: PyTree, size: jax.Array, z: PyTree, steps: jax.Array, tol: float
) -> Solution:
    """The solution for the cotangent ``size * g``, with the residual measured at z.

    One VJP, which the compiler removes when nobody reads the report.
    """
    residual = tree.norm(adjoint_defect(vjp, g, z))
    return Solution(tree.scale(size, z), steps, residual, residual <= tol)


@strategy
class Neumann:
    """The truncated Neumann series z_K = Σ_{k ≤ K} (Jᵀ)ᵏ g.

    Truncated, hence biased: z - z_K = (Jᵀ)^{K+1} z. The series converges if and only if
    ρ(J) < 1, at rate ρ(J). K = 0 is the one-step ("Jacobian-free") gradient; at the
    fixed point, K = RBP's K steps from g = TBPTT with K + 1 transitions.

    Cost: one VJP a step; memory: two states. With ``tol`` there is one VJP more, since
    the residual of z_K is the next term of the series; the report measures it anew.

    Attributes:
      steps: K, an exact number of steps, or ``None``: as many as ``tol`` takes.
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖. ``None``: three
        quarters of the digits of the coarsest dtype in the state.
      max_steps: budget of steps when there is a tolerance.

    Raises:
      ValueError: if a field is out of its range, or both ``steps`` and ``tol`` given.

    Example:
      >>> import jax.numpy as jnp
      >>> jac = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
      >>> z = Neumann(tol=1e-12)(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> bool(jnp.abs(z - jac.T @ z - jnp.array([1.0, 0.0])).max() < 1e-12)
      True

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      algorithm 2, https://arxiv.org/abs/1803.06396.
    """

    steps: int | None = None
    tol: float | None = None
    max_steps: int = 1000

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "max_steps", self.max_steps, 1)
        if self.tol is not None:
            check_real(self, "tol", self.tol)
        if self.steps is not None:
            check_count(self, "steps", self.steps, 0)
            if self.tol is not None:
                raise ValueError(
                    "Neumann: give `steps` (an exact count) or `tol` (an accuracy), "
                    f"not both; got steps={self.steps}, tol={self.tol}."
                )

    def __call__(self, vjp: LinearMap, cotangent: PyTree) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        if self.steps is not None:

            def term(_: jax.Array, carry: tuple) -> tuple:
                z, v = carry
                v = vjp(v)
                return tree.add(z, v), v

            z, _ = lax.fori_loop(0, self.steps, term, (g, g))
            steps = tree.vary_like(jnp.int32(self.steps), g)
            return _measured(vjp, g, size, z, steps, tol)

        # The invariant: v, the term to be added next, is the residual of z. It starts
        # from z = 0 so that vjp appears once in the compiled program.
        eps = float(jnp.finfo(tree.real_dtype(g)).eps)

        def unfinished(carry: tuple) -> jax.Array:
            _, _, k, residual, best = carry
            sane = residual <= best * eps**-0.5  # False for NaN
            return (residual > tol) & (k <= self.max_steps) & sane

        def body(carry: tuple) -> tuple:
            z, v, k, _, best = carry
            z, v = tree.add(z, v), vjp(v)
            residual = tree.norm(v)
            return z, v, k + 1, residual, jnp.minimum(best, residual)

        zero = tree.scale(0.0, g)
        first = tree.norm(g)
        k = tree.vary_like(jnp.int32(0), g)
        z, _, k, _, _ = lax.while_loop(unfinished, body, (zero, g, k, first, first))
        steps = jnp.maximum(k - 1, 0)  # k terms are the powers 0 … k - 1
        return _measured(vjp, g, size, z, steps, tol)


@strategy
class CGNormal:
    """Conjugate gradients on the normal equations (I - J)(I - Jᵀ) z = (I - J) g.

    Exact up to ``tol`` whenever I - J is invertible, ρ(J) > 1 included; the number of
    steps grows with the condition number κ(I - J), of which about κ log(2/tol)/2 are
    needed, fewer on clustered spectra. With ``ridge`` η > 0 the matrix is
    (I - J)(I - Jᵀ) + ηI: biased by η / (σ² + η) along each singular value σ of I - J.

    The recurrence is the least-squares form (CGLS), which keeps the residual of the
    adjoint equation itself rather than of its square; when it believes to be done the
    true residual is measured, and the iteration restarts on what is left, until the
    true residual meets ``tol``, the budget ends or a restart gains less than half.

    Cost: one VJP and one JVP a step (J from ``jax.linear_transpose``), one of each more
    a restart; memory: six states.

    Attributes:
      max_steps: budget of conjugate-gradient steps over all restarts.
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖; with ``ridge``,
        on that of the damped normal equations, while the report's ``residual`` stays
        the undamped one and so shows the bias. ``None``: three quarters of the digits
        of the coarsest dtype in the state.
      ridge: η. The paper's code has 1e-5; zero is unbiased.

    Raises:
      ValueError: if a field is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = CGNormal(tol=1e-12)(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> bool(jnp.abs(z - jac.T @ z - jnp.array([1.0, 0.0])).max() < 1e-11)
      True

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      section 3.1; CGLS: Björck, "Numerical Methods for Least Squares Problems",
      algorithm 7.4.1. Departures from the paper's code: no ridge by default, a relative
      tolerance, J from automatic differentiation, and the last iterate is kept.
    """

    max_steps: int = 1000
    tol: float | None = None
    ridge: float = 0.0

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "max_steps", self.max_steps, 1)
        if self.tol is not None:
            check_real(self, "tol", self.tol)
        check_real(self, "ridge", self.ridge)

    def __call__(self, vjp: LinearMap, cotangent: PyTree) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        jvp = tree.adjoint(vjp, g)
        ridge = self.ridge

        def apply(z: PyTree) -> PyTree:  # A = I - Jᵀ
            return tree.sub(z, vjp(z))

        def apply_adjoint(r: PyTree, z: PyTree) -> PyTree:  # Aᵀr - ηz
            s = tree.sub(r, jvp(r))
            return tree.axpy(-ridge, z, s) if ridge else s

        def error(r: PyTree, s: PyTree, scale: jax.Array) -> jax.Array:
            """What the tolerance bounds: ‖r‖, or ‖s‖ / ‖Aᵀg‖ with a ridge."""
            return tree.norm(s) / scale if ridge else tree.norm(r)

        s0 = apply_adjoint(g, tree.scale(0.0, g))
        scale = tree.norm(s0)
        scale = jnp.where(scale == 0, 1, scale).astype(scale.dtype)

        def inner(z: PyTree, r: PyTree, k: jax.Array) -> tuple:
            """CGLS from z, whose residual is r."""
            s = apply_adjoint(r, z)

            def unfinished(carry: tuple) -> jax.Array:
                _, r, s, _, gamma, k = carry
                live = (gamma > 0) & jnp.isfinite(gamma)
                return (error(r, s, scale) > tol) & (k < self.max_steps) & live

            def body(carry: tuple) -> tuple:
                z, r, _, p, gamma, k = carry
                q = apply(p)
                curvature = tree.vdot(q, q)
                if ridge:
                    curvature += ridge * tree.vdot(p, p)
                alpha = gamma / jnp.where(curvature == 0, 1, curvature)
                z, r = tree.axpy(alpha, p, z), tree.axpy(-alpha, q, r)
                s = apply_adjoint(r, z)
                gamma, previous = tree.vdot(s, s), gamma
                p = tree.axpy(gamma / previous, p, s)
                return z, r, s, p, gamma, k + 1

            carry = (z, r, s, s, tree.vdot(s, s), k)
            z, _, _, _, _, k = lax.while_loop(unfinished, body, carry)
            return z, k

        def unsolved(carry: tuple) -> jax.Array:
            _, _, k, now, before = carry
            return (now > tol) & (now <= 0.5 * before) & (k < self.max_steps)

        def restart(carry: tuple) -> tuple:
            z_old, r_old, k, now, _ = carry
            z, k = inner(z_old, r_old, k)
            r = tree.sub(g, apply(z))
            new = error(r, apply_adjoint(r, z) if ridge else r, scale)
            better = new < now  # a failed restart keeps what was there
            z, r = tree.where(better, z, z_old), tree.where(better, r, r_old)
            return z, r, k, jnp.where(better, new, now), now

        start = (
            tree.scale(0.0, g),
            g,
            tree.vary_like(jnp.int32(0), g),
            error(g, s0, scale),
            tree.vary_like(jnp.array(jnp.inf, scale.dtype), g),
        )
        z, r, steps, now, _ = lax.while_loop(unsolved, restart, start)
        return Solution(tree.scale(size, z), steps, tree.norm(r), now <= tol)


@strategy
class RBP:
    """Recurrent back-propagation: iterates z ↦ g + Jᵀz to its fixed point.

    This is Almeida and Pineda's original method, algorithm 1 of the paper; with a
    solver other than plain iteration it is any of its accelerations. Exact up to the
    solver's tolerance where that solver converges: plain iteration if and only if
    ρ(J) < 1, with error (Jᵀ)ᴷ(z₀ - z) after K steps.

    From z₀ = g (the default), K steps are ``Neumann(K)``. The paper starts from z₀ ~
    U[0, 1), in the units of the loss and not of g: where g is small, the start is what
    a truncated iteration returns. That is the whole instability of naive RBP.

    Cost: what the solver does on one VJP an evaluation. The solver's own residual is
    relative to ‖z‖; the one reported here is relative to ‖g‖ like all others, measured
    by one more VJP, which the compiler removes when nobody reads it.

    Attributes:
      solver: any forward solver; its tolerance and budget are those of the rule.
      seed: ``None`` to start from g, or the seed of the paper's uniform start. The same
        seed gives the same start in every call, so that gradients are reproducible.

    Raises:
      ValueError: if ``seed`` is not a Python int.

    Example:
      >>> import jax.numpy as jnp
      >>> jac = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
      >>> rule = RBP(FixedPointIteration(tol=1e-12), seed=0)
      >>> z = rule(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> bool(jnp.abs(z - jac.T @ z - jnp.array([1.0, 0.0])).max() < 1e-11)
      True

    References:
      Almeida 1987; Pineda 1987; Liao et al., "Reviving and Improving Recurrent
      Back-Propagation", ICML 2018, algorithm 1, https://arxiv.org/abs/1803.06396.
    """

    solver: ForwardSolver = FixedPointIteration()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
        if not callable(self.solver):
            raise ValueError(
                "RBP: `solver` must be a forward solver, called as solver(step, z0) -> "
                f"Solution; got {self.solver!r}. Try RBP(FixedPointIteration())."
            )
        if self.seed is not None:
            check_count(self, "seed", self.seed, 0)

    def __call__(self, vjp: LinearMap, cotangent: PyTree) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        step: Callable = lambda z: tree.add(g, vjp(z))
        start = g if self.seed is None else _uniform(self.seed, g, size)
        z, steps, _, converged = self.solver(step, start)
        residual = tree.norm(adjoint_defect(vjp, g, z))
        return Solution(tree.scale(size, z), steps, residual, converged)


def _uniform(seed: int, g: PyTree, size: jax.Array) -> PyTree:
    """U[0, 1) in the units of the unscaled cotangent; zero if that is zero."""
    leaves, treedef = jax.tree.flatten(g)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    safe = jnp.where(size == 0, jnp.inf, size)
    draws = [
        (jax.random.uniform(k, x.shape, x.real.dtype) / safe.astype(x.real.dtype))
        for k, x in zip(keys, leaves, strict=True)
    ]
    draws = [u.astype(x.dtype) for u, x in zip(draws, leaves, strict=True)]
    return tree.vary_like(jax.tree.unflatten(treedef, draws), g)
