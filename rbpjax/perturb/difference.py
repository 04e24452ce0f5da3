"""How a directional derivative is measured: any callable with this contract.

``difference(run, clean)`` estimates the derivative of ``run(amount)`` in the scalar
``amount`` at 0, given ``clean = run(0)``: a pytree like ``clean``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from rbpjax.types import PyTree, check_real, strategy

Run = Callable[[jax.typing.ArrayLike], PyTree]


@strategy
class OneSided:
    """Compares one perturbed pass with the clean one: (run(σ) - run(0)) / σ.

    With noise symmetric about zero its mean is that of ``Central`` at every σ, with
    more variance where curvature matters. Cost: one forward pass a sample, and the
    clean pass once. In float32 the rounding of the difference grows as 1/σ: 1e-4 is
    near the best.

    Attributes:
      sigma: size of the perturbation.

    Raises:
      ValueError: ``sigma`` is no positive Python number.

    Example:
      >>> difference = OneSided(sigma=0.5)
      >>> difference(lambda s: (3 + s) ** 2, 9.0)  # 2 · 3 + 0.5
      6.5
    """

    sigma: float = 1e-4

    def __post_init__(self):
        _check_sigma(self, self.sigma)

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
      sigma: size of the perturbation.

    Raises:
      ValueError: ``sigma`` is no positive Python number.

    Example:
      >>> difference = Central(sigma=0.5)
      >>> difference(lambda s: (3 + s) ** 2, 9.0)
      6.0
    """

    sigma: float = 1e-3

    def __post_init__(self):
        _check_sigma(self, self.sigma)

    def __call__(self, run: Run, clean: PyTree) -> PyTree:
        """Returns the central difference quotient."""
        del clean
        ahead, behind = run(self.sigma), run(-self.sigma)
        return jax.tree.map(lambda a, b: (a - b) / (2 * self.sigma), ahead, behind)


@strategy
class Exact:
    """The derivative itself, by ``jax.jvp``: no σ, no rounding, no curvature.

    Cost: two to three forward passes a sample; the function must be differentiable in
    forward mode. Weight perturbation with it is the forward gradient.

    Example:
      >>> difference = Exact()
      >>> float(difference(lambda s: (3 + s) ** 2, 9.0))
      6.0
    """

    def __call__(self, run: Run, clean: PyTree) -> PyTree:
        """Returns the directional derivative."""
        del clean
        return jax.jvp(run, (0.0,), (1.0,))[1]


Difference = Callable[[Run, PyTree], PyTree]


def _check_sigma(owner: object, sigma: object) -> None:
    check_real(owner, "sigma", sigma)
    if sigma == 0:
        raise ValueError(
            f"{type(owner).__name__}: `sigma` must be above 0; got {sigma!r}. The "
            "limit of no noise is Exact()."
        )
