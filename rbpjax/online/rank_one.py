"""The rank-one trick: a sum of outer products as one random outer product.

``reduce`` is the trick itself, ``scales`` and ``variance`` what is known about its
variance, ``all_signs`` every value that its noise can take. Below them is what the
estimators ``uoro``, ``nobacktrack`` and ``kalman_nobacktrack`` share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rbpjax._core.products import jvp
from rbpjax._core.step import floats
from rbpjax._core.tree import axpy, vdot
from rbpjax.online.estimator import Carry, Observed, parts, start
from rbpjax.types import PyTree

__all__ = ["RankOne", "all_signs", "reduce", "scales", "variance"]


class RankOne(NamedTuple):
    """The matrix v wᵀ, as its two factors: memory n + P instead of n P.

    It is the influence of ``uoro``, ``nobacktrack`` and ``kalman_nobacktrack``, where
    its mean over the noise is G = ∂h/∂θ, and what ``reduce`` returns.

    Attributes:
      v: same pytree as the floating-point leaves of the state, ``Parts`` for complex
        ones; ``[n]`` from ``reduce``.
      w: same pytree as the floating-point leaves of the parameters; ``[P]`` from
        ``reduce``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.online import rank_one
      >>> pair = rank_one.RankOne(v=jnp.array([1.0, 2.0]), w=jnp.array([3.0, 4.0]))
      >>> jnp.outer(*pair).tolist()
      [[3.0, 4.0], [6.0, 8.0]]

    References:
      Ollivier, Tallec, Charpiat, "Training recurrent networks online without
      backtracking", https://arxiv.org/abs/1507.07680, the rank-one trick.
    """

    v: PyTree
    w: PyTree


def reduce(
    vs: jax.Array, ws: jax.Array, signs: jax.Array, scales: jax.Array
) -> RankOne:
    """Reduces Σᵢ vᵢ wᵢᵀ to one random outer product with the same mean.

    With independent signs εᵢ = ±1 and any scales ρᵢ > 0 that do not depend on them,

        (Σᵢ ρᵢ εᵢ vᵢ) (Σⱼ εⱼ wⱼ / ρⱼ)ᵀ

    has mean Σᵢ vᵢ wᵢᵀ, because E εᵢεⱼ is 1 for i = j and else 0.

    Unbiased. Cost: time O(K (n + P)), memory n + P. All AD modes.

    Args:
      vs: ``[K, n]``, the left factors.
      ws: ``[K, P]``, the right factors.
      signs: ``[K]``, each +1 or -1.
      scales: ``[K]``, positive; the function ``scales`` gives the best ones.

    Returns:
      The pair ``v [n], w [P]``.

    Raises:
      TypeError: from JAX, where the shapes do not fit.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax.online import rank_one
      >>> vs, ws = jnp.eye(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> signs = jnp.array([[1.0, 1.0], [1.0, -1.0]])  # the other two are mirrored
      >>> reduce = jax.vmap(rank_one.reduce, (None, None, 0, None))
      >>> pairs = reduce(vs, ws, signs, jnp.ones(2))
      >>> (jnp.einsum("ki,kj->ij", pairs.v, pairs.w) / 2).tolist()
      [[1.0, 2.0], [3.0, 4.0]]

    References:
      Ollivier, Tallec, Charpiat, "Training recurrent networks online without
      backtracking", https://arxiv.org/abs/1507.07680, the rank-one trick.
    """
    return RankOne((signs * scales) @ vs, (signs / scales) @ ws)


def scales(vs: jax.Array, ws: jax.Array) -> jax.Array:
    """Computes the scales of minimum variance for ``reduce``.

    By Cauchy–Schwarz, the only part of the variance that depends on ρ is least where
    ρᵢ² ∝ ‖wᵢ‖/‖vᵢ‖.

    Exact. Cost: time O(K (n + P)), memory K. All AD modes.

    Args:
      vs: ``[K, n]``, the left factors, none of them zero.
      ws: ``[K, P]``, the right factors, none of them zero.

    Returns:
      ρ: ``[K]``. Nothing is raised: a zero factor gives 0, inf or nan.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.online import rank_one
      >>> rank_one.scales(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 20.0]])).tolist()
      [2.0]

    References:
      Ollivier, Tallec, Charpiat, "Training recurrent networks online without
      backtracking", https://arxiv.org/abs/1507.07680, the rank-one trick.
    """
    return jnp.sqrt(jnp.linalg.norm(ws, axis=1) / jnp.linalg.norm(vs, axis=1))


def variance(vs: jax.Array, ws: jax.Array, scales: jax.Array) -> jax.Array:
    """Computes the variance E‖v wᵀ - A‖² of ``reduce``, with A = Σᵢ vᵢ wᵢᵀ.

        (Σ ρᵢ²‖vᵢ‖²)(Σ ‖wⱼ‖²/ρⱼ²) - Σ ‖vᵢ‖²‖wᵢ‖² + Σ_{i≠j} (vᵢ·vⱼ)(wᵢ·wⱼ)

    Exact: the mean over all 2^K sign patterns, in closed form. Cost: time
    O(K² (n + P)), memory K². All AD modes.

    Args:
      vs: ``[K, n]``, the left factors.
      ws: ``[K, P]``, the right factors.
      scales: ``[K]``, positive.

    Returns:
      The variance, summed over all entries of the matrix; a scalar.

    Raises:
      TypeError: from JAX, where the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.online import rank_one
      >>> vs, ws = jnp.eye(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> float(rank_one.variance(vs, ws, jnp.ones(2)))
      30.0
      >>> best = rank_one.scales(vs, ws)
      >>> round(float(rank_one.variance(vs, ws, best)), 2)
      22.36

    References:
      From E εᵢεⱼεₖεₗ of the trick in Ollivier, Tallec, Charpiat, "Training recurrent
      networks online without backtracking", https://arxiv.org/abs/1507.07680.
    """
    v_gram, w_gram = vs @ vs.T, ws @ ws.T
    v_norms, w_norms = jnp.diagonal(v_gram), jnp.diagonal(w_gram)
    spread = jnp.sum(scales**2 * v_norms) * jnp.sum(w_norms / scales**2)
    return spread + jnp.sum(v_gram * w_gram) - 2 * jnp.sum(v_norms * w_norms)


def all_signs(noise: PyTree, num_steps: int) -> PyTree:
    """Enumerates every sign pattern of a run, so that means over noise are exact.

    Cost: time and memory of 2^(num_steps × signs a step) patterns; for tests and small
    pictures. The signs are data, with nothing to differentiate.

    Args:
      noise: the noise of one step, from ``Estimator.noise``; its values do not matter.
      num_steps: the number of steps of the run.

    Returns:
      Same pytree as ``noise``, each leaf with two leading axes
      ``[pattern, step, ...]``.

    Raises:
      ValueError: there are more than 2²⁰ patterns.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.online import rank_one
      >>> rank_one.all_signs(jnp.ones(1), num_steps=2)[..., 0].tolist()
      [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]

    References:
      The mean over them is the expectation in Ollivier, Tallec, Charpiat, "Training
      recurrent networks online without backtracking",
      https://arxiv.org/abs/1507.07680.
    """
    flat, unravel = ravel_pytree(noise)
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


# What the estimators share.


def zero_pair(params: PyTree, h0: PyTree) -> Carry:
    """The carry before the first step: the state, and v wᵀ = 0."""
    h0 = start(params, h0)
    zeros = optax.tree.zeros_like
    return Carry(h0, RankOne(zeros(parts(h0)), zeros(floats(params))))


def state_signs(key: jax.Array, carry: Carry) -> PyTree:
    """Independent uniform signs, one for each real number of the state."""
    # Signs, not just any noise of mean zero: E εεᵀ = I is what the reduction needs,
    # and uniform noise on [-1, 1] would shrink the influence to a third.
    return optax.tree.random_like(
        key, parts(carry.h), sampler=lambda k, s, d: jax.random.rademacher(k, s, d)
    )


class Pushed(NamedTuple):
    """The old pair, taken through one step.

    Attributes:
      jv: J v, like the state.
      vjp: c ↦ cᵀF, from states to gradients.
      grads: the gradient of the present loss, ∂loss/∂θ + δ F + (δ · J v) w.
    """

    jv: PyTree
    vjp: Callable[[PyTree], PyTree]
    grads: PyTree


def push(here: Observed, pair: RankOne) -> Pushed:
    """Takes the old pair through the step ``here``: one JVP, one VJP."""
    _, vjp = jax.vjp(lambda p: here.f(p, here.h), here.params)
    _, jv = jvp(lambda s: here.f(here.params, s), here.h, pair.v)
    (last,) = vjp(here.delta)
    past = vdot(here.delta, jv)  # δ J v without the VJP in h
    grads = axpy(past, pair.w, optax.tree.add(here.direct, last))
    return Pushed(jv, lambda c: vjp(c)[0], grads)
