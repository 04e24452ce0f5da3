"""Which losses a perturbation answers for: a public namespace of credits.

A credit maps the changes of the losses, δL ``[T, …]``, to credits of that shape. Any
callable that does so serves. Noise of step t is credited with

* ``instant``: δL_t: estimates the gradient truncated to one step;
* ``causal``: Σ_{s≥t} δL_s: estimates the gradient through time, as BPTT has it;
* ``total``: Σ_s δL_s: the same mean with more variance for node and weight
  perturbation; for activity perturbation it adds a spurious term;
* ``Trace(decay=γ)``: Σ_{s≥t} γ^(s-t) δL_s: between the first two.

Cost: a sum over the T changes. AD modes: all.

Example:
  >>> import jax.numpy as jnp
  >>> from rbpjax import perturb
  >>> delta = jnp.array([1.0, 2.0, 4.0])
  >>> perturb.credit.Trace(decay=0.5)(delta).tolist()
  [3.0, 4.0, 4.0]
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rbpjax._core.sharding import vary_like
from rbpjax._core.strategy import real, strategy

__all__ = ["Credit", "Trace", "causal", "instant", "total"]

Credit = Callable[[jax.Array], jax.Array]
"""Changes of the losses ``[T, …]`` to the credits of the noise of each step."""


def instant(delta: jax.Array) -> jax.Array:
    """Credits a perturbation with the loss of its own step alone.

    Args:
      delta: change of the loss, ``[T, …]``.

    Returns:
      ``delta`` as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> perturb.credit.instant(jnp.array([1.0, 2.0, 4.0])).tolist()
      [1.0, 2.0, 4.0]

    References:
      García Fernández, Keemink, van Gerven, "Gradient-Free Training of Recurrent
      Neural Networks using Random Perturbations", https://arxiv.org/abs/2405.08967.
    """
    return delta


def causal(delta: jax.Array) -> jax.Array:
    """Credits a perturbation with the losses from its own step on.

    Args:
      delta: change of the loss, ``[T, …]``.

    Returns:
      Sums from each step to the end, ``[T, …]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> perturb.credit.causal(jnp.array([1.0, 2.0, 4.0])).tolist()
      [7.0, 6.0, 4.0]

    References:
      Züge, Klos, Memmesheimer, "Weight versus Node Perturbation Learning in Temporally
      Extended Tasks", PRX 13, 021006, 2023.
    """
    return jnp.cumsum(delta[::-1], axis=0)[::-1]


def total(delta: jax.Array) -> jax.Array:
    """Credits every perturbation with all losses, also those before it.

    Args:
      delta: change of the loss, ``[T, …]``.

    Returns:
      The sum over time at each step, ``[T, …]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> perturb.credit.total(jnp.array([1.0, 2.0, 4.0])).tolist()
      [7.0, 7.0, 7.0]

    References:
      Züge, Klos, Memmesheimer, "Weight versus Node Perturbation Learning in Temporally
      Extended Tasks", PRX 13, 021006, 2023.
    """
    return jnp.broadcast_to(jnp.sum(delta, axis=0, keepdims=True), delta.shape)


@strategy
class Trace:
    """Credits a perturbation with later losses, discounted.

    The sum that an eligibility trace E_t = decay E_{t-1} + ξ_t makes when it is paid
    δL_t at every step. ``Trace(decay=0)`` is ``instant``, ``Trace(decay=1)`` is
    ``causal``. Between them the gradient estimated is that of neither. A change that is
    not finite spoils the credits of its own step and of those before it only.

    Attributes:
      decay: discount a step, in [0, 1].

    Raises:
      ValueError: ``decay`` is no Python number in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> perturb.credit.Trace(decay=0.5)(jnp.array([1.0, 2.0, 4.0])).tolist()
      [3.0, 4.0, 4.0]

    References:
      Williams, "Simple statistical gradient-following algorithms for connectionist
      reinforcement learning", Machine Learning 8, 1992 (eligibilities).
    """

    decay: float = real(maximum=1.0)

    def __call__(self, delta: jax.Array) -> jax.Array:
        """Returns the credits, ``[T, …]``."""
        if self.decay == 0:  # 0 times a loss that is not finite would not be 0
            return delta

        def body(later: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
            later = now + self.decay * later
            return later, later

        nothing = vary_like(jnp.zeros(delta.shape[1:], delta.dtype), delta)
        return jax.lax.scan(body, nothing, delta, reverse=True)[1]
