"""Truncated evolution strategies: the biased baseline of ``pes`` and ``nres``."""

from __future__ import annotations

from rbpjax.perturb.evolution import Evolution, LossFn, Pairs, restarted
from rbpjax.perturb.noise import Noise, rademacher
from rbpjax.types import StepFn


def truncated_es(
    f: StepFn,
    loss: LossFn,
    *,
    num_samples: int = 1,
    axis_name: str | None = None,
    sigma: float | None = None,
    noise: Noise = rademacher,
) -> Evolution:
    """Estimates the gradient of each window as if its first state were a constant.

    All perturbed runs of a window start from one state, which the parameters θ
    themselves move on:

        mean over samples of  v (L_t⁺ - L_t⁻) / 2σ.

    Truncated (biased): its mean, up to O(σ²), is the gradient of truncated BPTT. What a
    parameter does beyond the end of a window is not seen, and the sign of the gradient
    may be wrong. The variance is (d ± 1) times the square of that gradient, d the
    number of parameters.

    Cost: 2 ``num_samples`` + 1 forward windows; memory one state, and ``num_samples`` ×
    (two states, one parameter tree, float32 at least) in a step. Works under ``jit``,
    ``vmap`` and ``scan``. AD modes: none are needed, nor is its estimate meant to be
    differentiated.

    Args:
      f: step function ``f(params, inputs, h) -> h``; any pytrees.
      loss: ``loss(params, h, target) -> scalar``, at the state after each step.
      num_samples: K, antithetic pairs to average over.
      axis_name: an axis of the ``shard_map`` around, over which pairs are divided, each
        device taking its share: the estimate is that of one device with all of them
        (see ``Evolution``). None: all samples here.
      sigma: σ; None: that of ``difference.Central``, from the size of ``params`` when
        ``init`` is called.
      noise: how directions are drawn: one of ``perturb.noise``, or a callable.

    Returns:
      An ``Evolution``.

    Raises:
      ValueError: an option is not of its kind or range; from its functions, see
        ``Evolution``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> est = perturb.truncated_es(lambda a, x, h: h + a * x, lambda a, h, y: h)
      >>> a, carry = jnp.array(0.5), est.init(jnp.array(0.5), jnp.array(0.0))
      >>> for key in jax.random.split(jax.random.key(0), 3):  # h is a, 2 a, 3 a
      ...     noise = est.noise(key, carry)
      ...     carry, out = est.step(a, carry, jnp.ones(1), None, noise)
      >>> round(float(out.grads), 2)  # blind to the first two windows
      1.0

    References:
      The baseline of Vicol, Metz, Sohl-Dickstein, "Unbiased Gradient Estimation in
      Unrolled Computation Graphs with Persistent Evolution Strategies", ICML 2021,
      https://arxiv.org/abs/2112.13835, Algorithm 1.
    """
    pairs = Pairs(
        num_samples=num_samples, axis_name=axis_name, sigma=sigma, noise=noise
    )
    return restarted(f, loss, pairs)
