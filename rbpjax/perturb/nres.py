"""NRES: noise-reuse evolution strategies."""

from __future__ import annotations

import jax

from rbpjax._core.tree import where
from rbpjax.perturb.evolution import Evolution, LossFn, Pairs, persistent
from rbpjax.perturb.noise import Noise, rademacher
from rbpjax.types import PyTree, StepFn


def nres(
    f: StepFn,
    loss: LossFn,
    *,
    num_samples: int = 1,
    axis_name: str | None = None,
    sigma: float | None = None,
    noise: Noise = rademacher,
) -> Evolution:
    """Estimates the gradient of each window of a long unroll by one noise a sequence.

    The noise v of the first window is kept for the whole sequence; later noise is not
    looked at. The gradient of window t, run at θ ± σ v from where the windows before
    have left the two runs, is

        mean over samples of  v (L_t⁺ - L_t⁻) / 2σ.

    It is weight perturbation of the whole unroll, given out window by window. Unbiased
    for the total gradient of L_t up to O(σ²), at every window; with ``noise.normal``
    unbiased at any σ for that of the smoothed loss E L_t(θ + σ v). While the parameters
    change, a bias proportional to the step size appears.

    The variance of a window is (d ± 1) ‖g_t‖², d the number of parameters and g_t the
    gradient (see ``Noise``), and does not grow with the windows before, as that of
    ``pes`` does. Estimates of one sequence share their noise: average over sequences
    (``vmap``), which may stand at different places.

    Cost: 2 ``num_samples`` forward windows; memory ``num_samples`` × (two states, one
    parameter tree, float32 at least). Works under ``jit``, ``vmap`` and ``scan``. AD
    modes: none are needed, nor is its estimate meant to be differentiated.

    Args:
      f: step function ``f(params, inputs, h) -> h``; any pytrees.
      loss: ``loss(params, h, target) -> scalar``, at the state after each step.
      num_samples: K, antithetic pairs to average over.
      axis_name: an axis of the ``shard_map`` around, over which pairs are divided, each
        device taking its share: the estimate is that of one device with all of them
        (see ``Evolution``). None: all samples here.
      sigma: σ; None: that of ``difference.Central``, from the size of ``params`` when
        ``init`` is called. Larger ones smooth a rough loss.
      noise: how directions are drawn: one of ``perturb.noise``, or a callable.

    Returns:
      An ``Evolution``.

    Raises:
      ValueError: an option is not of its kind or range; from its functions, see
        ``Evolution``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> est = perturb.nres(lambda a, x, h: h + a * x, lambda a, h, y: h)
      >>> a, carry = jnp.array(0.5), est.init(jnp.array(0.5), jnp.array(0.0))
      >>> for key in jax.random.split(jax.random.key(0), 3):  # h is a, 2 a, 3 a
      ...     noise = est.noise(key, carry)
      ...     carry, out = est.step(a, carry, jnp.ones(1), None, noise)
      >>> round(float(out.grads), 2)
      3.0

    References:
      Li, Harrison, Sohl-Dickstein, Smith, Metz, "Variance-Reduced Gradient Estimation
      via Noise-Reuse in Online Evolution Strategies", NeurIPS 2023,
      https://arxiv.org/abs/2304.12180: GPES with one noise an episode, K = T.
    """
    pairs = Pairs(
        num_samples=num_samples, axis_name=axis_name, sigma=sigma, noise=noise
    )

    def choose(
        credit: PyTree, started: jax.Array, fresh: PyTree
    ) -> tuple[PyTree, PyTree]:
        kept = where(started, credit, fresh)
        return kept, kept

    return persistent(f, loss, pairs, choose)
