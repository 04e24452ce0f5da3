"""The Neumann series, truncated after K terms or at a tolerance."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.strategy import budget, count, real, strategy, tolerance
from rbpjax.fixed_point.backward.rule import Progress, System, add_terms
from rbpjax.fixed_point.iterate import next_look
from rbpjax.types import LinearMap, PyTree, Solution


@strategy
class Neumann:
    """The truncated Neumann series z_K = Σ_{k ≤ K} (Jᵀ)ᵏ g.

    Truncated, hence biased: z - z_K = (Jᵀ)^{K+1} z. The series converges if and only if
    ρ(J) < 1, at rate ρ(J). K = 0 is the one-step gradient (``JFB``); at the
    fixed point, K = RBP's K steps from g = TBPTT with K + 1 transitions.

    With ``damping`` 1 - ω it is Richardson's iteration, z_K = ω Σ_{k ≤ K} Bᵏ g with
    B = ωJᵀ + (1 - ω)I: the same limit, reached for a small enough ω wherever all
    eigenvalues of J have real parts below 1, ρ(J) > 1 included: the phantom
    gradient of a fixed number of steps (``Phantom``).

    Cost: one VJP a step; memory: three states. With ``tol`` there is one VJP more, as
    the residual of z_K is the next term of the series; the report measures it anew.

    Attributes:
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖, in [0, 1).
        ``None``: three quarters of the digits of the coarsest dtype in the state.
      max_steps: budget of steps when there is a tolerance.
      steps: K, an exact number of steps, or ``None``: as many as ``tol`` takes.
      damping: 1 - ω, in [0, 1).
      check_every: test the tolerance after every so many steps. ``None``: rarely while
        it is far away, as in ``FixedPointIteration``.

    Raises:
      ValueError: if an option is out of its range, or both ``steps`` and ``tol`` given.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import Neumann
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> jac = jnp.array([[0.0, 0.5], [-0.5, 0.0]])
      >>> z = Neumann()(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> print(z)
      [0.8 0.4]

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      algorithm 2, https://arxiv.org/abs/1803.06396. Geng et al., "On Training Implicit
      Models", 2021, https://arxiv.org/abs/2111.05177 (phantom gradients).
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=1000)
    steps: int | jax.Array | None = budget(default=None, minimum=0, excludes="tol")
    damping: float = real(default=0.0, below=1.0)
    check_every: int | None = count(default=None)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        system = System.of(vjp, cotangent, self.tol, scaled=self.steps is None)
        begin = system.begin(start)
        omega = 1.0 - self.damping

        def product(r: PyTree) -> PyTree:
            """With damping, B = ωJᵀ + (1 - ω)I; residuals are then multiplied by B."""
            if self.damping == 0.0:
                return system.vjp(r)
            return tree.axpy(omega, tree.sub(system.vjp(r), r), r)

        def finish(total: PyTree, steps: jax.Array, products: jax.Array) -> Progress:
            z = total if self.damping == 0.0 else tree.scale(omega, total)
            cold = start is None and system.head is None
            z = z if cold else tree.add(begin.z, z)
            products = begin.num_products + products - begin.num_steps
            return begin._replace(z=z, num_steps=steps, num_products=products)

        zero, budget, tol = tree.scale(0.0, system.g), self.max_steps, system.tol
        if self.steps is not None:
            # K powers are K + 1 terms, the last of which is a product with the sum of
            # those before it; the compiler drops the product for a next one.
            total, _ = add_terms(product, zero, begin.r, self.steps + 1)
            steps = sharding.vary_like(jnp.int32(self.steps), system.g)
            return system.truncated(finish(total, steps, steps))

        # Half of the tolerance is left to rounding: the report measures the residual of
        # the sum, which is larger than its last term.
        eps = float(jnp.finfo(tree.real_dtype(system.g)).eps)

        def unfinished(now: _State) -> jax.Array:
            sane = now.error <= now.best * eps**-0.5  # False for NaN
            return (now.error > tol / 2) & (now.k <= budget) & sane

        def body(now: _State) -> _State:
            ahead = now.ahead if self.check_every is None else self.check_every
            z, r = add_terms(product, now.z, now.r, ahead)
            k, error = now.k + ahead, tree.norm(r)
            after = next_look(self.check_every, k, ahead, error, now.error, tol / 2)
            after = jnp.minimum(after, budget + 1 - k)
            return _State(z, r, k, error, jnp.minimum(now.best, error), after)

        k, error = begin.num_steps, begin.error
        first = _State(zero, begin.r, k, error, error, k + 1)
        end = lax.while_loop(unfinished, body, first)
        # k terms are the powers 0 … k - 1; the term after them took one product more.
        done = finish(end.z, jnp.maximum(end.k - 1, 0), end.k)
        return system.measured(done, budget, end.error <= tol / 2)


class _State(NamedTuple):
    """What the loop carries.

    The sum, the next term, the terms so far, the norms of the next term and of the
    smallest one, and the terms to the next look.
    """

    z: PyTree
    r: PyTree
    k: jax.Array
    error: jax.Array
    best: jax.Array
    ahead: jax.Array
