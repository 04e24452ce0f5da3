"""PES: persistent evolution strategies."""

from __future__ import annotations

import jax

from rbpjax._core.tree import add
from rbpjax.perturb.evolution import Evolution, LossFn, Pairs, persistent
from rbpjax.perturb.noise import Noise, rademacher
from rbpjax.types import PyTree, StepFn


def pes(
    f: StepFn,
    loss: LossFn,
    *,
    num_samples: int = 1,
    axis_name: str | None = None,
    sigma: float | None = None,
    noise: Noise = rademacher,
) -> Evolution:
    """Estimates the gradient of each window of a long unroll by fresh noise a window.

    Window t runs at θ ± σ v_t, from the states that the windows before, at θ ± σ v_1 …
    θ ± σ v_{t-1}, have left. Its gradient is

        mean over samples of  (v_1 + … + v_t) (L_t⁺ - L_t⁻) / 2σ:

    a loss is credited to all perturbations of its sequence, and so reaches back to the
    beginning, though only one window is run at a time. Unbiased for the total gradient
    of L_t up to O(σ²), at every window; with ``noise.normal`` unbiased at any σ for
    that of the smoothed loss E L_t(θ + σ v_1, …, θ + σ v_t). Where states are linear in
    θ and the loss is quadratic, both are the gradient itself. While the parameters
    change, a bias proportional to the step size appears.

    Where the loss of window t is linear, with gradient g = g_1 + … + g_t in d
    parameters (g_τ through those of window τ), the variance of one sample is
    t d Σ_τ‖g_τ‖² + ‖g‖² for ``normal``, and (t d - 2) Σ_τ‖g_τ‖² + ‖g‖² for
    ``rademacher``. For normal noise that is (d + 1) ‖g‖², the variance of ``nres``,
    where all g_τ are the same, and more everywhere else.

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
      noise: how directions are drawn: one of ``perturb.noise``, or a callable. Within
        one window samples may depend on each other (``orthonormal``).

    Returns:
      An ``Evolution``.

    Raises:
      ValueError: an option is not of its kind or range; from its functions, see
        ``Evolution``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> est = perturb.pes(
      ...     lambda a, x, h: h + a * x, lambda a, h, y: h, num_samples=1000
      ... )
      >>> a, carry = jnp.array(0.5), est.init(jnp.array(0.5), jnp.array(0.0))
      >>> for key in jax.random.split(jax.random.key(0), 3):  # h is a, 2 a, 3 a
      ...     noise = est.noise(key, carry)
      ...     carry, out = est.step(a, carry, jnp.ones(1), None, noise)
      >>> bool(jnp.abs(out.grads - 3) < 0.5)
      True

    References:
      Vicol, Metz, Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation
      Graphs with Persistent Evolution Strategies", ICML 2021,
      https://arxiv.org/abs/2112.13835, Algorithm 2.
    """
    pairs = Pairs(
        num_samples=num_samples, axis_name=axis_name, sigma=sigma, noise=noise
    )

    def choose(
        credit: PyTree, started: jax.Array, fresh: PyTree
    ) -> tuple[PyTree, PyTree]:
        del started
        return fresh, add(credit, fresh)

    return persistent(f, loss, pairs, choose)
