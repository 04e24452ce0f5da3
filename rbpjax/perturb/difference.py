"""How a directional derivative is measured: a public namespace of differences.

``difference(run, clean)`` estimates the derivative of ``run(amount)`` in the scalar
``amount`` at 0, given ``clean = run(0)``, and returns a pytree like ``clean``. Any
callable with this contract serves.

* ``OneSided(sigma=…)``: one perturbed pass, biased by O(σ) in a single sample;
* ``Central(sigma=…)``: two of them, biased by O(σ²);
* ``Exact()``: a forward derivative, no bias.

Example:
  >>> from rbpjax import perturb
  >>> exact = perturb.difference.Exact()
  >>> float(exact(lambda amount: (3 + amount) ** 2, 9.0))
  6.0
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from rbpjax._core.products import jvp
from rbpjax._core.strategy import real, strategy
from rbpjax.types import PyTree

__all__ = ["Central", "Difference", "Exact", "OneSided", "Run"]

Run = Callable[[jax.typing.ArrayLike], PyTree]
"""A pass with ``amount`` of a perturbation, 0 for none."""

Difference = Callable[[Run, PyTree], PyTree]
"""``difference(run, clean)``: the derivative of ``run`` at 0, a pytree like ``clean``.
"""


@strategy
class OneSided:
    """Compares one perturbed pass with the clean one: (run(σ) - run(0)) / σ.

    With noise symmetric about zero its mean is that of ``Central`` at every σ, with
    more variance where curvature matters. Cost: one forward pass a sample, and the
    clean pass once. In float32 the rounding of the difference grows as 1/σ: 1e-4 is
    near the best.

    Attributes:
      sigma: size of the perturbation, above 0; the limit of 0 is ``Exact()``.

    Raises:
      ValueError: ``sigma`` is no positive Python number.

    Example:
      >>> from rbpjax import perturb
      >>> one_sided = perturb.difference.OneSided(sigma=0.5)
      >>> one_sided(lambda amount: (3 + amount) ** 2, 9.0)  # 2 · 3 + 0.5
      6.5

    References:
      Spall, "Multivariate stochastic approximation using a simultaneous perturbation
      gradient approximation", IEEE Transactions on Automatic Control 37, 1992.
    """

    sigma: float = real(default=1e-4, above=0.0)

    def __call__(self, run: Run, clean: PyTree) -> PyTree:
        """Returns the difference quotient."""
        moved = run(self.sigma)
        return jax.tree.map(lambda a, b: (a - b) / self.sigma, moved, clean)


@strategy
class Central:
    """Compares two perturbed passes: (run(σ) - run(-σ)) / 2σ.

    Exact on quadratic functions. Cost: two forward passes a sample. In float32 σ
    between 3e-4 and 1e-3 is near the best.

    Attributes:
      sigma: size of the perturbation, above 0; the limit of 0 is ``Exact()``.

    Raises:
      ValueError: ``sigma`` is no positive Python number.

    Example:
      >>> from rbpjax import perturb
      >>> central = perturb.difference.Central(sigma=0.5)
      >>> central(lambda amount: (3 + amount) ** 2, 9.0)
      6.0

    References:
      Spall, "Multivariate stochastic approximation using a simultaneous perturbation
      gradient approximation", IEEE Transactions on Automatic Control 37, 1992.
    """

    sigma: float = real(default=1e-3, above=0.0)

    def __call__(self, run: Run, clean: PyTree) -> PyTree:
        """Returns the central difference quotient."""
        del clean
        ahead, behind = run(self.sigma), run(-self.sigma)
        return jax.tree.map(lambda a, b: (a - b) / (2 * self.sigma), ahead, behind)


@strategy
class Exact:
    """The derivative itself, by ``jax.jvp``: no σ, no rounding, no curvature.

    Cost: two to three forward passes a sample. Where a pass holds an ``rbp_solve``, or
    else a backward pass of its own, it is by reverse mode twice. Weight perturbation
    with it is the forward gradient.

    Example:
      >>> from rbpjax import perturb
      >>> exact = perturb.difference.Exact()
      >>> float(exact(lambda amount: (3 + amount) ** 2, 9.0))
      6.0

    References:
      Baydin et al., "Gradients without Backpropagation",
      https://arxiv.org/abs/2202.08587.
    """

    def __call__(self, run: Run, clean: PyTree) -> PyTree:
        """Returns the directional derivative."""
        del clean
        return jvp(run, 0.0, 1.0)[1]
