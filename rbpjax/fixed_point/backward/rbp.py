"""Recurrent back-propagation: the adjoint as a fixed point, by any forward solver."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.strategy import count, function, strategy
from rbpjax.fixed_point.backward.rule import System
from rbpjax.fixed_point.contract import apply_solver
from rbpjax.fixed_point.forward.iteration import FixedPointIteration
from rbpjax.fixed_point.iterate import status_of
from rbpjax.types import ForwardSolver, LinearMap, PyTree, Solution, Status


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
    Memory: that of the solver and two states. AD modes: none of its own.

    Attributes:
      solver: any forward solver; its tolerance and budget are those of the rule.
      seed: ``None`` to start from g, or the seed of the paper's uniform start. The same
        seed gives the same start in every call, so that gradients are reproducible. An
        adjoint to start from, as of a probe, replaces either.

    Raises:
      ValueError: if ``solver`` cannot be called, or ``seed`` is no Python int.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import RBP, FixedPointIteration
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> jac = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
      >>> rule = RBP(FixedPointIteration(max_steps=200), seed=0)
      >>> z = rule(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> print(z)
      [0.8 0.4]

    References:
      Almeida 1987; Pineda 1987; Liao et al., "Reviving and Improving Recurrent
      Back-Propagation", ICML 2018, algorithm 1, https://arxiv.org/abs/1803.06396.
    """

    solver: ForwardSolver = function(
        default=FixedPointIteration(),
        meaning="a forward solver, such as FixedPointIteration()",
        call="solver(step, z0) -> Solution",
        kw_only=False,
    )
    seed: int | None = count(default=None, minimum=0)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        system = System.of(vjp, cotangent, None, scaled=False)
        g, begin = system.g, system.begin(start)
        if start is None:
            z0 = g if self.seed is None else _uniform(self.seed, g, system.size)
        else:
            z0 = begin.z
        found = self._from(lambda z: tree.add(g, vjp(z)), z0)
        products = begin.num_products + found.num_products
        end = begin._replace(
            z=found.value, num_steps=found.num_steps, num_products=products
        )
        if getattr(self.solver, "steps", None) is not None:
            # What the solver evaluates for its own verdict is not read, nor computed.
            products = begin.num_products + found.num_steps
            return system.truncated(end._replace(num_products=products))
        solution = system.measured(end, 0, jnp.array(False))
        # The solver's tolerance is its own affair, and unknown here: what it calls
        # converged is, if the residual relative to ‖g‖ is within the root of its own.
        # A start that dwarfs g can be left with little of ‖z‖ and much of ‖g‖.
        residual, eps = solution.residual, tree.coarsest_eps(g)
        own = jnp.sqrt(jnp.maximum(found.residual, eps)).astype(residual.dtype)
        judged = status_of(residual, own, False)
        status = jnp.where(found.converged, judged, found.status)
        finite = solution.status != Status.NOT_FINITE
        status = jnp.where(finite, status, jnp.int32(Status.NOT_FINITE))
        return solution._replace(status=status, converged=status == Status.CONVERGED)

    def _from(self, step: LinearMap, z0: PyTree) -> Solution:
        """The solver's z, from a start that may be many times larger.

        Beside such a start z is nothing, and a solver comes to rest before it has it:
        while z comes out far smaller than the start, it is the next one.
        """
        found = apply_solver(self.solver, step, z0)
        if self.seed is None or getattr(self.solver, "steps", None) is not None:
            return found

        def dwarfed(passes: tuple[Solution, jax.Array]) -> jax.Array:
            found, start = passes
            return found.converged & (tree.to_unit(found.value)[1] < FAR * start)

        def again(passes: tuple[Solution, jax.Array]) -> tuple[Solution, jax.Array]:
            before, _ = passes
            now = apply_solver(self.solver, step, before.value)
            now = now._replace(
                num_steps=before.num_steps + now.num_steps,
                num_products=before.num_products + now.num_products,
            )
            return now, tree.to_unit(before.value)[1]

        return lax.while_loop(dwarfed, again, (found, tree.to_unit(z0)[1]))[0]


FAR = 1e-3
"""Of its start, a size of z from which the solver goes on from it."""


def _uniform(seed: int, g: PyTree, size: jax.Array) -> PyTree:
    """U[0, 1) in the units of the unscaled cotangent; zero if that is zero."""
    leaves, treedef = jax.tree.flatten(g)
    key = sharding.own_key(jax.random.key(seed))
    keys = jax.random.split(key, len(leaves))
    safe = jnp.where(size == 0, jnp.inf, size)
    draws = [
        (jax.random.uniform(k, x.shape, x.real.dtype) / safe.astype(x.real.dtype))
        for k, x in zip(keys, leaves, strict=True)
    ]
    draws = [u.astype(x.dtype) for u, x in zip(draws, leaves, strict=True)]
    return sharding.typed_like(jax.tree.unflatten(treedef, draws), g)
