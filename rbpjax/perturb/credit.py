"""Which losses a perturbation answers for: any map from δL ``[T, …]`` to credits.

With the change δL_t of the loss at step t, noise of step t is credited with

* ``instant``: δL_t: estimates the gradient truncated to one step;
* ``causal``: Σ_{s≥t} δL_s: estimates the gradient through time, as BPTT has it;
* ``total``: Σ_s δL_s: the same mean with more variance for node and weight
  perturbation; for activity perturbation it adds a spurious term;
* ``Trace(decay)``: Σ_{s≥t} decay^(s-t) δL_s: between the first two.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rbpjax.types import check_real, strategy

Credit = Callable[[jax.Array], jax.Array]


def instant(delta: jax.Array) -> jax.Array:
    """Credits a perturbation with the loss of its own step alone.

    Args:
      delta: change of the loss, ``[T, …]``.

    Returns:
      ``delta`` as it is.

    Example:
      >>> instant(jnp.array([1.0, 2.0, 4.0]))
      Array([1., 2., 4.], dtype=float64)
    """
    return delta


def causal(delta: jax.Array) -> jax.Array:
    """Credits a perturbation with the losses from its own step on.

    Args:
      delta: change of the loss, ``[T, …]``.

    Returns:
      Sums from each step to the end, ``[T, …]``.

    Example:
      >>> causal(jnp.array([1.0, 2.0, 4.0]))
      Array([7., 6., 4.], dtype=float64)
    """
    return jnp.cumsum(delta[::-1], axis=0)[::-1]


def total(delta: jax.Array) -> jax.Array:
    """Credits every perturbation with all losses, also those before it.

    Args:
      delta: change of the loss, ``[T, …]``.

    Returns:
      The sum over time at each step, ``[T, …]``.

    Example:
      >>> total(jnp.array([1.0, 2.0, 4.0]))
      Array([7., 7., 7.], dtype=float64)
    """
    return jnp.broadcast_to(jnp.sum(delta, axis=0, keepdims=True), delta.shape)


@strategy
class Trace:
    """Credits a perturbation with later losses, discounted.

    The sum that an eligibility trace E_t = decay E_{t-1} + ξ_t makes when it is paid
    δL_t at every step. ``Trace(0)`` is ``instant``, ``Trace(1)`` is ``causal``.

    Attributes:
      decay: discount a step, in [0, 1].

    Raises:
      ValueError: ``decay`` is no Python number in [0, 1].

    Example:
      >>> Trace(0.5)(jnp.array([1.0, 2.0, 4.0]))
      Array([3., 4., 4.], dtype=float64)
    """

    decay: float

    def __post_init__(self):
        check_real(self, "decay", self.decay)
        if self.decay > 1:
            raise ValueError(f"Trace: `decay` must be at most 1; got {self.decay!r}.")

    def __call__(self, delta: jax.Array) -> jax.Array:
        """Returns the credits, ``[T, …]``."""

        def body(later, now):
            later = now + self.decay * later
            return later, later

        return jax.lax.scan(body, 0 * delta[0], delta, reverse=True)[1]
