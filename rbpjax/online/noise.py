"""Random signs, and all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from rbpjax.online.estimator import Carry, floats
from rbpjax.types import PyTree


def state_signs(key: jax.Array, carry: Carry) -> PyTree:
    """Independent uniform signs, one for each unit of the state."""
    # Signs, not just any noise of mean zero: E εεᵀ = I is what the reduction needs,
    # and uniform noise on [-1, 1] would shrink the influence to a third.
    return optax.tree.random_like(
        key, floats(carry.h), sampler=lambda k, s, d: jax.random.rademacher(k, s, d)
    )


def all_signs(noise: PyTree, num_steps: int) -> PyTree:
    """Enumerates every sign pattern of a run, so that means over noise are exact.

    Cost: 2^(num_steps × signs a step) patterns; for tests and small pictures.

    Args:
      noise: the noise of one step, from ``Estimator.noise``; its values do not matter.
      num_steps: the number of steps of the run.

    Returns:
      Same pytree as ``noise``, each leaf with two leading axes
      ``[pattern, step, ...]``.

    Raises:
      ValueError: there are more than 2²⁰ patterns.

    Example:
      >>> all_signs(jnp.ones(1), num_steps=2)[..., 0]
      Array([[-1., -1.],
             [-1.,  1.],
             [ 1., -1.],
             [ 1.,  1.]], dtype=float64)
    """
    flat, unravel = jax.flatten_util.ravel_pytree(noise)
    bits = num_steps * flat.size
    if bits > 20:
        raise ValueError(
            f"`num_steps` = {num_steps} with {flat.size} signs a step gives 2^{bits} "
            "patterns; at most 2^20 are enumerated. Take fewer steps or units."
        )
    pattern = jnp.arange(2**bits)[:, None] >> jnp.arange(bits)[None, ::-1]
    signs = (2 * (pattern & 1) - 1).astype(flat.dtype)
    signs = signs.reshape(2**bits, num_steps, flat.size)
    return jax.vmap(jax.vmap(unravel))(signs)
