"""RFLO: the influence without the recurrent connections."""

from __future__ import annotations

from rbpjax.online.cell import PreactivationCell
from rbpjax.online.estimator import Estimator, LossFn
from rbpjax.online.local import local_influence


def rflo(cell: PreactivationCell, loss: LossFn) -> Estimator:
    """Streams gradients with an eligibility trace in each unit.

    All influence through the recurrent matrix is dropped; what remains is the memory
    inside the units, such as the leak or the forget gate:

        B ← (∂h'/∂h at fixed z) B + D ⊗ ĥ,    gradient = ∂loss/∂θ + δ B.

    For the leaky cell h' = (1-α) h + α φ(W ĥ) this is the trace of the paper,
    B ← (1-α) B + α φ' ĥᵀ. Departs from it in using the true δ = ∂loss/∂h; for a
    fixed random feedback, give the loss a custom derivative.

    Truncated (biased). Exact where W has no recurrent part. No noise. Cost: time and
    memory O(P S²) for P entries of W and S state leaves, without any product with W.
    Works under ``jit``, ``vmap``, ``scan``.

    Args:
      cell: step function as a ``PreactivationCell``.
      loss: ``loss(params, h, y) -> scalar`` at the new state.

    Returns:
      An ``Estimator``. Its influence is B, ``[S, a, n, k]``; it needs no noise.

    Raises:
      ValueError: ``cell`` is no ``PreactivationCell``.

    Example:
      >>> import jax.numpy as jnp
      >>> cell = PreactivationCell(
      ...     kernel=lambda W: W[None],
      ...     features=lambda x, h: jnp.concatenate([h, x]),
      ...     activate=lambda z, h: 0.9 * h + 0.1 * jnp.tanh(z[0]),
      ... )
      >>> est = rflo(cell, loss=lambda W, h, y: jnp.sum((h - y) ** 2))
      >>> W = jnp.full((2, 3), 0.5)
      >>> carry = est.init(W, jnp.zeros(2))
      >>> carry, out = est.step(W, carry, jnp.ones(1), jnp.zeros(2), ())
      >>> out.grads.shape
      (2, 3)

    References:
      Murray, "Local online learning in recurrent networks with random feedback",
      eLife 8, 2019, https://elifesciences.org/articles/43299.
    """

    def self_jacobian(params, x, h, inside):
        del params, x, h
        return inside.local

    return local_influence(cell, loss, self_jacobian)
