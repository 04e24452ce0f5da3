"""The error of a gradient: residuals, the one-step gradient's, and bounds by ‖J‖."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from rbpjax._core import sharding, tree
from rbpjax._core.convolution import channels_last
from rbpjax._core.step import close
from rbpjax.diagnostics.spectrum import linearized
from rbpjax.types import LinearMap, PyTree, StepFn


def adjoint_residual(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    cotangent: PyTree,
    z: PyTree,
) -> jax.Array:
    """‖g + Jᵀz - z‖ / ‖g‖: how far z is from the adjoint, whoever computed it.

    Cost: one VJP of f.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the fixed point.
      cotangent: g, a pytree like h.
      z: the candidate adjoint, a pytree like h.

    Returns:
      A scalar; ‖z - Jᵀz‖ itself where g = 0.

    Raises:
      ValueError: if f changes the state.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.diagnostics import adjoint_residual
      >>> f = lambda a, x, h: a * h + x  # z = g / (1 - a)
      >>> one = jnp.ones(1)
      >>> float(adjoint_residual(f, 0.5 * one, one, one, one, 2 * one))
      0.0

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      equation 9, https://arxiv.org/abs/1803.06396.
    """
    step, args, h = close(f, params, inputs, h)
    _, vjp = jax.vjp(partial(step, args), h)
    defect = tree.sub(tree.add(cotangent, vjp(z)[0]), z)
    with sharding.summed(vjp, h):
        size = tree.to_unit(cotangent)[1]
        return tree.to_unit(defect)[1] / jnp.where(size == 0, 1, size)


def loop_cut_error(
    key: jax.Array,
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    *,
    num_probes: int = 8,
) -> jax.Array:
    """How wrong the one-step gradient is: ‖Jᵀg‖ / ‖g‖, over random cotangents g.

    Cutting the loop takes z = g (``Neumann(0)``, the "Jacobian-free" gradient), and
    Jᵀg is what that leaves of the adjoint equation: its relative residual, for one
    VJP. For the cotangent of your own loss it is
    ``adjoint_residual(f, params, inputs, h, g, g)``.

    The root mean square over random directions, an unbiased estimate of ‖J‖_F² / n
    under the root, n being the number of entries of the state.

    Cost: ``num_probes`` VJPs of f, one after the other; memory: two states.

    Args:
      key: PRNG key of the cotangents.
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the fixed point.
      num_probes: number of cotangents, at least 1.

    Returns:
      A scalar.

    Raises:
      ValueError: if ``num_probes`` is below 1, or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.diagnostics import loop_cut_error
      >>> w = 0.9 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> f = lambda w, x, h: w @ h + x
      >>> key = jax.random.key(0)
      >>> round(float(loop_cut_error(key, f, w, jnp.ones(2), jnp.zeros(2))), 3)
      0.9

    References:
      https://github.com/pasteurlabs/tesseract-jax/issues/247 (cutting the loop);
      Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
    """
    if num_probes < 1:
        raise ValueError(f"`num_probes` must be at least 1; got {num_probes}.")
    _, jvp, h = linearized(f, params, inputs, h)
    vjp = channels_last(tree.adjoint(jvp, h), h)
    with sharding.summed(jvp, h):
        return loop_cut(vjp, h, key, num_probes)


def loop_cut(vjp: LinearMap, h: PyTree, key: jax.Array, num_probes: int) -> jax.Array:
    """The root mean square of ‖Jᵀg‖ over random unit g."""
    probe = lambda key: tree.norm(vjp(tree.random_unit(key, h)))
    errors = lax.map(probe, jax.random.split(key, num_probes))
    return jnp.sqrt(jnp.mean(errors**2))


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
      >>> from rbpjax.diagnostics import neumann_error_bound
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
      >>> from rbpjax.diagnostics import gradient_error_bound
      >>> round(float(gradient_error_bound(residual=1e-6, norm=0.75)), 9)
      4e-06

    References:
      The Banach perturbation lemma: Golub and Van Loan, "Matrix Computations", 4th
      edition, section 2.3.4.
    """
    norm, residual, drive = map(jnp.asarray, (norm, residual, drive))
    contracts = norm < 1  # False for NaN
    gap = jnp.where(contracts, 1 - norm, 1)
    return jnp.where(contracts, drive * residual / gap, jnp.inf)
