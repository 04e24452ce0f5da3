"""Bounds on the error of a gradient, from what is known of ‖J‖."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def neumann_error_bound(steps: ArrayLike, norm: ArrayLike) -> jax.Array:
    """The tail of the Neumann series: a bound on ‖z - z_K‖ / ‖g‖ before it is run.

    z - z_K = Σ_{k > K} (Jᵀ)ᵏ g, so that with ‖J‖ ≤ μ < 1

        ‖z - z_K‖ ≤ μ^{K+1} / (1 - μ) ‖g‖.

    The bound is rigorous for any upper bound μ of ‖J‖; ``jacobian_norm`` estimates ‖J‖
    from below. It is met, in the limit of large K, by a symmetric J; for others the
    rate is ρ(J) < ‖J‖, and ``diagnose`` predicts steps from the decay it sees.

    Cost: none; elementwise in both arguments, differentiable in ``norm``.

    Args:
      steps: K, the number of steps of ``Neumann``, 0 for the one-step gradient.
      norm: μ, an upper bound of ‖J‖₂.

    Returns:
      An array of the broadcast shape; infinite where ``norm`` is 1 or more.

    Example:
      >>> [round(float(neumann_error_bound(steps, 0.5)), 6) for steps in (0, 1, 9)]
      [1.0, 0.5, 0.001953]

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      section 3.2, https://arxiv.org/abs/1803.06396.
    """
    norm = jnp.asarray(norm)
    return gradient_error_bound(norm ** (jnp.asarray(steps) + 1), norm)


def gradient_error_bound(
    residual: ArrayLike, norm: ArrayLike, drive: ArrayLike = 1.0
) -> jax.Array:
    """A bound on the error of a gradient from the residual in its report.

    With the residual vector r = g + Jᵀz' - z' of an approximate adjoint z', the error
    obeys (I - Jᵀ)(z - z') = r. Where ‖J‖ ≤ μ < 1,

        ‖(∂f/∂θ)ᵀ(z - z')‖ / ‖g‖ ≤ ‖∂f/∂θ‖ · (‖r‖ / ‖g‖) / (1 - μ).

    A bound after the fact, whatever rule made z': no rule and no dtype need be
    trusted, only the residual, which rules measure on the z' that they return, and μ.
    Rigorous for an upper bound μ of ‖J‖, such as the target of ``spectral_normalize``
    times the Lipschitz constant of the nonlinearity; an estimate with
    ``jacobian_norm``, which approaches ‖J‖ from below.

    Cost: none; elementwise in its arguments.

    Args:
      residual: ‖g + Jᵀz' - z'‖ / ‖g‖, such as ``report.residual``.
      norm: μ, an upper bound of ‖J‖₂.
      drive: ‖∂f/∂θ‖₂, an upper bound of it; 1 for the adjoint z itself, and so for
        the gradient with respect to an input that f adds.

    Returns:
      An array of the broadcast shape, in units of ‖g‖ (``report.cotangent_norm``);
      infinite where ``norm`` is 1 or more.

    Example:
      >>> round(float(gradient_error_bound(residual=1e-6, norm=0.75)), 9)
      4e-06
    """
    norm, residual, drive = map(jnp.asarray, (norm, residual, drive))
    contracts = norm < 1  # False for NaN
    gap = jnp.where(contracts, 1 - norm, 1)
    return jnp.where(contracts, drive * residual / gap, jnp.inf)
