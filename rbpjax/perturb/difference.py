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
import jax.numpy as jnp

from rbpjax._core.norm import norm
from rbpjax._core.products import jvp
from rbpjax._core.strategy import real, strategy
from rbpjax._core.tree import coarsest_eps, real_dtype
from rbpjax.perturb.samples import check_result
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
    clean pass once. The rounding of the difference grows as 1/σ, its curvature as σ: by
    default σ is 0.3 √ε for the machine ε of what is perturbed (1e-4 in float32, 0.03 in
    bfloat16), times its size, the largest root mean square of a leaf (1 if all is 0).

    A σ of your own is taken as it is; below ε times that size it would be lost in
    rounding, and the result is NaN.

    Attributes:
      sigma: size of the perturbation, above 0, or None for the default; the limit of 0
        is ``Exact()``.

    Raises:
      ValueError: ``sigma`` is neither None nor a positive Python number.

    Example:
      >>> from rbpjax import perturb
      >>> one_sided = perturb.difference.OneSided(sigma=0.5)
      >>> one_sided(lambda amount: (3 + amount) ** 2, 9.0)  # 2 · 3 + 0.5
      6.5

    References:
      Spall, "Multivariate stochastic approximation using a simultaneous perturbation
      gradient approximation", IEEE Transactions on Automatic Control 37, 1992.
    """

    sigma: float | None = real(default=None, above=0.0)

    def __call__(self, run: Run, clean: PyTree) -> PyTree:
        """Returns the difference quotient; the default σ is that for size 1."""
        sigma = self.sigma or 0.3 * coarsest_eps(_arrays(clean)) ** 0.5
        return quotient(run(sigma), clean, sigma)

    def at(self, size: jax.Array, eps: float) -> Difference:
        """The same for what has this size and machine ε."""
        sigma = _visible(self.sigma or 0.3 * eps**0.5 * size, size, eps)
        return lambda run, clean: quotient(run(sigma), clean, sigma)


@strategy
class Central:
    """Compares two perturbed passes: (run(σ) - run(-σ)) / 2σ.

    Exact on quadratic functions. Cost: two forward passes a sample. By default σ is
    0.2 ε^⅓ times the size of what is perturbed (1e-3 in float32), as in ``OneSided``;
    so is what is said there about a σ of your own.

    Attributes:
      sigma: size of the perturbation, above 0, or None for the default; the limit of 0
        is ``Exact()``.

    Raises:
      ValueError: ``sigma`` is neither None nor a positive Python number.

    Example:
      >>> from rbpjax import perturb
      >>> central = perturb.difference.Central(sigma=0.5)
      >>> central(lambda amount: (3 + amount) ** 2, 9.0)
      6.0

    References:
      Spall, "Multivariate stochastic approximation using a simultaneous perturbation
      gradient approximation", IEEE Transactions on Automatic Control 37, 1992.
    """

    sigma: float | None = real(default=None, above=0.0)

    def __call__(self, run: Run, clean: PyTree) -> PyTree:
        """Returns the central difference quotient; the default σ is that for size 1."""
        sigma = self.sigma or 0.2 * coarsest_eps(_arrays(clean)) ** (1 / 3)
        return quotient(run(sigma), run(-sigma), 2 * sigma)

    def at(self, size: jax.Array, eps: float) -> Difference:
        """The same for what has this size and machine ε."""
        sigma = _visible(self.sigma or 0.2 * eps ** (1 / 3) * size, size, eps)
        return lambda run, clean: quotient(run(sigma), run(-sigma), 2 * sigma)

    def width(self, tree: PyTree) -> jax.Array:
        """σ for perturbations of ``tree``; NaN where it would be lost in rounding."""
        size, eps = extent(tree)
        sigma = self.sigma or 0.2 * eps ** (1 / 3) * size
        return _visible(jnp.asarray(sigma, size.dtype), size, eps)


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


def sized(difference: Difference, tree: PyTree) -> Difference:
    """``difference`` for perturbations of ``tree``, if it asks how large that is."""
    at = getattr(difference, "at", None)
    return difference if at is None else at(*extent(tree))


def extent(tree: PyTree) -> tuple[jax.Array, float]:
    """The largest root mean square of a leaf, 1 if all is 0, and the machine ε."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
    dtype = real_dtype(leaves)
    sizes = [norm(leaf).astype(dtype) / leaf.size**0.5 for leaf in leaves]
    size = jnp.max(jnp.stack(sizes))
    return jnp.where(size == 0, 1, size), coarsest_eps(tree)


def slopes(difference: Difference, run: Run, clean: PyTree) -> PyTree:
    """``difference(run, clean)``; ValueError unless it is like ``clean``."""
    made = difference(run, clean)
    check_result(made, clean, "difference(run, clean)")
    return made


def _visible(sigma: jax.typing.ArrayLike, size: jax.Array, eps: float) -> jax.Array:
    """σ, or nan where it is lost in the rounding of what it is added to."""
    return jnp.where(sigma >= eps * size, sigma, jnp.nan)


def quotient(ahead: PyTree, behind: PyTree, by: jax.typing.ArrayLike) -> PyTree:
    """``(ahead - behind) / by`` in the dtypes of ``ahead``, leaf by leaf."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        if not hasattr(a, "dtype"):
            return (a - b) / by
        wide = real_dtype(a)
        return ((a - b).astype(wide) / jnp.asarray(by).astype(wide)).astype(a.dtype)

    return jax.tree.map(leaf, ahead, behind)


def _arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)
