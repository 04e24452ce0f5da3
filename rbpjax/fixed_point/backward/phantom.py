"""The phantom gradient in its Neumann form: some steps of a damped series."""

from __future__ import annotations

import jax

from rbpjax._core.strategy import budget, real, strategy
from rbpjax.fixed_point.backward.neumann import Neumann
from rbpjax.types import LinearMap, PyTree, Solution


@strategy
class Phantom:
    """The phantom gradient (Neumann form) of k steps, with τ = 1 - damping.

    With all steps taken at the very h* that the forward solver returned,

        z = τ Σ_{t < k} Bᵗ g,   B = τJᵀ + (1 - τ) I:

    the gradient of k damped steps h ← τ f(h) + (1 - τ) h from h* as a constant.
    Truncated, hence biased: what is left is Bᵏ (I - Jᵀ)⁻¹ g, which falls with k where
    all eigenvalues of J have real parts below 1 and τ is small enough, ρ(J) > 1
    included. It is ``Neumann(steps=k - 1, damping=1 - τ)`` by its name; k = 1 and τ = 1
    is ``JFB()``. In the unrolled form the steps really move: ``unrolled_phantom``.

    Cost: k - 1 VJPs; memory: three states.

    Attributes:
      steps: k.
      damping: 1 - τ, in [0, 1).

    Raises:
      ValueError: if an option is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import Phantom, rbp_solve
      >>> def grad(k):
      ...     rule = Phantom(steps=k, damping=0.5)
      ...     solve = rbp_solve(lambda a, x, h: a * h + x, backward=rule)
      ...     return jax.grad(lambda a: solve(a, 3.0, 0.0).value)(-2.0)
      >>> [round(float(grad(k)), 3) for k in (1, 2, 30)]  # h* / (1 - a) = 1/3
      [0.5, 0.25, 0.333]

    References:
      Geng et al., "On Training Implicit Models", NeurIPS 2021, section 3.2 (the
      Neumann-series-based phantom gradient), https://arxiv.org/abs/2111.05177.
    """

    steps: int | jax.Array = budget(default=5)
    damping: float = real(default=0.5, below=1.0)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Adds k terms of the damped series, to the start if there is one."""
        series = Neumann(steps=self.steps - 1, damping=self.damping)
        return series(vjp, cotangent, start=start)
