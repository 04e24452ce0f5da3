"""Backward rules: solve (I - Jᵀ) z = g.

Every rule is called as ``rule(vjp, cotangent)`` with ``vjp(v)`` = Jᵀv, or with an
earlier adjoint to start from as third argument, and returns a ``Solution`` whose
residual is ‖g + Jᵀz - z‖ / ‖g‖, measured with the returned z. The rules work on g / ‖g‖
and scale the result back, so that tolerances are relative to the cotangent and float32
keeps gradients of any magnitude that it can represent.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax.fixed_point.forward.iteration import FixedPointIteration, next_look, repeat
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


def measured(
    vjp: LinearMap, g: PyTree, size: jax.Array, z: PyTree, steps: jax.Array, tol: float
) -> Solution:
    """The solution for the cotangent ``size * g``, with the residual measured at z.

    One VJP, which the compiler removes when nobody reads the report.
    """
    residual = tree.norm(adjoint_defect(vjp, g, z))
    converged = (residual <= tol) & resolved(z, tol)
    return Solution(tree.scale(size, z), steps, residual, converged)


def resolved(z: PyTree, tol: float | jax.Array) -> jax.Array:
    """Whether the residual of z, for a unit cotangent, means anything.

    Rounding alone leaves an error of ε‖z‖ in it. A singular I - J lets z grow until g
    is lost in that rounding, and the residual, then, looks like zero.
    """
    return tree.coarsest_eps(z) * tree.norm(z) <= tol**0.5


Progress = tuple[PyTree, PyTree, jax.Array, jax.Array]
"""``(z, r, k, error)``: an iterate, its residual, the steps so far, and r's size."""


def begin(vjp: LinearMap, g: PyTree, start: PyTree | None) -> Progress:
    """Where a rule begins: z = 0, or the best multiple of ``start``, by one VJP.

    Best is the least residual ‖g - a (I - Jᵀ) start‖, so that the start's magnitude, in
    the units of an earlier loss, does not matter, and no start is worse than none: one
    that is zero, not finite or at a right angle leaves z = 0. g is of unit norm.
    """
    zero, k = tree.scale(0.0, g), sharding.vary_like(jnp.int32(0), g)
    if start is None:
        return zero, g, k, tree.norm(g)
    unit = tree.to_unit(sharding.typed_like(start, g))[0]
    image = tree.sub(unit, vjp(unit))
    a = ratio(tree.vdot(image, g), tree.vdot(image, image))
    usable = jnp.isfinite(a)
    z = tree.where(usable, tree.scale(a, unit), zero)
    r = tree.where(usable, tree.axpy(-a, image, g), g)
    return z, r, k, tree.norm(r)


def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a / b``, and 0 where b = 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def add_terms(
    product: LinearMap, z: PyTree, r: PyTree, count: int | jax.Array
) -> tuple[PyTree, PyTree]:
    """``z`` plus Σ Bᵏ r over k < ``count``, and the term after these, B^count r.

    ``product`` is v ↦ Bv. By Horner's scheme, y ← B (r + y): one state to carry, its
    sum fused into the product, where terms added one by one take a pass over the sum
    and a copy more. The term is the last difference of two y, so that its rounding
    errors are those of this sum, not of z: where more is to come, they are corrected.
    """
    zero = tree.scale(0.0, r)
    y = repeat(lambda y: product(tree.add(r, y)), count - 1, zero)
    total = tree.add(r, y)
    return tree.add(z, total), tree.sub(product(total), y)


@strategy
class Neumann:
    """The truncated Neumann series z_K = Σ_{k ≤ K} (Jᵀ)ᵏ g.

    Truncated, hence biased: z - z_K = (Jᵀ)^{K+1} z. The series converges if and only if
    ρ(J) < 1, at rate ρ(J). K = 0 is the one-step ("Jacobian-free") gradient; at the
    fixed point, K = RBP's K steps from g = TBPTT with K + 1 transitions.

    With ``damping`` 1 - ω it is Richardson's iteration, z_K = ω Σ_{k ≤ K} Bᵏ g with
    B = ωJᵀ + (1 - ω)I: the same limit, reached for a small enough ω wherever all
    eigenvalues of J have real parts below 1, ρ(J) > 1 included. ``Neumann(k - 1,
    damping=1 - τ)`` is the phantom gradient (Neumann form) of k steps and factor τ.

    Cost: one VJP a step; memory: three states. With ``tol`` there is one VJP more, as
    the residual of z_K is the next term of the series; the report measures it anew.

    Attributes:
      steps: K, an exact number of steps, or ``None``: as many as ``tol`` takes.
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖. ``None``: three
        quarters of the digits of the coarsest dtype in the state.
      max_steps: budget of steps when there is a tolerance.
      damping: 1 - ω, in [0, 1).
      check_every: test the tolerance after every so many steps. ``None``: rarely while
        it is far away, as in ``FixedPointIteration``.

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
      algorithm 2, https://arxiv.org/abs/1803.06396. Geng et al., "On Training Implicit
      Models", 2021, https://arxiv.org/abs/2111.05177 (phantom gradients).
    """

    steps: int | None = None
    tol: float | None = None
    max_steps: int = 1000
    damping: float = 0.0
    check_every: int | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_real(self, "damping", self.damping, below=1.0)
        if self.check_every is not None:
            check_count(self, "check_every", self.check_every, 1)
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

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        tol = tree.default_tol(g) if self.tol is None else self.tol
        omega = 1.0 - self.damping
        z0, r0, k0, error = begin(vjp, g, start)

        def product(r: PyTree) -> PyTree:
            """With damping, B = ωJᵀ + (1 - ω)I; residuals are then multiplied by B."""
            if self.damping == 0.0:
                return vjp(r)
            return tree.axpy(omega, tree.sub(vjp(r), r), r)

        def finish(total: PyTree, steps: jax.Array) -> Solution:
            z = total if self.damping == 0.0 else tree.scale(omega, total)
            z = z if start is None else tree.add(z0, z)
            return measured(vjp, g, size, z, steps, tol)

        zero = tree.scale(0.0, g)
        if self.steps is not None:
            # K powers are K + 1 terms, the last of which is a product with the sum of
            # those before it; the compiler drops the product for a next one.
            total, _ = add_terms(product, zero, r0, self.steps + 1)
            return finish(total, sharding.vary_like(jnp.int32(self.steps), g))

        # Half of the tolerance is left to rounding: the report measures the residual of
        # the sum, which is larger than its last term.
        eps = float(jnp.finfo(tree.real_dtype(g)).eps)

        def unfinished(carry: tuple) -> jax.Array:
            _, _, k, residual, best, _ = carry
            sane = residual <= best * eps**-0.5  # False for NaN
            return (residual > tol / 2) & (k <= self.max_steps) & sane

        def body(carry: tuple) -> tuple:
            z, r, k, before, best, ahead = carry
            ahead = ahead if self.check_every is None else self.check_every
            z, r = add_terms(product, z, r, ahead)
            k, residual = k + ahead, tree.norm(r)
            after = next_look(self.check_every, k, ahead, residual, before, tol / 2)
            after = jnp.minimum(after, self.max_steps + 1 - k)
            return z, r, k, residual, jnp.minimum(best, residual), after

        carry = (zero, r0, k0, error, error, k0 + 1)
        total, _, k, _, _, _ = lax.while_loop(unfinished, body, carry)
        return finish(total, jnp.maximum(k - 1, 0))  # k terms: powers 0 … k - 1


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

    Cost: what the solver does on one VJP an evaluation. The solver's own residual, and
    so its tolerance, is relative to ‖z‖; the one reported here is relative to ‖g‖ like
    all others, measured by one more VJP, which the compiler removes when nobody reads
    it. Converged is what both call so: the latter within the root of the former.

    Attributes:
      solver: any forward solver; its tolerance and budget are those of the rule.
      seed: ``None`` to start from g, or the seed of the paper's uniform start. The same
        seed gives the same start in every call, so that gradients are reproducible. An
        adjoint to start from, as of a probe, replaces either.

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

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        g, size = tree.to_unit(cotangent)
        step: Callable = lambda z: tree.add(g, vjp(z))
        if start is not None:
            z0 = begin(vjp, g, start)[0]
        else:
            z0 = g if self.seed is None else _uniform(self.seed, g, size)
        z, steps, relative, converged = self.solver(step, z0)
        residual = tree.norm(adjoint_defect(vjp, g, z))
        # The solver's tolerance is its own affair, and unknown here. But a start that
        # dwarfs g can be left with little of ‖z‖ and much of ‖g‖.
        eps = tree.coarsest_eps(g)
        small = residual <= jnp.sqrt(jnp.maximum(relative, eps)).astype(residual.dtype)
        converged = converged & small & resolved(z, tree.default_tol(g))
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
    return sharding.typed_like(jax.tree.unflatten(treedef, draws), g)
