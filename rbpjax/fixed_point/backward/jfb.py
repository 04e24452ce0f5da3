"""The Jacobian-free, or one-step, gradient."""

from __future__ import annotations

from rbpjax._core.strategy import strategy
from rbpjax.fixed_point.backward.neumann import Neumann
from rbpjax.types import LinearMap, PyTree, Solution


@strategy
class JFB:
    """Jacobian-free back-propagation: z = g, the gradient of one step from h*.

    Truncated, hence biased: (I - Jᵀ)⁻¹ is replaced by I, and z - g = Jᵀz. For a small
    enough ‖J‖ it is a direction of descent. It is ``Neumann(steps=0)`` by its name, and
    what ``bptt(f, T, truncation=1)`` gives at the fixed point.

    Cost: no product; the report takes one, to say how far g is from the adjoint.
    Memory: one state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import JFB, rbp_solve
      >>> solve = rbp_solve(lambda a, x, h: a * h + x, backward=JFB())
      >>> grad = jax.grad(lambda a: solve(a, 1.0, 0.0).value)(0.5)
      >>> round(float(grad), 3)  # h*, where h* / (1 - a) = 4 is right
      2.0

    References:
      Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", AAAI
      2022, equation 12, https://arxiv.org/abs/2103.12803.
    """

    steps = 0  # no option: by it a truncated rule is known

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Returns g; or, beside a start, one term more than it."""
        return Neumann(steps=self.steps)(vjp, cotangent, start=start)
